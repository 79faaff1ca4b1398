"""Operations of matrix products and convolutions, counted by PyTorch's dispatcher."""

from math import prod
from typing import Any

import torch
from linear_logps import addmm
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

ATEN = torch.ops.aten


def counter() -> FlopCounterMode:
    """Counts all matrix products and convolutions. PyTorch's own table lacks CPU attention,
    `addmm_` and experts' grouped products, and counts the backward of a convolution in groups, such
    as those of one channel in state-space layers, as if every channel met every other."""
    attention = ATEN._scaled_dot_product_flash_attention_for_cpu
    backward = ATEN._scaled_dot_product_flash_attention_for_cpu_backward

    def forward_count(query, key, value, *_, **__) -> int:
        return sdpa_flop_count(query, *_one_per_query_head(query, key, value))

    def backward_count(gradient, query, key, value, *_, **__) -> int:
        return sdpa_backward_flop_count(gradient, query, *_one_per_query_head(query, key, value))

    formulas = {
        attention: forward_count,
        backward: backward_count,
        ATEN.addmm_: addmm,
        ATEN._grouped_mm: _grouped_products,
        ATEN.convolution_backward: _convolution_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _grouped_products(left: torch.Size, right: torch.Size, *_: Any, **__: Any) -> int:
    """Rows of `left`, cut into groups, times a matrix each; or the gradient of these matrices."""
    assert 2 in (len(left), len(right))
    return 2 * left[-2] * left[-1] * right[-1]


def _convolution_backward(
    gradient: torch.Size, inputs: torch.Size, weight: torch.Size, *others: Any, **__: Any
) -> int:
    """For the inputs as for the weight, as many products as in forward: every position of the
    outputs meets the weight once."""
    transposed, _, _, output_mask = others[4:]
    positions = gradient[0] * prod((inputs if transposed else gradient)[2:])
    return 2 * positions * prod(weight) * sum(output_mask[:2])


def _one_per_query_head(query, *keys_and_values) -> list[torch.Size]:
    """Shapes [batch, heads, length, width] of keys and values as if no query heads shared them:
    products are as many, and PyTorch 2.11 refuses to count grouped heads."""
    return [torch.Size((shape[0], query[1], *shape[2:])) for shape in keys_and_values]
