"""The loop over tiles of logits, `[rows, columns]`: some tokens by a slice of the vocabulary.

The vocabulary is the outer loop: each slice of W is read (and cast, where the operands' type
differs from the parameter's) once per pass, and each slice of its gradient is written once.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from types import ModuleType

import torch
from torch import Tensor

from kto_kernels.linear_logps import torch_tiles
from kto_kernels.linear_logps.head import Head
from kto_kernels.linear_logps.plan import Plan, uses_triton
from kto_kernels.linear_logps.products import product
from kto_kernels.linear_logps.running import Running


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """The tensors and the plan of one call."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    head: Head
    plan: Plan

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0]

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    def operand(self) -> Tensor:
        """The hidden states in the products' type."""
        return self.hidden.to(self.plan.compute_dtype)

    def weight_slices(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Slices of the vocabulary: their columns, rows of W in the products' type, and bias."""
        for columns in self.plan.column_slices(self.vocabulary):
            bias = None if self.bias is None else self.bias[columns].float().contiguous()
            yield columns, self.weight[columns].to(self.plan.compute_dtype), bias


class Weights(Enum):
    """The use of a tile's exponentials, which a gradient needs."""

    NONE = "not written"
    TRANSIENT = "in memory that the next tile overwrites"
    KEPT = "in memory of their own"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """A tile that has been folded into the running log-sum-exp."""

    rows: slice
    columns: slice
    weight: Tensor
    """`[s, D]`: the slice of W in the products' type."""
    weights: Tensor
    """`[n, s]`: see `torch_tiles.fold_`; undefined with `Weights.NONE`."""
    shrink: Tensor
    """`[n]`: the factor for sums over earlier slices, see `torch_tiles.fold_`."""


class Buffers:
    """The memory of a tile, allocated once per pass and used by all its tiles."""

    def __init__(self, inputs: Inputs) -> None:
        plan = inputs.plan
        self._dtype = plan.compute_dtype
        self._device = inputs.hidden.device
        rows, columns = min(plan.rows, inputs.tokens), min(plan.columns, inputs.vocabulary)
        self._size = rows * columns
        self._products: Tensor | None = None
        self._weights: Tensor | None = None

    def products(self, rows: int, columns: int, *, fresh: bool = False) -> Tensor:
        """A float32 buffer `[rows, columns]`.

        The same memory at each call, unless it will hold the tile's weights too (float32) and
        `fresh` memory is wanted for them.
        """
        if fresh and self._dtype == torch.float32:
            return self._empty(rows * columns, torch.float32).view(rows, columns)
        if self._products is None:
            self._products = self._empty(self._size, torch.float32)
        return self._products[: rows * columns].view(rows, columns)

    def weights(self, products: Tensor, *, fresh: bool = False) -> Tensor:
        """A buffer for weights, `[rows, columns]` in the operands' type; `products` if float32."""
        if self._dtype == torch.float32:
            return products
        if fresh:
            return self._empty(products.numel(), self._dtype).view(products.shape)
        if self._weights is None:
            self._weights = self._empty(self._size, self._dtype)
        return self._weights[: products.numel()].view(products.shape)

    def _empty(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self._device)


def tile_operations(device: torch.device) -> ModuleType:
    """`triton_tiles` on CUDA and under Triton's interpreter, else `torch_tiles`."""
    if not uses_triton(device):
        return torch_tiles
    return importlib.import_module("kto_kernels.linear_logps.triton_tiles")


def fold_tiles(inputs: Inputs, running: Running, *, weights: Weights) -> Iterator[Tile]:
    """Fold every tile into `running`, and yield each after that."""
    operations, buffers = tile_operations(inputs.hidden.device), Buffers(inputs)
    hidden, fresh = inputs.operand(), weights is Weights.KEPT
    for columns, weight, bias in inputs.weight_slices():
        for rows in inputs.plan.row_slices(inputs.tokens):
            products = buffers.products(
                rows.stop - rows.start, columns.stop - columns.start, fresh=fresh
            )
            product(hidden[rows], weight.t(), out=products)
            wanted = weights is not Weights.NONE
            out = buffers.weights(products, fresh=fresh) if wanted else None
            shrink = operations.fold_(
                products,
                running.rows(rows),
                inputs.targets[rows],
                start=columns.start,
                bias=bias,
                head=inputs.head,
                weights=out,
            )
            yield Tile(
                rows=rows,
                columns=columns,
                weight=weight,
                weights=products if out is None else out,
                shrink=shrink,
            )
