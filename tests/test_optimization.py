"""What decays, which schedules can be used, and the gradient's norm."""

import pytest
import torch
from torch import nn

from kto_lightning.errors import ConfigError
from kto_lightning.optimization import (
    SCHEDULES,
    gradient_norm,
    make_optimizer,
    make_scheduler,
    require_number,
)
from tests.factories import make_model


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


USABLE = ("constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt")
UNUSABLE = {
    "cosine_with_min_lr": "cannot be used here",
    "warmup_stable_decay": "cannot be used here",
    "reduce_lr_on_plateau": "waits for a validation metric",
}


@pytest.mark.parametrize("name", USABLE)
def test_a_schedule_rises_to_the_rate_and_no_higher(name: str) -> None:
    optimizer = optimizer_of_rate_one()
    scheduler = make_scheduler(name, optimizer, warmup_ratio=0.3, num_steps=10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == 0.0
    assert max(rates) <= 1.0
    assert rates[3] == pytest.approx(1.0)  # three of ten steps warm up


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_schedule_that_needs_more_is_refused(name: str) -> None:
    assert name in SCHEDULES
    with pytest.raises(ConfigError, match=rf"--model\.lr_schedule {name} {UNUSABLE[name]}"):
        make_scheduler(name, optimizer_of_rate_one(), warmup_ratio=0.0, num_steps=10)


def optimizer_of_rate_one() -> torch.optim.Optimizer:
    parameter = nn.Parameter(torch.zeros(1))
    return make_optimizer("sgd", [("p", parameter)], learning_rate=1.0, weight_decay=0.0)


@pytest.mark.parametrize("clip_norm", [None, 1.0, 100.0])
def test_the_norm_is_that_before_clipping(clip_norm: float | None) -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter()]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert gradient_norm(parameters, clip_norm).item() == pytest.approx(5.0)
    left = torch.cat([p.grad for p in parameters if p.grad is not None]).norm()
    assert left.item() == pytest.approx(1.0 if clip_norm == 1.0 else 5.0)


def test_the_bounds_of_numbers() -> None:
    require_number("x", 0.0)
    require_number("x", 1.0, most=1.0)
    for value, limits in ((-1.0, {}), (0.0, {"above": 0.0}), (2.0, {"most": 1.0})):
        with pytest.raises(ConfigError, match=r"--model\.x must be"):
            require_number("x", value, **limits)
