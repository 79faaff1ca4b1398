"""Our command line and TRL's `KTOTrainer`, step by step on the same data: the second invariant.

A pairwise cover of everything that varies is quick enough for every run; the full product of
architecture, data, loss and tuning is slow (`make test-slow`).
"""

from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import pytest

from kto_lightning.parity.our_trace import our_trace
from kto_lightning.parity.trace import Inputs
from kto_lightning.parity.trl_trace import trl_trace
from tests.parity.assertions import assert_traces_agree, assert_weights_agree
from tests.parity.cases import AXES, Case, full_product, pairwise_cover, write_inputs
from tests.support.factories import save_model

_COVER = pairwise_cover()


def _assert_parity(case: Case, inputs: Inputs, directory: Path, *options: str) -> None:
    theirs = trl_trace(inputs, case.settings(), directory / "trl")
    ours = our_trace(inputs, case.settings(), directory / "ours", *options)
    assert_traces_agree(ours, theirs, beta=case.beta)
    if case.optimizer == "sgd":
        assert_weights_agree(ours.weights, theirs.weights, inputs.initial_weights())


@pytest.mark.parametrize("case", _COVER, ids=str)
def test_pairwise_cover(case: Case, tmp_path: Path):
    _assert_parity(case, write_inputs(case, tmp_path), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", full_product(), ids=str)
def test_full_product(case: Case, tmp_path: Path):
    _assert_parity(case, write_inputs(case, tmp_path), tmp_path)


@pytest.mark.parametrize("case", [_COVER[0], _COVER[4]], ids=str)
def test_several_micro_batches_are_one_step(case: Case, tmp_path: Path):
    # About one example to a forward; TRL is given the whole batch.
    inputs = write_inputs(case, tmp_path)
    _assert_parity(case, inputs, tmp_path, "--data.max_tokens", "64")


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_another_model_as_reference(loss: str, tmp_path: Path):
    # Log-ratios and z0 are far from 0 from the first step on.
    case = replace(_COVER[0], loss=loss, beta=0.02)
    inputs = write_inputs(case, tmp_path)
    reference = save_model(tmp_path / "reference", case.architecture, inputs.tokenizer(), seed=1)
    inputs.reference = str(reference)
    _assert_parity(case, inputs, tmp_path)


def test_the_cover_has_every_pair():
    pairs = {(a, b) for a, b in combinations(AXES, 2)}
    for a, b in pairs:
        seen = {(getattr(case, a), getattr(case, b)) for case in _COVER}
        assert seen == set(product(AXES[a], AXES[b]))
