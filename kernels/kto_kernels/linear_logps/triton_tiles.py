r"""Row-wise operations on one tile of logits, in Triton: one program per row, no atomics or locks.

The functions of `torch_tiles`, and documented there. A row of a tile is read from memory once: the
second pass over it (exponentials, after the maximum) reads it from the cache.

`no_type_check` excludes device code from the tests' import hook, which checks types at run time.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from kto_kernels.linear_logps.head import Head
from kto_kernels.linear_logps.running import Running
from kto_kernels.linear_logps.torch_tiles import finish_weights_

__all__ = ["finish_weights_", "fold_", "shrink_rows_", "unit_gradient_"]

MAX_BLOCK = 4096
"""Columns that one program holds at a time; not tuned."""

COMPILE = {"enable_fp_fusion": True}
"""Explicit, because its default changes in Triton 3.10 and with it the last bits of a result."""


@triton.jit
@no_type_check
def tanh(x):
    # Near 0 the quotient suffers from cancellation; the series is exact to float32 there.
    square = x * x
    series = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    shrunk = tl.exp(-2.0 * tl.abs(x))
    quotient = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(tl.abs(x) < 0.1, series, tl.where(x < 0.0, -quotient, quotient))


@triton.jit
@no_type_check
def load_logits(
    row_ptr, bias_ptr, columns, mask, scale, softcap, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr
):
    """The logits at some columns of a row, and tanh of the uncapped ones where they are capped."""
    z = tl.load(row_ptr + columns, mask=mask, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=mask, other=0.0)
    capped = z
    if CAPPED:
        capped = tanh(z * (scale / softcap))
        z = capped * softcap
    else:
        z = z * scale
    return z, capped


@triton.jit
@no_type_check
def _fold_kernel(
    products_ptr,
    weights_ptr,
    bias_ptr,
    targets_ptr,
    max_ptr,
    others_ptr,
    target_ptr,
    logit_sum_ptr,
    weighted_sum_ptr,
    shrink_ptr,
    start,
    width,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    STATISTICS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = products_ptr + row * width
    block = tl.arange(0, BLOCK)  # [BLOCK]
    target_column = tl.load(targets_ptr + row) - start
    inside = (target_column >= 0) & (target_column < width)

    # The target's logit, before weights overwrite the products.
    own, _own_capped = load_logits(
        row_ptr, bias_ptr, target_column, inside, scale, softcap, HAS_BIAS, CAPPED
    )
    tl.store(target_ptr + row, own, mask=inside)

    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    for offset in range(0, width, BLOCK):
        columns = offset + block
        mask = columns < width
        z, capped = load_logits(row_ptr, bias_ptr, columns, mask, scale, softcap, HAS_BIAS, CAPPED)
        highest = tl.maximum(highest, tl.where(mask, z, float("-inf")))
    before = tl.load(max_ptr + row)
    top = tl.maximum(before, tl.max(highest, axis=0))
    base = tl.where(top == float("-inf"), 0.0, top)  # −inf − (−inf) would be NaN
    shrink = tl.exp(before - base)

    others = tl.zeros([BLOCK], tl.float32)
    logit_sum = tl.zeros([BLOCK], tl.float32)
    weighted_sum = tl.zeros([BLOCK], tl.float32)
    for offset in range(0, width, BLOCK):
        columns = offset + block
        mask = columns < width
        z, capped = load_logits(row_ptr, bias_ptr, columns, mask, scale, softcap, HAS_BIAS, CAPPED)
        exps = tl.where(mask & (columns != target_column), tl.exp(z - base), 0.0)
        others += exps
        if STATISTICS:
            logit_sum += tl.where(mask, z, 0.0)
            weighted_sum += exps * tl.where(exps > 0.0, z, 0.0)
        if WEIGHTS:
            if CAPPED:
                exps = exps * (1.0 - capped * capped)
            out = weights_ptr + row * width + columns
            tl.store(out, exps.to(weights_ptr.dtype.element_ty), mask=mask)

    tl.store(max_ptr + row, top)
    tl.store(shrink_ptr + row, shrink)
    tl.store(others_ptr + row, tl.load(others_ptr + row) * shrink + tl.sum(others, axis=0))
    if STATISTICS:
        tl.store(logit_sum_ptr + row, tl.load(logit_sum_ptr + row) + tl.sum(logit_sum, axis=0))
        older = tl.load(weighted_sum_ptr + row) * shrink
        tl.store(weighted_sum_ptr + row, older + tl.sum(weighted_sum, axis=0))


@triton.jit
@no_type_check
def _unit_gradient_kernel(
    products_ptr,
    out_ptr,
    bias_ptr,
    targets_ptr,
    log_total_ptr,
    complement_ptr,
    start,
    width,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = columns < width
    row_ptr = products_ptr + row * width
    z, capped = load_logits(row_ptr, bias_ptr, columns, mask, scale, softcap, HAS_BIAS, CAPPED)
    gradient = -tl.exp(z - tl.load(log_total_ptr + row))
    target_column = tl.load(targets_ptr + row) - start
    gradient = tl.where(columns == target_column, tl.load(complement_ptr + row), gradient)
    if CAPPED:
        gradient = gradient * (1.0 - capped * capped)
    gradient = gradient * scale
    tl.store(out_ptr + row * width + columns, gradient.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def _shrink_rows_kernel(rows_ptr, factors_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    factor = tl.load(factors_ptr + row)
    # After a few slices the maximum rarely changes, and most rows need not be read.
    if factor != 1.0:
        mask = columns < width
        values = tl.load(rows_ptr + row * width + columns, mask=mask, other=0.0)
        tl.store(rows_ptr + row * width + columns, values * factor, mask=mask)


def fold_(
    products: Tensor,
    running: Running,
    targets: Tensor,
    *,
    start: int,
    bias: Tensor | None,
    head: Head,
    weights: Tensor | None,
) -> Tensor:
    """See `torch_tiles.fold_`."""
    rows, width = products.shape
    block, options = _row_launch(width)
    shrink = torch.empty(rows, dtype=torch.float32, device=products.device)
    _fold_kernel[(rows,)](
        products_ptr=products,
        weights_ptr=products if weights is None else weights,
        bias_ptr=bias,
        targets_ptr=targets,
        max_ptr=running.max,
        others_ptr=running.others,
        target_ptr=running.target,
        logit_sum_ptr=running.logit_sum,
        weighted_sum_ptr=running.weighted_sum,
        shrink_ptr=shrink,
        start=start,
        width=width,
        scale=float(head.logit_scale),
        softcap=float(head.softcap or 1.0),
        HAS_BIAS=bias is not None,
        CAPPED=head.softcap is not None,
        WEIGHTS=weights is not None,
        STATISTICS=running.statistics,
        BLOCK=block,
        **options,
    )
    return shrink


def unit_gradient_(
    products: Tensor,
    log_total: Tensor,
    complement: Tensor,
    targets: Tensor,
    *,
    start: int,
    bias: Tensor | None,
    head: Head,
    out: Tensor,
) -> Tensor:
    """See `torch_tiles.unit_gradient_`."""
    rows, width = products.shape
    block, options = _row_launch(width)
    _unit_gradient_kernel[(rows, triton.cdiv(width, block))](
        products_ptr=products,
        out_ptr=out,
        bias_ptr=bias,
        targets_ptr=targets,
        log_total_ptr=log_total,
        complement_ptr=complement,
        start=start,
        width=width,
        scale=float(head.logit_scale),
        softcap=float(head.softcap or 1.0),
        HAS_BIAS=bias is not None,
        CAPPED=head.softcap is not None,
        BLOCK=block,
        **options,
    )
    return out


def shrink_rows_(rows: Tensor, factors: Tensor) -> Tensor:
    """See `torch_tiles.shrink_rows_`; `rows` is contiguous."""
    count, width = rows.shape
    block, options = _row_launch(width)
    _shrink_rows_kernel[(count, triton.cdiv(width, block))](
        rows_ptr=rows, factors_ptr=factors, width=width, BLOCK=block, **options
    )
    return rows


def _row_launch(width: int) -> tuple[int, dict[str, Any]]:
    """Block size, and launch options: 16 columns a thread at the largest block."""
    block = min(triton.next_power_of_2(width), MAX_BLOCK)
    return block, {"num_warps": min(max(block // 512, 1), 8), **COMPILE}
