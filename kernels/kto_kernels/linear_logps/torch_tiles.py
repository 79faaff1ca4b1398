r"""Row-wise operations on one tile of logits, in PyTorch: for the CPU, and without Triton.

A tile is `[rows, columns]`: some tokens by a slice of the vocabulary. `triton_tiles` has the same
functions as Triton kernels. Both work in place, without device synchronisation.
"""

import torch
from torch import Tensor

from kto_kernels.linear_logps.head import Head
from kto_kernels.linear_logps.running import Running


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
    r"""Fold a tile into the running log-sum-exp of its rows.

    The sum omits the target's exponential: 1 − p(target) is then a quotient of sums and not a
    difference, which would be 0 for tokens that the model is sure of.

    Args:
        products: `[n, s]` float32, W h without bias; overwritten.
        running: the rows' state; updated.
        targets: `[n]`, indices into the whole vocabulary, of which `start` is the tile's first.
        bias: `[s]` or None.
        weights: where to write $e^{z_v - m} \, \partial z_v / \partial a_v / s$ with a 0 at the
            target, `[n, s]`; may be `products` itself; None if no gradient is needed.

    Returns:
        `[n]` float32: e^(old maximum − new maximum), the factor for all older sums.
    """
    logits, slope = head.transform_(products, bias, want_slope=weights is not None)
    column, inside = _locate(targets, start, logits.shape[1])
    found = logits.gather(1, column).squeeze(1)
    running.target.copy_(torch.where(inside, found, running.target))
    plain_logits = logits.clone() if running.statistics else None

    base, shrink = _raise_maximum_(running, logits.amax(dim=1))
    exps = logits.sub_(base[:, None]).exp_()
    _set_column_(exps, column, inside, torch.zeros_like(shrink))
    running.others.mul_(shrink).add_(exps.sum(dim=1))
    if plain_logits is not None:
        running.add_statistics_(plain_logits, exps, shrink)
    if weights is not None:
        weighted = exps if slope is None else exps.mul_(slope)
        if weights is not weighted:
            weights.copy_(weighted)
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
    r"""$\partial \log p(y_t) / \partial a_v = (1[v = y_t] - p_v) \, \partial z_v / \partial a_v$.

    Args:
        products: `[n, s]` float32, W h without bias; overwritten.
        log_total: `[n]`, the log-sum-exp over the whole vocabulary.
        complement: `[n]`, 1 − p(target).
        out: `[n, s]`, for the result; may be `products` itself.
    """
    logits, slope = head.transform_(products, bias, want_slope=True)
    column, inside = _locate(targets, start, logits.shape[1])
    gradient = logits.sub_(log_total[:, None]).exp_().neg_()
    _set_column_(gradient, column, inside, complement)
    if slope is not None:
        gradient.mul_(slope)
    if head.logit_scale != 1.0:
        gradient.mul_(head.logit_scale)
    return gradient if out is gradient else out.copy_(gradient)


def shrink_rows_(rows: Tensor, factors: Tensor) -> Tensor:
    """Multiply each row by its factor."""
    return rows.mul_(factors[:, None])


def finish_weights_(
    weights: Tensor, factors: Tensor, target_gradient: Tensor, targets: Tensor, start: int
) -> Tensor:
    """Turn the weights that `fold_` wrote into unit gradients, given the whole row's sum.

    Args:
        weights: `[n, s]` of a tile; overwritten.
        factors: `[n]` float32: −scale / sum of the row, relative to the tile's maximum.
        target_gradient: `[n]` float32, the unit gradient at the target.
    """
    weights.mul_(factors[:, None])
    column, inside = _locate(targets, start, weights.shape[1])
    _set_column_(weights, column, inside, target_gradient.to(weights.dtype))
    return weights


def _locate(targets: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    local = targets - start
    inside = (local >= 0) & (local < columns)
    return local.clamp(0, columns - 1)[:, None], inside


def _set_column_(tile: Tensor, column: Tensor, inside: Tensor, values: Tensor) -> None:
    kept = tile.gather(1, column).squeeze(1)
    tile.scatter_(1, column, torch.where(inside, values, kept)[:, None])


def _raise_maximum_(running: Running, found: Tensor) -> tuple[Tensor, Tensor]:
    """The new value to subtract from logits, and the factor for older sums."""
    highest = torch.maximum(running.max, found)
    # A row of only −inf: subtract 0, because −inf − (−inf) is NaN.
    base = torch.where(highest == -torch.inf, 0.0, highest)
    shrink = torch.exp(running.max - base)
    running.max.copy_(highest)
    return base, shrink
