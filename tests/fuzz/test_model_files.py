"""Models, tokenizers and adapters whose files are damaged or from elsewhere, through `fit`."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.factories import save_adapter
from tests.support.fuzz import fuzz, mutated_bytes, mutated_json, run_within_bounds, to_json


@pytest.fixture(scope="module")
def adapter(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the policy."""
    return save_adapter(tmp_path_factory.mktemp("adapter") / "adapter", policy)


@fuzz(14)
@given(data=st.data())
def test_a_model_with_damaged_files_is_trained_or_named(
    policy: Path, train: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    _fit_with_damage(policy, train, tmp_path_factory.mktemp("model") / "odd_model", data)


@fuzz(8)
@given(data=st.data())
def test_an_adapter_with_damaged_files_is_trained_or_named(
    adapter: Path, train: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    _fit_with_damage(adapter, train, tmp_path_factory.mktemp("model") / "odd_model", data)


def _fit_with_damage(source: Path, train: Path, model: Path, data: st.DataObject) -> None:
    shutil.copytree(source, model)
    names = sorted(path.name for path in model.iterdir() if path.name != "README.md")
    file = model / data.draw(st.sampled_from(names))
    content = file.read_bytes()
    if file.suffix == ".json" and data.draw(st.booleans()):
        document = json.loads(content)
        # A tokenizer's vocabulary has hundreds of entries: most changes go elsewhere.
        file.write_bytes(to_json(data.draw(mutated_json(document))))
    else:
        file.write_bytes(data.draw(mutated_bytes(content)))
    run_within_bounds(
        *("fit", "--model.policy", model, "--data.train", train, "--data.batch_size", 4),
        *("--output_dir", model.parent / "output", "--trainer.accelerator", "cpu"),
        *("--trainer.max_steps", 1),
        names=("odd_model", "--model.", "--data."),
    )
