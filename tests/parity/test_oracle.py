"""TRL's numbers are KTO's, by plain float64 PyTorch: so to agree with TRL is to be right."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kto_lightning.parity.trl_trace import trl_trace
from tests.parity.assertions import assert_traces_agree, assert_weights_agree
from tests.parity.cases import AXES, Case, write_inputs
from tests.parity.oracle import oracle_trace

_PLAIN_DESCENT = Case(
    architecture="llama",
    data="plain",
    loss="kto",
    tuning="full",
    optimizer="sgd",
    weights=(1.0, 2.94),
    schedule=("constant", 0.0),
    gradient_clip_norm=None,
    weight_decay=0.0,
    truncated=False,
)
_VARIATIONS = (
    {"data": "plain", "loss": "kto", "tuning": "full", "truncated": True},
    {"data": "gemma", "loss": "kto", "tuning": "lora", "truncated": False},
    {"data": "llama3", "loss": "apo_zero_unpaired", "tuning": "full", "truncated": False},
)


def _cases() -> Iterator[Any]:
    # Every architecture with one of the variations; with the others in the slow tests.
    for i, architecture in enumerate(AXES["architecture"]):
        for j, variation in enumerate(_VARIATIONS):
            case = replace(_PLAIN_DESCENT, architecture=architecture, steps=4, **variation)
            yield pytest.param(case, marks=[] if i % 3 == j else pytest.mark.slow, id=str(case))


def _in_float64(model: Any) -> Any:
    if hasattr(model.config, "num_experts"):
        model.set_experts_implementation("eager")  # grouped matrix products know no float64
    return model.double()


@pytest.mark.parametrize("case", _cases())
def test_trl_computes_kto(case: Case, tmp_path: Path):
    inputs = write_inputs(case, tmp_path)
    theirs = trl_trace(inputs, case.settings(), tmp_path / "trl")
    truth = oracle_trace(
        _in_float64(inputs.load()),
        _in_float64(inputs.load()),
        inputs.tokenizer(),
        inputs.records,
        case.settings(),
    )
    assert_traces_agree(truth, theirs, beta=case.beta)
    assert_weights_agree(truth.weights, theirs.weights, inputs.initial_weights())


@pytest.mark.parametrize(
    ("architecture", "optimizer"), [("qwen2", "adamw"), ("gemma2", "sgd"), ("qwen2_moe", "adamw")]
)
def test_trl_agrees_with_itself_under_other_padding(
    architecture: str, optimizer: str, tmp_path: Path
):
    # What the tolerances are worth: twenty steps apart in nothing but rounding stay within them.
    case = replace(_PLAIN_DESCENT, architecture=architecture, optimizer=optimizer)
    inputs = write_inputs(case, tmp_path)
    once, again = (
        trl_trace(inputs, case.settings(), tmp_path / "trl", pad_to_multiple_of=multiple)
        for multiple in (None, 64)
    )
    assert_traces_agree(again, once, beta=case.beta)
    if optimizer == "sgd":
        assert_weights_agree(again.weights, once.weights, inputs.initial_weights())
