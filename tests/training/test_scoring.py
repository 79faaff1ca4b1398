"""Scoring of a step's micro-batches: forwards per micro-batch, auxiliary loss, other losses."""

from typing import Any

import pytest
import torch
from torch import nn

from kto_lightning.errors import ConfigError
from kto_lightning.models.reference import FrozenReference
from tests.support.factories import make_model
from tests.support.steps import MIXED, VOCABULARY, fit_steps, make_module, step_batch
from tests.support.tolerances import EPS, RELATIVE

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")


@pytest.mark.parametrize(
    ("loss", "max_tokens", "num_policy_runs", "num_reference_runs"),
    [("kto", 10**6, 1, 1), ("kto", 40, 2, 1), ("apo_zero_unpaired", 40, 1, 1)],
)
def test_nothing_is_run_twice(
    loss: str, max_tokens: int, num_policy_runs: int, num_reference_runs: int
) -> None:
    module = make_module(loss=loss)
    runs: dict[str, list[Any]] = {"policy": [], "reference": []}
    assert isinstance(module.reference, FrozenReference)
    for name, policy in (("policy", module.policy), ("reference", module.reference.policy)):
        assert policy is not None
        policy.register_forward_hook(lambda _, a, logps, n=name: runs[n].append(logps))
    batch = step_batch(max_tokens=max_tokens, paired=loss == "kto")
    fit_steps(module, batch)
    cut = len(batch.micro_batches)
    assert len(runs["policy"]) == num_policy_runs * cut
    assert len(runs["reference"]) == num_reference_runs * cut
    if loss != "kto":
        assert all(logps.mismatched is None for name in runs for logps in runs[name])


def test_batches_made_for_the_other_loss_are_refused() -> None:
    with pytest.raises(ConfigError, match="not made for kto"):
        fit_steps(make_module(loss="kto"), step_batch(paired=False))
    with pytest.raises(ConfigError, match="not made for apo_zero_unpaired"):
        fit_steps(make_module(loss="apo_zero_unpaired"), step_batch())


@pytest.mark.parametrize("max_tokens", [10**6, 30], ids=["one", "several"])
def test_the_auxiliary_loss_is_a_token_weighted_mean(max_tokens: int) -> None:
    batch = step_batch(max_tokens=max_tokens, num_ranks=4 if max_tokens == 30 else 1)
    module = make_module("qwen2_moe")
    assert module.policy is not None
    coefficient = module.policy.auxiliary_coefficient
    assert coefficient > 0
    plain = make_model("qwen2_moe", vocab_size=VOCABULARY)
    expected = 0.0
    for micro_batch in batch.micro_batches:
        if micro_batch.is_filler[0]:
            continue
        rows = list(micro_batch.matched.input_ids.split(micro_batch.matched.lengths))
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        output = plain(ids, attention_mask=mask, output_router_logits=True)
        expected += output.aux_loss.item() * int(mask.sum()) / MIXED.num_tokens
    result = fit_steps(module, batch)
    without = make_module("qwen2_moe")
    assert without.policy is not None
    without.policy.auxiliary_coefficient = 0.0
    pure = fit_steps(without, batch)
    added = result.row["train/loss"] - pure.row["train/loss"]
    rounding = 2 * EPS * result.row["train/loss"]  # it is a difference of two losses
    assert added == pytest.approx(coefficient * expected, rel=RELATIVE, abs=rounding)
    assert result.row["train/grad_norm"] != pure.row["train/grad_norm"]
