"""The benchmark's contestant with z0 over micro-batches of 2 is TRL with accumulation."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning import Trainer

from kto_lightning.data.datamodule import KTODataModule
from kto_lightning.parity.agreement import LATER
from kto_lightning.parity.trace import Inputs, Settings, trained_weights
from kto_lightning.parity.trl_trace import trl_trace
from tests.parity.assertions import assert_weights_agree
from tests.support.factories import make_tokenizer, save_model, write_jsonl

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SETTINGS = Settings(
    steps=6, batch_size=8, undesirable_weight=2.0, optimizer="sgd", learning_rate=5e-2
)
NUM_RECORDS = 20
"""Each epoch ends in a step of two micro-batches."""
FOUR_EPS = 4 * torch.finfo(torch.float32).eps

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL and Lightning


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("estimator_runs")


def _records() -> list[dict[str, Any]]:
    """Neighbours have different prompts, so that TRL's pairs are our rings."""
    words = ("river", "garden", "winter", "letter", "bridge", "teacher", "engine")
    return [
        {
            "prompt": f"{i} {words[i % 7]}:",
            "completion": " " + " ".join(words[(i * k + 3) % 7] for k in range(1, 3 + i % 5)),
            "label": i % 3 != 1,
        }
        for i in range(NUM_RECORDS)
    ]


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    """The reference is another model: z0s are far from 0, on both sides of the clamp, at once."""
    tokenizer = make_tokenizer()
    return Inputs(
        model=str(save_model(tmp_path / "model", "llama", tokenizer)),
        reference=str(save_model(tmp_path / "reference", "llama", tokenizer, seed=1)),
        train=str(write_jsonl(tmp_path / "train.jsonl", _records())),
    )


def _ours(runs: ModuleType, contestant: Any, inputs: Inputs) -> Any:
    module = contestant(
        inputs.model,
        reference=inputs.reference,
        beta=SETTINGS.beta,
        desirable_weight=SETTINGS.desirable_weight,
        undesirable_weight=SETTINGS.undesirable_weight,
        optimizer=SETTINGS.optimizer,
        learning_rate=SETTINGS.learning_rate,
    )
    data = KTODataModule(
        inputs.train, batch_size=SETTINGS.batch_size, max_tokens=runs.WHOLE, shuffle=False
    )
    Trainer(
        accelerator="cpu",
        max_steps=SETTINGS.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    ).fit(module, datamodule=data)
    return module


def test_it_computes_what_trl_computes(runs: ModuleType, inputs: Inputs, tmp_path: Path):
    theirs = trl_trace(inputs, SETTINGS, tmp_path / "trl", micro_batch_size=2)
    module = _ours(runs, runs.MicroBatchModule, inputs)

    z0s = [z0 for step in module.run.micro_z0s for z0 in step]
    expected = theirs.columns["train/z0"]
    assert [len(step) for step in module.run.micro_z0s] == [4, 4, 2, 4, 4, 2]
    assert len(z0s) == len(expected)
    assert 0 < sum(z0 == 0 for z0 in z0s) < len(z0s), "the clamp must matter, and not everywhere"
    for got, want, size in zip(z0s, expected, theirs.columns["mismatched_logps"], strict=True):
        assert abs(got - want) <= max(LATER * abs(want), FOUR_EPS * size)

    norms = [row["grad_norm"] for row in module.run.train]
    assert norms == pytest.approx(theirs.columns["train/grad_norm"], rel=LATER)
    weights = trained_weights(module.policy.model)
    assert_weights_agree(weights, theirs.weights, inputs.initial_weights())


def test_the_other_contestant_does_not(runs: ModuleType, inputs: Inputs):
    """So that the comparison above can tell them apart."""
    whole, micro = (
        _ours(runs, contestant, inputs).run.train
        for contestant in (runs.WholeBatchModule, runs.MicroBatchModule)
    )
    # Before the first update all that is logged is the same: it is measured alike of both.
    assert {k: whole[0][k] for k in ("loss", "z0", "z0_raw", "reward/margin")} == {
        k: micro[0][k] for k in ("loss", "z0", "z0_raw", "reward/margin")
    }
    assert micro[0]["grad_norm"] != pytest.approx(whole[0]["grad_norm"], rel=1e-2)
