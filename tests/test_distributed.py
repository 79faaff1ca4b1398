"""Gradients of several ranks, and errors of one of them."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from kto_lightning import distributed
from kto_lightning.distributed import (
    explain_lost_rank,
    fill_missing_gradients,
    gradient_norm,
    raise_together,
    reaching_all,
)
from kto_lightning.errors import ConfigError, DataError, KTOError


@pytest.mark.parametrize("clip_norm", [None, 1.0, 100.0])
def test_the_norm_is_that_before_clipping(clip_norm: float | None) -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter()]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert gradient_norm(parameters, clip_norm).item() == pytest.approx(5.0)
    left = torch.cat([p.grad for p in parameters if p.grad is not None]).norm()
    assert left.item() == pytest.approx(1.0 if clip_norm == 1.0 else 5.0)


def test_every_trained_parameter_takes_part_and_counts_as_zero_without_a_gradient() -> None:
    used, unused, frozen = (nn.Parameter(torch.ones(2)) for _ in range(3))
    frozen.requires_grad_(False)
    accumulated = []
    nodes = [get_gradient_edge(parameter).node for parameter in (used, unused)]
    for node in nodes:  # DDP waits for them
        node.register_hook(lambda *_, node=node: accumulated.append(node))
    parameters = [used, unused, frozen]
    reaching_all((2.0 * used).sum(), parameters).backward()
    assert set(accumulated) == set(nodes)
    assert used.grad is not None
    assert used.grad.tolist() == [2.0, 2.0]
    assert unused.grad is None
    fill_missing_gradients(parameters)
    assert unused.grad is not None
    assert unused.grad.tolist() == [0.0, 0.0]
    assert frozen.grad is None


GLOO = "[transport/tcp/pair.cc:544] Connection closed by peer [10.0.0.2]:41234"


@pytest.mark.parametrize(("address", "where"), [("10.0.0.2", " on host beta"), ("10.0.0.22", "")])
def test_a_lost_rank_is_explained_with_its_host(
    address: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "_several", lambda: True)
    message = f"^another rank{where} has ended while this one waited for it"
    with pytest.raises(KTOError, match=message), explain_lost_rank({address: "beta"}):
        raise RuntimeError(GLOO)


@pytest.mark.parametrize(
    ("hosts", "failed", "expected"),
    [
        (("alpha", "beta"), {1}, "on host beta: no file."),
        (("alpha", "beta"), {0}, "on host alpha: no file."),
        (("alpha", "beta"), {0, 1}, "no file."),
        (("alpha", "alpha"), {1}, "no file."),
    ],
)
def test_an_error_of_one_rank_is_raised_on_all(
    hosts: tuple[str, str], failed: set[int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcome(rank: int) -> tuple[str, tuple[type[KTOError], str] | None]:
        return hosts[rank], (DataError, "no file.") if rank in failed else None

    monkeypatch.setattr(distributed, "gathered", lambda own: [outcome(0), outcome(1)])
    for rank in range(2):
        with pytest.raises(DataError) as raised:
            raise_together(DataError("no file.") if rank in failed else None)
        assert str(raised.value) == expected


def test_an_error_is_raised_without_ranks() -> None:
    raise_together(None)
    with pytest.raises(ConfigError, match="no"):
        raise_together(ConfigError("no"))
