"""Tensors of several ranks: the gradient norm."""

import pytest
import torch
from torch import nn

from kto_lightning.distributed import gradient_norm


@pytest.mark.parametrize("clip_norm", [None, 1.0, 100.0])
def test_the_norm_is_that_before_clipping(clip_norm: float | None) -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter()]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert gradient_norm(parameters, clip_norm).item() == pytest.approx(5.0)
    left = torch.cat([p.grad for p in parameters if p.grad is not None]).norm()
    assert left.item() == pytest.approx(1.0 if clip_norm == 1.0 else 5.0)
