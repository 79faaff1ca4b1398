"""What every test shares. No test reaches a hub or an old cache: settled before any import."""

import atexit
import importlib
import os
import shutil
import tempfile

# A cache of an earlier run would hide what reading and tokenizing do now.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="kto_lightning_datasets_")
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite("tests.support")

TESTS = Path(__file__).resolve().parent
SHARED_DATA = TESTS.parent.parent / "shared" / "data"
DRAWING = {"benchmarks", "demo", "fuzz", "reports", "test_generations.py"}
"""Tests that look at reports, or run on inputs that nobody has chosen."""

# Property-based tests have no deadline: how long one example takes is the machine's business.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


@pytest.fixture
def shared_data() -> Path:
    """The folder of real feedback data beside the checkout; the test skips where there is none."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real feedback data is not beside this checkout")
    return SHARED_DATA


# What is imported within fixtures waits for pytest's checks of types to be in place.
@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model to train, as a directory."""
    from tests.support.cli import small_model

    return small_model(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of records to train it on."""
    from tests.support.cli import small_data

    return small_data(tmp_path_factory.mktemp("data") / "train.jsonl")


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real model, SmolLM2-135M-Instruct in float32, where its package is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TESTS.parent / "benchmarks"))
        script = importlib.import_module("smollm2")
    directory = tmp_path_factory.mktemp("smollm2")
    try:
        script.save_smollm2(directory)
    except script.ModelMissing as error:
        pytest.skip(str(error))
    return directory


@pytest.fixture(scope="module", autouse=True)
def _undrawn_charts(request: pytest.FixtureRequest) -> Iterator[None]:
    """Reports of other tests have no charts: Matplotlib takes two thirds of a small run's time."""
    if DRAWING.intersection(request.path.relative_to(TESTS).parts):
        yield
        return
    from tests.support.pages import undraw

    with pytest.MonkeyPatch.context() as patch:
        undraw(patch)
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
