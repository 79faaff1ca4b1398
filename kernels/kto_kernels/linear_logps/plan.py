"""The choice of a call's mode and of the size of its tiles.

It depends on shapes and the device alone, neither on values nor on the memory that is free: the
same inputs give the same bits.
"""

import importlib.util
import os
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

BUDGET_VARIABLE = "KTO_KERNELS_LOGITS_MIB"
"""Environment variable: MiB in which a trained head may keep the gradients of its logits."""

MIB = 2**20

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernels, on a CPU, for tests."""


class Mode(Enum):
    """The four ways to compute a call; G is one matrix product of 2 N D V operations."""

    GRADIENT_FREE = "gradient-free"
    """1 G."""
    FROZEN_HEAD = "frozen head"
    """2 G, all in the forward: only ∂ log p / ∂h, `[N, D]`, is kept."""
    KEPT = "trained head, kept"
    """3 G: `[N, V]` unit gradients are kept for the backward."""
    RECOMPUTED = "trained head, recomputed"
    """4 G: the backward recomputes the logits, one vocabulary slice at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """The inputs that require a gradient."""

    hidden: bool
    weight: bool
    bias: bool

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> "Needs":
        enabled = torch.is_grad_enabled()
        return cls(
            hidden=enabled and hidden.requires_grad,
            weight=enabled and weight.requires_grad,
            bias=enabled and bias is not None and bias.requires_grad,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Mode, type and tiles of one call."""

    mode: Mode
    compute_dtype: torch.dtype
    """The type that both operands of every matrix product are cast to, one slice at a time."""
    rows: int
    """Most tokens of a tile."""
    columns: int
    """Most vocabulary entries of a tile."""
    fused: bool = False
    """Gradient-free only: one Triton kernel instead of tiles."""

    def row_slices(self, tokens: int) -> list[slice]:
        return _slices(tokens, self.rows)

    def column_slices(self, vocabulary: int) -> list[slice]:
        return _slices(vocabulary, self.columns)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dispatch:
    """One row of the dispatch table: the choices for CUDA devices up to a hidden width."""

    max_width: int | None
    """Largest D that the row applies to; None: no limit."""
    fused: bool
    """Gradient-free passes through the fused kernel, instead of cuBLAS tiles and row kernels."""
    tile_mib: int
    """Size of the float32 tile."""
    measured: str | None
    """The result file that the choice is based on; None: an estimate."""


DISPATCH = (
    # Estimates (kernels/README.md) until `benchmarks/linear_logps.py` has run on a GPU: at small D
    # a tile's memory traffic should cost more time than cuBLAS saves over the fused kernel.
    Dispatch(max_width=1024, fused=True, tile_mib=512, measured=None),
    Dispatch(max_width=None, fused=False, tile_mib=512, measured=None),
)

CUDA_TILE_ROWS = 4096
CUDA_TILE_SHARE = 64
"""A float32 tile takes at most 1/64 of the device's memory: 128 MiB of 8 GiB."""
CUDA_BUDGET_SHARE = 16
"""A trained head may keep 1/16 of the device's memory until backward."""
CPU_TILE_ROWS = 512
CPU_TILE_ELEMENTS = 2**21
"""8 MiB in float32: within 5% of the fastest size at N = 256, D = 896, on one core."""
CPU_TILE_COLUMNS = (1024, 8192)
CPU_BUDGET_MIB = 256


def uses_triton(device: torch.device) -> bool:
    """Whether this device runs the Triton kernels."""
    return HAS_TRITON and (device.type == "cuda" or INTERPRETED)


def dispatch_for(width: int) -> Dispatch:
    """The table's row for a hidden width."""
    return next(row for row in DISPATCH if row.max_width is None or width <= row.max_width)


def budget_bytes(device: torch.device) -> int:
    """Bytes that a trained head may keep until backward: a fixed share of the device's memory.

    Raises:
        ValueError: if the environment variable is no whole number.
    """
    if (given := os.environ.get(BUDGET_VARIABLE)) is not None:
        if not given.isdecimal():
            raise ValueError(f"{BUDGET_VARIABLE} must be a whole number of MiB, got {given!r}")
        return int(given) * MIB
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // CUDA_BUDGET_SHARE
    return CPU_BUDGET_MIB * MIB


def choose_mode(needs: Needs, *, tokens: int, vocabulary: int, itemsize: int, budget: int) -> Mode:
    """The mode with the fewest products that computes the needed gradients within the budget."""
    if not (needs.hidden or needs.weight or needs.bias):
        return Mode.GRADIENT_FREE
    if not (needs.weight or needs.bias):
        return Mode.FROZEN_HEAD
    fits = tokens * vocabulary * itemsize <= budget
    return Mode.KEPT if fits else Mode.RECOMPUTED


def make_plan(hidden: Tensor, weight: Tensor, needs: Needs, *, statistics: bool = False) -> Plan:
    """The plan of one call."""
    device, (vocabulary, width), tokens = hidden.device, weight.shape, hidden.shape[0]
    dtype = compute_dtype(hidden, weight)
    mode = choose_mode(
        needs,
        tokens=tokens,
        vocabulary=vocabulary,
        itemsize=dtype.itemsize,
        budget=budget_bytes(device),
    )
    if device.type == "cuda":
        chosen = dispatch_for(width)
        memory = torch.cuda.get_device_properties(device).total_memory
        rows, columns = cuda_tile(chosen, tokens=tokens, vocabulary=vocabulary, memory=memory)
        fused = (
            chosen.fused
            and mode is Mode.GRADIENT_FREE
            and not statistics
            and uses_triton(device)
            and _suits_fused(weight, dtype)
        )
        return Plan(mode=mode, compute_dtype=dtype, rows=rows, columns=columns, fused=fused)
    rows = _even(tokens, CPU_TILE_ROWS)
    low, high = CPU_TILE_COLUMNS
    columns = _even(vocabulary, min(max(CPU_TILE_ELEMENTS // rows, low), high))
    return Plan(mode=mode, compute_dtype=dtype, rows=rows, columns=columns)


def cuda_tile(chosen: Dispatch, *, tokens: int, vocabulary: int, memory: int) -> tuple[int, int]:
    """Rows and columns of a tile: the table's size, or a small device's share of its memory."""
    rows = _even(tokens, CUDA_TILE_ROWS)
    size = min(chosen.tile_mib * MIB, memory // CUDA_TILE_SHARE)
    return rows, _even(vocabulary, size // (4 * rows))


def _suits_fused(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the fused kernel can read this weight, in half precision.

    A weight that has to be cast or copied first would be cast whole, which tiles avoid; and float32
    products do not use the tensor cores that make the kernel fast.
    """
    return weight.dtype == dtype != torch.float32 and weight.is_contiguous()


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The type of the matrix products: autocast's, else the operands'.

    float32 instead on a CPU without instructions for that type, where bfloat16 products take seven
    times as long.

    Raises:
        TypeError: if the operands differ in type outside autocast, or are neither float32,
            bfloat16 nor float16.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    elif hidden.dtype == weight.dtype:
        dtype = hidden.dtype
    else:
        raise TypeError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}; "
            "cast one of them or call under torch.autocast"
        )
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"hidden and weight must be float32, bfloat16 or float16, got {dtype}")
    if device == "cpu" and dtype != torch.float32 and not _cpu_multiplies(dtype):
        return torch.float32
    return dtype


def _cpu_multiplies(dtype: torch.dtype) -> bool:
    # Private before PyTorch 2.13. If they are missing, float32 products are slower but correct.
    if dtype == torch.bfloat16:
        return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return getattr(torch.cpu, "_is_amx_fp16_supported", lambda: False)()


def _even(total: int, most: int) -> int:
    """Size of the parts of `total` cut evenly: multiples of 64, of about `most` at most."""
    parts = -(-total // max(most, 64))
    if parts <= 1:
        return max(total, 1)
    return -(-total // parts // 64) * 64


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
