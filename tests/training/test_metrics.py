"""Step metrics: worked by hand, of a real step, and with any micro-batches and ranks."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kto_lightning.batches.types import Logps
from kto_lightning.loss import gradient_left, kto_loss
from kto_lightning.models.policy import Policy
from kto_lightning.models.reference import FrozenReference
from kto_lightning.training.metrics import (
    BatchSums,
    StepClock,
    batch_metrics,
    peak_memory_mib,
    sample_std,
)
from kto_lightning.training.metrics_csv import DETAIL_METRICS
from tests.support.steps import fit_steps, make_module, step_batch

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")

REWARDS = [1.0, 2.0, 4.0, 3.0, 9.0]
DESIRABLE_WEIGHT = [True, False, False, True, False]
LOGPS = [-10.0, -20.0, -30.0, -50.0, -70.0]
LEFT = [1.0, 0.5, 0.25, 0.5, 0.0]
MISMATCHED = [0.0, 2.0, 4.0, 6.0, -2.0]


def add_examples(sums: BatchSums, chosen: list[int], *, is_filler: bool = False) -> None:
    """Add a micro-batch of the examples above."""

    def pick(values: list) -> Tensor:
        return torch.tensor([values[i] for i in chosen])

    fillers = torch.full((len(chosen),), is_filler)
    sums.add(
        loss=pick(REWARDS) / 10,
        reward=pick(REWARDS),
        logps=pick(LOGPS),
        gradient_left=pick(LEFT),
        desirable=pick(DESIRABLE_WEIGHT),
        is_filler=fillers,
    )
    sums.add_mismatched(pick(MISMATCHED), fillers)


def test_numbers_worked_by_hand() -> None:
    sums = BatchSums.zero(torch.device("cpu"))
    add_examples(sums, [0, 1, 2, 3, 4])
    assert batch_metrics(sums.values.tolist()) == pytest.approx(
        {
            "loss": 0.38,
            "reward/desirable": 2.0,  # of 1 and 3
            "reward/desirable_std": math.sqrt(2.0),
            "reward/undesirable": 5.0,  # of 2, 4 and 9: deviations −3, −1 and 4
            "reward/undesirable_std": math.sqrt(13.0),
            "reward/margin": -3.0,
            "logps/desirable": -30.0,
            "logps/undesirable": -40.0,
            "gradient_left/desirable": 0.75,
            "gradient_left/undesirable": 0.25,
            "z0_se": math.sqrt(10.0 / 5.0),  # mean 2: squared deviations 4, 0, 4, 16 and 16
        },
        rel=1e-6,
    )


@given(
    order=st.permutations(range(5)),
    cuts=st.sets(st.integers(1, 4)),
    fillers=st.lists(st.integers(0, 4), max_size=2),
)
def test_micro_batches_and_ranks_do_not_change_metrics(
    order: list[int], cuts: set[int], fillers: list[int]
) -> None:
    whole = BatchSums.zero(torch.device("cpu"))
    add_examples(whole, list(range(5)))
    ranks = [BatchSums.zero(torch.device("cpu")) for _ in range(2)]
    bounds = [0, *sorted(cuts), 5]
    for index, (start, end) in enumerate(pairwise(bounds)):
        add_examples(ranks[index % 2], order[start:end])
    for filler in fillers:
        add_examples(ranks[1], [filler], is_filler=True)
    found = batch_metrics((ranks[0].values + ranks[1].values).tolist())
    assert found == pytest.approx(batch_metrics(whole.values.tolist()), rel=1e-12)


def test_metrics_with_too_few_examples_are_none() -> None:
    sums = BatchSums.zero(torch.device("cpu"))
    assert set(batch_metrics(sums.values.tolist()).values()) == {None}
    add_examples(sums, [0])
    metrics = batch_metrics(sums.values.tolist())
    assert metrics["reward/desirable"] == 1.0
    assert metrics["gradient_left/desirable"] == 1.0
    for name in (
        "z0_se",
        "reward/desirable_std",
        "reward/undesirable",
        "gradient_left/undesirable",
    ):
        assert metrics[name] is None


def test_a_standard_deviation_is_exact_beside_a_large_mean() -> None:
    values = (1000 + torch.tensor([0.0, 1e-2, 2e-2])).double()  # float32's, as they are
    found = sample_std(3.0, float(values.sum()), float(values.square().sum()))
    assert found == pytest.approx(float(values.std()), rel=1e-4)
    assert sample_std(3.0, 3.0, 3.0 - 1e-16) == 0.0
    assert math.isnan(sample_std(2.0, math.nan, math.nan) or 0.0)


def test_gradient_left_by_hand() -> None:
    """σ(ln 3) = 3/4, so that 4 · 3/4 · 1/4 = 3/4 is left, on either side."""
    log_ratio = 5 + 10 * math.log(3) * torch.tensor([0.0, 1.0, -1.0])
    found = gradient_left(log_ratio, torch.tensor(5.0), beta=0.1)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.75, 0.75]))


@pytest.mark.parametrize("desirable", [True, False])
def test_gradient_left_is_that_of_the_loss(desirable: bool) -> None:
    log_ratio = torch.linspace(-80, 80, 9, requires_grad=True)
    z0, labels = torch.tensor(3.0), torch.full((9,), desirable)
    kto_loss(log_ratio, labels, z0, beta=0.1, weight=2.0).sum().backward()
    assert log_ratio.grad is not None
    largest = 2.0 * 0.1 / 4
    found = gradient_left(log_ratio.detach(), z0, beta=0.1)
    torch.testing.assert_close(found, log_ratio.grad.abs() / largest)


def record_logps(policy: Policy) -> dict[str, list[Tensor]]:
    """The log-probs that a policy gives from now on."""
    kept: dict[str, list[Tensor]] = {"matched": [], "mismatched": []}

    def keep(_: Policy, arguments: tuple, logps: Logps) -> None:
        for name, parts in kept.items():
            value = getattr(logps, name)
            if value is not None:
                parts.append(value.detach())

    policy.register_forward_hook(keep)
    return kept


@pytest.mark.parametrize("max_tokens", [10**6, 30], ids=["one", "several"])
def test_standard_deviations_of_a_real_step(max_tokens: int) -> None:
    """Against the log-probs of policy and reference, in one vector each."""
    module = make_module(beta=0.2)
    assert module.policy is not None
    assert isinstance(module.reference, FrozenReference)
    new, old = record_logps(module.policy), record_logps(module.reference.policy)
    batch = step_batch(max_tokens=max_tokens)
    row = fit_steps(module, batch).row
    ratios = {name: (torch.cat(new[name]) - torch.cat(old[name])).double() for name in new}
    assert {len(ratio) for ratio in ratios.values()} == {6}
    labels = torch.cat([micro_batch.desirable for micro_batch in batch.micro_batches])
    expected = {"z0_se": ratios["mismatched"].std() / math.sqrt(6)}
    logits = 0.2 * (ratios["matched"] - row["train/z0"])
    left = 4 * torch.sigmoid(logits) * torch.sigmoid(-logits)
    for name, chosen in (("desirable", labels), ("undesirable", ~labels)):
        expected[f"reward/{name}_std"] = 0.2 * ratios["matched"][chosen].std()
        expected[f"gradient_left/{name}"] = left[chosen].mean()
    assert expected.keys() == set(DETAIL_METRICS)
    for name, value in expected.items():
        assert row[f"train/{name}"] == pytest.approx(float(value), rel=1e-5), name


def test_apo_zero_has_no_standard_error_of_z0() -> None:
    row = fit_steps(make_module(loss="apo_zero_unpaired"), step_batch(paired=False)).row
    assert "train/z0_se" not in row
    assert "train/reward/desirable_std" in row


def test_the_clock_excludes_time_before_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    clock = StepClock()
    now = 160.0  # a validation
    clock.start()
    now = 162.0
    assert clock.measure(500, [1.0])["tokens_per_second"] == 250.0
    assert clock.measure(500, [1.0, 3.0, 2.0])["peak_memory_mib"] == 3.0


def test_peak_memory_only_grows() -> None:
    before = peak_memory_mib(torch.device("cpu"))
    held = torch.ones(2**26)  # 256 MiB
    after = peak_memory_mib(torch.device("cpu"))
    assert before is not None
    assert after is not None
    assert held.sum() > 0
    del held
    assert after >= max(before, 256)
    assert peak_memory_mib(torch.device("cpu")) == after
