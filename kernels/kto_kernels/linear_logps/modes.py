r"""Forward and backward of the four modes (`plan.Mode`).

With m the largest logit of a row, $k_v = e^{z_v - m} c_v$ but 0 at the target y,
$c_v = \partial z_v / \partial a_v / s$, $T = \sum_v e^{z_v - m}$ and $R = T - e^{z_y - m}$:

$$\frac{\partial \log p(y)}{\partial a_v} = \frac{s}{T}
  \begin{cases} c_y R & v = y \\ -k_v & v \ne y \end{cases}
\qquad
E = \frac{\partial \log p(y)}{\partial h}
  = \frac{s}{T} \Bigl( c_y R \, W_y - \sum_v k_v W_v \Bigr).$$

Neither depends on the loss: ∂loss/∂log p is one factor per row, known only in the backward.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kto_kernels.linear_logps.plan import Needs
from kto_kernels.linear_logps.products import add_product, product
from kto_kernels.linear_logps.running import Finished, Running
from kto_kernels.linear_logps.tiles import Buffers, Inputs, Weights, fold_tiles, tile_operations


@dataclass(kw_only=True, slots=True)
class Forward:
    """Results of a forward pass, per row; float32 unless stated otherwise."""

    logps: Tensor
    log_total: Tensor
    complement: Tensor
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    hidden_gradient: Tensor | None = None
    """E, `[N, D]`, in the narrower of the hidden states' and the products' type (frozen head)."""
    tiles: list[Tensor] = field(default_factory=list)
    """∂ log p / ∂a, `[N, V]` cut into tiles, in the products' type (kept)."""


def plain_forward(inputs: Inputs, *, statistics: bool) -> Forward:
    """Log-probs alone: for a gradient-free pass, or one whose backward recomputes logits. 1 G."""
    running = Running.start(inputs.tokens, inputs.hidden.device, statistics=statistics)
    for _ in fold_tiles(inputs, running, weights=Weights.NONE):
        pass
    return _forward(inputs, running, running.finish(inputs.head))


def fused_logps(inputs: Inputs) -> Tensor:
    """Log-probs alone, from the fused kernel. 1 G."""
    fused = importlib.import_module("kto_kernels.linear_logps.fused")  # imports Triton
    bias = None if inputs.bias is None else inputs.bias.float().contiguous()
    hidden = inputs.operand().contiguous()
    return fused.fused_logps(hidden, inputs.weight, inputs.targets, bias, inputs.head)


def frozen_head_forward(inputs: Inputs, *, statistics: bool) -> Forward:
    """Log-probs and E. 2 G; no matrix product is left for the backward."""
    running = Running.start(inputs.tokens, inputs.hidden.device, statistics=statistics)
    shape, device = inputs.hidden.shape, inputs.hidden.device
    total = torch.zeros(shape, dtype=torch.float32, device=device)  # Σ k_v W_v, then E
    operations = tile_operations(device)
    for tile in fold_tiles(inputs, running, weights=Weights.TRANSIENT):
        operations.shrink_rows_(total[tile.rows], tile.shrink)
        add_product(total[tile.rows], tile.weights, tile.weight)
    finished = running.finish(inputs.head)
    factor = inputs.head.logit_scale / finished.total
    at_target = factor * finished.target_slope * running.others
    total.mul_(-factor[:, None])
    # For a target outside the vocabulary `at_target` is NaN; the clamp is for the index alone.
    target_rows = inputs.weight[inputs.targets.clamp(0, inputs.vocabulary - 1)]
    total.addcmul_(target_rows.float(), at_target[:, None])
    forward = _forward(inputs, running, finished)
    narrower = min(inputs.hidden.dtype, inputs.plan.compute_dtype, key=lambda dtype: dtype.itemsize)
    forward.hidden_gradient = total.to(narrower)
    return forward


def kept_forward(inputs: Inputs, *, statistics: bool) -> Forward:
    """Log-probs and the unit gradients of all logits. 1 G, and 2 G in the backward."""
    running = Running.start(inputs.tokens, inputs.hidden.device, statistics=statistics)
    tiles, maxima = [], []
    for tile in fold_tiles(inputs, running, weights=Weights.KEPT):
        tiles.append(tile)
        maxima.append(running.max[tile.rows].clone())
    finished = running.finish(inputs.head)
    operations = tile_operations(inputs.hidden.device)
    factor = inputs.head.logit_scale / finished.total
    at_target = inputs.head.logit_scale * finished.target_slope * finished.complement
    for tile, maximum in zip(tiles, maxima, strict=True):
        # Each tile holds e^(z − maximum so far): correct it to the final maximum.
        correction = torch.exp(maximum - finished.base[tile.rows])
        operations.finish_weights_(
            tile.weights,
            -factor[tile.rows] * correction,
            at_target[tile.rows],
            inputs.targets[tile.rows],
            tile.columns.start,
        )
    forward = _forward(inputs, running, finished)
    forward.tiles = [tile.weights for tile in tiles]
    return forward


def trained_backward(
    inputs: Inputs,
    gradient: Tensor,
    needs: Needs,
    *,
    log_total: Tensor,
    complement: Tensor,
    tiles: Sequence[Tensor],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    r"""∂loss/∂h, ∂loss/∂W, ∂loss/∂b of a trained head, from ∂loss/∂log p, `[N]` float32.

    With $U = \partial \log p / \partial a$, kept or recomputed:
    $\partial h = g \odot (U W)$ and $\partial W = U^\top (g \odot h)$.
    """
    gradients = _TrainedGradients(inputs, gradient, needs)
    kept = iter(tiles)
    recomputed = None if tiles else _Recomputed(inputs, log_total, complement)
    for columns, weight, bias in inputs.weight_slices():
        for rows in inputs.plan.row_slices(inputs.tokens):
            unit = (
                next(kept)
                if recomputed is None
                else recomputed.tile(rows, columns.start, weight, bias)
            )
            gradients.add(unit, rows, columns, weight)
    return gradients.finish()


class _Recomputed:
    """Unit gradients of a tile, from recomputed logits."""

    def __init__(self, inputs: Inputs, log_total: Tensor, complement: Tensor) -> None:
        self._inputs = inputs
        self._log_total = log_total
        self._complement = complement
        self._operand = inputs.operand()
        self._buffers = Buffers(inputs)
        self._operations = tile_operations(inputs.hidden.device)

    def tile(self, rows: slice, start: int, weight: Tensor, bias: Tensor | None) -> Tensor:
        products = self._buffers.products(rows.stop - rows.start, weight.shape[0])
        return self._operations.unit_gradient_(
            product(self._operand[rows], weight.t(), out=products),
            self._log_total[rows],
            self._complement[rows],
            self._inputs.targets[rows],
            start=start,
            bias=bias,
            head=self._inputs.head,
            out=self._buffers.weights(products),
        )


class _TrainedGradients:
    """Sums of the three gradients over tiles, which arrive slice by slice of the vocabulary."""

    def __init__(self, inputs: Inputs, gradient: Tensor, needs: Needs) -> None:
        hidden, weight, bias = inputs.hidden, inputs.weight, inputs.bias
        self._inputs = inputs
        self._gradient = gradient
        # float16 overflows at 65504, and a loss scaler makes gradients that large. So products take
        # the gradient divided by its largest value, and ∂W is multiplied by it at the end.
        half = inputs.plan.compute_dtype == torch.float16 and inputs.tokens > 0
        self._unit = gradient.abs().amax().clamp(min=1e-30) if half else None
        factors = gradient if self._unit is None else gradient / self._unit
        self._scaled = (factors[:, None] * hidden).to(inputs.plan.compute_dtype)
        self._hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs.hidden else None
        fill = torch.zeros_like if inputs.tokens == 0 else torch.empty_like
        self._weight = fill(weight) if needs.weight else None
        self._weight_slice = torch.empty(0)  # float32 sum over the rows of one slice of ∂W
        self._bias = None
        if needs.bias and bias is not None:
            self._bias = torch.zeros_like(bias, dtype=torch.float32)

    def add(self, unit: Tensor, rows: slice, columns: slice, weight: Tensor) -> None:
        """Add the share of one tile of unit gradients, `[n, s]`."""
        if self._hidden is not None:
            add_product(self._hidden[rows], unit, weight)
        if self._weight is not None:
            self._add_to_weight(unit.t(), rows, self._weight[columns])
        if self._bias is not None:
            self._bias[columns] += (unit * self._gradient[rows, None]).sum(dim=0)

    def _add_to_weight(self, unit: Tensor, rows: slice, out: Tensor) -> None:
        first, last = rows.start == 0, rows.stop == self._inputs.tokens
        if first and last:
            product(unit, self._scaled, out=out)
        elif first:
            self._weight_slice = torch.empty_like(out, dtype=torch.float32)
            product(unit, self._scaled[rows], out=self._weight_slice)
        else:
            add_product(self._weight_slice, unit, self._scaled[rows])
        if last and not first:
            out.copy_(self._weight_slice)
        if last and self._unit is not None:
            out.mul_(self._unit)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """∂h, ∂W and ∂b, each in its input's type; None where not needed."""
        hidden, bias = self._hidden, self._bias
        if hidden is not None:
            hidden = hidden.mul_(self._gradient[:, None]).to(self._inputs.hidden.dtype)
        if bias is not None and self._inputs.bias is not None:
            bias = bias.to(self._inputs.bias.dtype)
        return hidden, self._weight, bias


def _forward(inputs: Inputs, running: Running, finished: Finished) -> Forward:
    return Forward(
        logps=finished.logps,
        log_total=finished.log_total,
        complement=finished.complement,
        entropy=running.entropy(finished) if running.statistics else None,
        mean_logit=None if running.logit_sum is None else running.logit_sum / inputs.vocabulary,
    )
