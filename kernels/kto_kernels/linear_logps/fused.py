r"""Log-probs from hidden states in one Triton kernel that writes no logit to memory.

$$\log p(y_t) = z_{y_t} - \log \sum_v e^{z_v}, \quad z = f(W h_t + b)$$

Each program owns a block of tokens and one of a fixed number of splits of the vocabulary; it walks
the split's blocks, multiplies, and folds each `[tokens, vocabulary]` block of float32 accumulators
into a running maximum, sum and target logit. A second kernel merges the splits in their order. No
locks, no atomics: the same inputs give the same bits.

For gradient-free passes only. A pass whose backward recomputes logits has to take its log-sum-exp
from the same logits, to the bit, so it uses tiles.
"""

from dataclasses import dataclass
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from kto_kernels.linear_logps.head import Head
from kto_kernels.linear_logps.triton_tiles import COMPILE, tanh


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """Block sizes and launch options of a compiled kernel."""

    tokens: int
    vocabulary: int
    width: int
    num_warps: int
    num_stages: int
    descriptors: bool
    """Load operands with the tensor memory accelerator (compute capability 9.0 and higher)."""

    def options(self) -> dict[str, Any]:
        """Launch options besides the kernel's arguments."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **COMPILE}


# Not tuned: compiled for sm_80, sm_90 and sm_100 without spills, but not timed on any of them.
HOPPER = Blocks(tokens=128, vocabulary=128, width=64, num_warps=8, num_stages=4, descriptors=True)
AMPERE = Blocks(tokens=128, vocabulary=128, width=32, num_warps=8, num_stages=3, descriptors=False)
FLOAT32 = Blocks(tokens=64, vocabulary=64, width=32, num_warps=4, num_stages=2, descriptors=False)


@triton.jit
@no_type_check
def _partial_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    max_ptr,
    sum_ptr,
    target_ptr,
    tokens,
    vocabulary,
    width,
    split_size,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    split = tl.program_id(1)
    first_token = tl.program_id(0) * BLOCK_T
    rows = first_token.to(tl.int64) + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    row_mask = rows < tokens
    targets = tl.load(targets_ptr + rows, mask=row_mask, other=-1)
    if DESCRIPTORS:
        hidden_blocks = tl.make_tensor_descriptor(
            hidden_ptr, shape=[tokens, width], strides=[width, 1], block_shape=[BLOCK_T, BLOCK_D]
        )
        weight_blocks = tl.make_tensor_descriptor(
            weight_ptr,
            shape=[vocabulary, width],
            strides=[width, 1],
            block_shape=[BLOCK_V, BLOCK_D],
        )
    highest = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    own = tl.full([BLOCK_T], float("-inf"), tl.float32)
    start = split * split_size
    for first in range(start, min(start + split_size, vocabulary), BLOCK_V):
        columns = first + tl.arange(0, BLOCK_V)  # [BLOCK_V]
        column_mask = columns < vocabulary
        z = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for offset in range(0, width, BLOCK_D):
            if DESCRIPTORS:
                h = hidden_blocks.load([first_token, offset])
                w = weight_blocks.load([first, offset])
            else:
                depth = offset + tl.arange(0, BLOCK_D)  # [BLOCK_D]
                depth_mask = depth < width
                h = tl.load(
                    hidden_ptr + rows[:, None] * width + depth[None, :],
                    mask=row_mask[:, None] & depth_mask[None, :],
                    other=0.0,
                )  # [BLOCK_T, BLOCK_D]
                w = tl.load(
                    weight_ptr + columns[:, None].to(tl.int64) * width + depth[None, :],
                    mask=column_mask[:, None] & depth_mask[None, :],
                    other=0.0,
                )  # [BLOCK_V, BLOCK_D]
            z = tl.dot(h, w.T, z, input_precision="ieee")
        if HAS_BIAS:
            z += tl.load(bias_ptr + columns, mask=column_mask, other=0.0)[None, :]
        z = softcap * tanh(z * (scale / softcap)) if CAPPED else z * scale
        z = tl.where(column_mask[None, :], z, float("-inf"))
        found = tl.where(columns[None, :] == targets[:, None], z, float("-inf"))
        own = tl.maximum(own, tl.max(found, axis=1))
        top = tl.maximum(highest, tl.max(z, axis=1))
        base = tl.where(top == float("-inf"), 0.0, top)
        total = total * tl.exp(highest - base) + tl.sum(tl.exp(z - base[:, None]), axis=1)
        highest = top
    out = rows * tl.num_programs(1) + split
    tl.store(max_ptr + out, highest, mask=row_mask)
    tl.store(sum_ptr + out, total, mask=row_mask)
    tl.store(target_ptr + out, own, mask=row_mask)


@triton.jit
@no_type_check
def _merge_kernel(
    max_ptr,
    sum_ptr,
    target_ptr,
    targets_ptr,
    logps_ptr,
    tokens,
    vocabulary,
    NUM_SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    mask = rows < tokens
    highest = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    own = tl.full([BLOCK_T], float("-inf"), tl.float32)
    for split in tl.static_range(NUM_SPLITS):
        at = rows * NUM_SPLITS + split
        split_max = tl.load(max_ptr + at, mask=mask, other=float("-inf"))
        top = tl.maximum(highest, split_max)
        base = tl.where(top == float("-inf"), 0.0, top)
        part = tl.load(sum_ptr + at, mask=mask, other=0.0)
        total = total * tl.exp(highest - base) + part * tl.exp(split_max - base)
        own = tl.maximum(own, tl.load(target_ptr + at, mask=mask, other=float("-inf")))
        highest = top
    base = tl.where(highest == float("-inf"), 0.0, highest)
    targets = tl.load(targets_ptr + rows, mask=mask, other=0)
    known = (targets >= 0) & (targets < vocabulary)
    logps = own - base - tl.log(tl.where(mask, total, 1.0))
    logps = tl.where(known, logps, float("nan"))
    tl.store(logps_ptr + rows, logps, mask=mask)


def choose_blocks(hidden: Tensor) -> Blocks:
    """Blocks for the device and the operands' type."""
    if hidden.dtype == torch.float32:
        return FLOAT32
    hopper = hidden.is_cuda and torch.cuda.get_device_capability(hidden.device) >= (9, 0)
    aligned = (hidden.stride(0) * hidden.element_size()) % 16 == 0  # what the accelerator requires
    return HOPPER if hopper and aligned else AMPERE


def choose_splits(tokens: int, vocabulary: int, blocks: Blocks, num_processors: int) -> int:
    """The number of splits with about one program per processor, from shapes alone."""
    token_blocks = triton.cdiv(tokens, blocks.tokens)
    return max(
        1, min(num_processors // token_blocks, triton.cdiv(vocabulary, blocks.vocabulary), 32)
    )


def fused_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    head: Head,
    *,
    blocks: Blocks | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """log p(target) of every row, `[N]` float32, without a gradient.

    Args:
        hidden: `[N, D]`, contiguous, in the type of the products.
        weight: `[V, D]`, contiguous, likewise.
        bias: `[V]` float32 or None.
    """
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    logps = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
    if tokens == 0:
        return logps
    blocks = blocks or choose_blocks(hidden)
    num_splits = num_splits or choose_splits(tokens, vocabulary, blocks, _processors(hidden.device))
    partial = torch.empty(3, tokens, num_splits, dtype=torch.float32, device=hidden.device)
    _launch_partial(hidden, weight, targets, bias, head, blocks, partial)
    _merge_kernel[(triton.cdiv(tokens, 128),)](
        max_ptr=partial[0],
        sum_ptr=partial[1],
        target_ptr=partial[2],
        targets_ptr=targets,
        logps_ptr=logps,
        tokens=tokens,
        vocabulary=vocabulary,
        NUM_SPLITS=num_splits,
        BLOCK_T=128,
        **COMPILE,
    )
    return logps


def _launch_partial(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    head: Head,
    blocks: Blocks,
    partial: Tensor,
) -> None:
    """Fill `partial`: maximum, sum and target logit, `[3, N, splits]` float32."""
    (tokens, width), vocabulary = hidden.shape, weight.shape[0]
    num_splits = partial.shape[2]
    # Splits are whole blocks.
    split_blocks = triton.cdiv(triton.cdiv(vocabulary, num_splits), blocks.vocabulary)
    if blocks.descriptors:
        triton.set_allocator(_workspace)
    _partial_kernel[(triton.cdiv(tokens, blocks.tokens), num_splits)](
        hidden_ptr=hidden,
        weight_ptr=weight,
        bias_ptr=bias,
        targets_ptr=targets,
        max_ptr=partial[0],
        sum_ptr=partial[1],
        target_ptr=partial[2],
        tokens=tokens,
        vocabulary=vocabulary,
        width=width,
        split_size=split_blocks * blocks.vocabulary,
        scale=float(head.logit_scale),
        softcap=float(head.softcap or 1.0),
        HAS_BIAS=bias is not None,
        CAPPED=head.softcap is not None,
        DESCRIPTORS=blocks.descriptors,
        BLOCK_T=blocks.tokens,
        BLOCK_V=blocks.vocabulary,
        BLOCK_D=blocks.width,
        **blocks.options(),
    )


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # any number: the interpreter runs one program after another
    return torch.cuda.get_device_properties(device).multi_processor_count


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the tensor descriptors that a kernel makes, in the form of Triton's allocators."""
    return torch.empty(size, device="cuda", dtype=torch.int8)
