"""What every test shares. No test reaches a hub or an old cache: settled before any import."""

import atexit
import os
import shutil
import tempfile

# A cache of an earlier run would hide what reading and tokenizing do now.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="kto_lightning_datasets_")
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from pathlib import Path

import pytest
import torch

SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    """The folder of real feedback data beside the checkout; the test skips where there is none."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real feedback data is not beside this checkout")
    return SHARED_DATA


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
