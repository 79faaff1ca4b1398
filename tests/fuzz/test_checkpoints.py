"""Checkpoints with damaged bytes and with values of other types, through `export` and resuming."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kto_lightning.training.checkpoints import list_checkpoints
from tests.support.cli import EVERY_STEP, LAST, fit, fit_arguments
from tests.support.fuzz import fuzz, mutated_bytes, mutated_json, run_within_bounds


@pytest.fixture(scope="module")
def run(policy: Path, train: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run with a checkpoint at each of its three steps."""
    output = tmp_path_factory.mktemp("run") / "output"
    return fit(policy, train, output, *EVERY_STEP, "--trainer.max_steps", 3)


@fuzz(40)
@given(data=st.data())
def test_a_damaged_checkpoint_is_not_exported(
    run: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("export")
    _, whole = list_checkpoints(run)[-1]
    content = whole.read_bytes()
    damaged = folder / "step=3.ckpt"
    damaged.write_bytes(data.draw(mutated_bytes(content)))
    if damaged.read_bytes() == content:  # zeros over zeros
        return
    outcome = run_within_bounds("export", damaged, folder / "model", names=str(damaged))
    assert outcome.status == 1, outcome
    assert not (folder / "model").exists()


@fuzz(6)
@given(data=st.data())
def test_a_damaged_last_checkpoint_gives_way_to_the_one_before(
    policy: Path,
    train: Path,
    run: Path,
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    output = tmp_path_factory.mktemp("resume") / "output"
    shutil.copytree(run, output)
    (_, before), (_, last) = list_checkpoints(output)[-2:]
    content = last.read_bytes()
    last.write_bytes(data.draw(mutated_bytes(content)))
    outcome = run_within_bounds(
        *fit_command(policy, train, output), *LAST, "--trainer.max_steps", 3
    )
    assert outcome.status == 0, outcome
    assert last.name in outcome.err or last.read_bytes() == content
    assert before.exists()
    assert (output / "model" / "model.safetensors").read_bytes() == (
        run / "model" / "model.safetensors"
    ).read_bytes()


def fit_command(policy: Path, train: Path, output: Path) -> list[Any]:
    """`fit` with the settings of `run`."""
    return ["fit", *fit_arguments(policy, train, output, *EVERY_STEP)]


@fuzz(40)
@given(data=st.data())
def test_a_checkpoint_with_other_values_is_exported_or_named(
    run: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("export")
    _, whole = list_checkpoints(run)[-1]
    checkpoint = torch.load(whole, weights_only=True)
    part = data.draw(st.sampled_from(("kto", "state_dict", None)))
    if part is None:
        checkpoint = data.draw(mutated_json({k: v for k, v in checkpoint.items() if k == "kto"}))
    else:
        checkpoint[part] = data.draw(mutated_json(dict(checkpoint[part])))
    odd = folder / "odd.ckpt"
    torch.save(checkpoint, odd)
    run_within_bounds("export", odd, folder / "model", names=("odd.ckpt", "model"))
