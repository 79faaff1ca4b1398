"""Optimizers, weight decay and learning-rate schedules."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kto_lightning.cli.trainer import main
from kto_lightning.errors import ConfigError
from kto_lightning.training.optimizers import (
    SCHEDULES,
    Optimization,
    make_optimizer,
    make_scheduler,
)
from tests.support.factories import make_model
from tests.support.steps import LENGTHS, Examples, fit_steps, make_module, step_batch

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")


def decayed(model: nn.Module) -> set[str]:
    optimizer = make_optimizer(
        "adamw", model.named_parameters(), learning_rate=0.1, weight_decay=0.5
    )
    by_id = {id(p): name for name, p in model.named_parameters()}
    groups = {group["weight_decay"]: group["params"] for group in optimizer.param_groups}
    assert groups.keys() <= {0.5, 0.0}
    assert {id(p) for params in groups.values() for p in params} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    return {by_id[id(p)] for p in groups.get(0.5, [])}


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "gpt_oss"])
def test_matrices_decay_and_biases_and_norms_never(architecture: str) -> None:
    model = make_model(architecture, vocab_size=50)
    expected = {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and not name.endswith("bias")
    }
    assert decayed(model) == expected
    # Biases of experts are matrices, one row an expert.
    assert any(p.ndim == 2 and n.endswith("bias") for n, p in model.named_parameters()) is (
        architecture == "gpt_oss"
    )


def test_norms_by_head_do_not_decay_though_they_are_matrices() -> None:
    model = make_model("cohere", vocab_size=50, use_qk_norm=True)
    by_head = [n for n, p in model.named_parameters() if "q_norm" in n and p.ndim == 2]
    assert by_head
    assert not decayed(model) & set(by_head)


def test_frozen_parameters_are_in_no_group() -> None:
    model = make_model("llama", vocab_size=50).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert decayed(model) == {"lm_head.weight"}


def test_adafactor_does_not_scale_the_rate() -> None:
    """Worked by hand: the first step's average is the squared gradient itself. Where that has rank
    one, gradient over its root is ±1, of root mean square 1, which is not clipped. So a weight
    moves by the rate, whatever its own size (3 here), and a matrix decays by rate · decay."""
    matrix = nn.Parameter(torch.full((2, 2), 3.0))
    bias = nn.Parameter(torch.full((2,), 3.0))
    optimizer = make_optimizer(
        "adafactor",
        [("weight", matrix), ("bias", bias)],
        learning_rate=0.5,
        weight_decay=0.1,
    )
    matrix.grad = torch.tensor([[1.0, -2.0], [2.0, -4.0]])
    bias.grad = torch.tensor([7.0, -0.01])
    optimizer.step()
    decayed = 3 * (1 - 0.5 * 0.1)
    expected = [[decayed - 0.5, decayed + 0.5], [decayed - 0.5, decayed + 0.5]]
    torch.testing.assert_close(matrix.detach(), torch.tensor(expected))
    torch.testing.assert_close(bias.detach(), torch.tensor([2.5, 3.5]))


def trained(name: str, num_steps: int, *, stop_at: int | None = None) -> torch.Tensor:
    """A matrix after some steps on random gradients, with its state restored in between."""
    parameter = nn.Parameter(torch.ones(3, 4))

    def make() -> torch.optim.Optimizer:
        return make_optimizer(name, [("p", parameter)], learning_rate=0.1, weight_decay=0.1)

    optimizer = make()
    for step in range(num_steps):
        if step == stop_at:
            state = optimizer.state_dict()
            optimizer = make()
            optimizer.load_state_dict(state)
        generator = torch.Generator().manual_seed(step)
        parameter.grad = torch.randn(3, 4, generator=generator)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "adamw_8bit"])
def test_a_restored_optimizer_continues_exactly(name: str) -> None:
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes", minversion="0.50")  # the first with a step on a CPU
    whole = trained(name, 6)
    assert torch.equal(trained(name, 6, stop_at=3), whole)
    assert bool((whole != 1).all())


def test_8_bit_adamw_is_close_to_adamw() -> None:
    pytest.importorskip("bitsandbytes", minversion="0.50")
    size = 4096  # the smallest that bitsandbytes keeps in 8 bits
    weights = {name: nn.Parameter(torch.ones(size, 1)) for name in ("adamw", "adamw_8bit")}
    for name, weight in weights.items():
        optimizer = make_optimizer(name, [("p", weight)], learning_rate=0.1, weight_decay=0.0)
        for step in range(3):
            weight.grad = torch.randn(size, 1, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    moved = {name: (weight.detach() - 1).flatten() for name, weight in weights.items()}
    likeness = torch.corrcoef(torch.stack(list(moved.values())))[0, 1]
    assert 0.95 < float(likeness) < 1.0


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        (
            False,
            "adamw_8bit needs bitsandbytes, which is not installed. `pip install bitsandbytes`",
        ),
        (True, "adamw_8bit needs a CUDA device, and there is none here. Use adamw"),
    ],
)
def test_8_bit_adamw_is_refused_where_it_cannot_run(
    installed: bool,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if installed:
        (tmp_path / "bitsandbytes.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
    else:
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    absent = str(tmp_path / "absent")
    files = ["--model.policy", absent, "--data.train", absent, "--output_dir", str(tmp_path / "o")]
    assert main(["fit", *files, "--model.optimizer", "adamw_8bit"]) == 2
    assert message in capsys.readouterr().err


USABLE = (
    *("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts"),
    *("polynomial", "inverse_sqrt", "cosine_with_min_lr", "warmup_stable_decay"),
)
UNUSABLE = ("reduce_lr_on_plateau", "greedy")


@pytest.mark.parametrize("name", USABLE)
def test_a_schedule_rises_to_the_rate_and_no_higher(name: str) -> None:
    rates = rates_of(name, warmup_ratio=0.3, num_steps=10)
    assert rates[0] == 0.0
    assert max(rates) <= 1.0
    assert rates[3] == pytest.approx(1.0)  # three of ten steps warm up


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in UNUSABLE])
@pytest.mark.parametrize(("warmup_ratio", "num_steps"), [(1.0, 4), (0.1, 1), (0.95, 10)])
def test_a_run_may_end_before_its_warmup(name: str, warmup_ratio: float, num_steps: int) -> None:
    rates = rates_of(name, warmup_ratio=warmup_ratio, num_steps=num_steps)
    assert all(0 <= rate <= 1 for rate in rates)
    assert rates == sorted(rates)


def test_stable_decay_falls_in_the_last_tenth() -> None:
    """The last four of forty steps: (1 + cos(π i / 4)) / 2."""
    rates = rates_of("warmup_stable_decay", warmup_ratio=0.1, num_steps=40)
    assert rates[:4] == pytest.approx([0.0, 0.25, 0.5, 0.75])
    assert rates[4:37] == pytest.approx([1.0] * 33)
    assert rates[37:] == pytest.approx([0.853553, 0.5, 0.146447], rel=1e-5)


@pytest.mark.parametrize("name", ["cosine_with_min_lr", "cosine_warmup_with_min_lr"])
def test_a_cosine_with_a_minimum_ends_at_a_tenth(name: str) -> None:
    assert rates_of(name, warmup_ratio=0.0, num_steps=100)[-1] == pytest.approx(0.1, rel=5e-3)


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_schedule_that_needs_more_is_refused(name: str) -> None:
    assert name in SCHEDULES
    message = rf"--model\.lr_schedule {name} needs a validation metric"
    with pytest.raises(ConfigError, match=message):
        make_scheduler(name, optimizer_of_rate_one(), warmup_ratio=0.0, num_steps=10)


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.5])
def test_a_rate_below_where_a_schedule_ends_is_refused(warmup_ratio: float) -> None:
    with pytest.raises(ConfigError, match=r"--model\.lr_schedule polynomial cannot be used here"):
        Optimization(
            optimizer="adamw",
            learning_rate=1e-8,
            weight_decay=0.0,
            gradient_clip_norm=None,
            lr_schedule="polynomial",
            warmup_ratio=warmup_ratio,
        )


def rates_of(name: str, *, warmup_ratio: float, num_steps: int) -> list[float]:
    """The learning rate of every step, relative to `learning_rate`."""
    optimizer = optimizer_of_rate_one()
    scheduler = make_scheduler(name, optimizer, warmup_ratio=warmup_ratio, num_steps=num_steps)
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def optimizer_of_rate_one() -> torch.optim.Optimizer:
    parameter = nn.Parameter(torch.zeros(1))
    return make_optimizer("sgd", [("p", parameter)], learning_rate=1.0, weight_decay=0.0)


@pytest.mark.parametrize(
    ("schedule", "warmup_ratio", "trainer", "factors"),
    [
        ("constant", 0.0, {}, [1, 1, 1, 1]),
        ("constant", 0.5, {}, [0, 0.5, 1, 1]),
        ("linear", 0.0, {}, [1, 0.75, 0.5, 0.25]),
        ("linear", 0.25, {}, [0, 1, 2 / 3, 1 / 3]),
        ("cosine", 0.0, {}, [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]),
        ("linear", 0.0, {"max_steps": 2}, [1, 0.5]),
        ("linear", 0.0, {"max_steps": 5, "max_epochs": -1}, [1, 0.8, 0.6, 0.4, 0.2]),
        ("linear", 0.0, {"limit_train_batches": 2}, [1, 0.5]),
        ("linear", 0.0, {"limit_train_batches": 0.5, "max_epochs": 2}, [1, 0.75, 0.5, 0.25]),
    ],
)
def test_a_schedule_ends_with_the_run(
    schedule: str, warmup_ratio: float, trainer: dict[str, Any], factors: list[float]
) -> None:
    few = step_batch(Examples(LENGTHS[:2], [True, False]))
    module = make_module(lr_schedule=schedule, warmup_ratio=warmup_ratio)
    result = fit_steps(module, *[few] * 4, **trainer)
    expected = [0.05 * factor for factor in factors]
    assert [row["train/lr"] for row in result.rows] == pytest.approx(expected)
    # The rate of a row is the one its step was made with.
    if factors[0] == 0:
        assert result.rows[1]["train/loss"] == result.rows[0]["train/loss"]
