r"""Online log-sum-exp: the state of each row, slice after slice of the vocabulary."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kto_kernels.linear_logps.head import Head


@dataclass(kw_only=True, slots=True)
class Running:
    r"""The state per row, float32: with m the largest logit seen and y the target,

    $\text{others} = \sum_{v \ne y} e^{z_v - m}$, over the columns seen so far.
    """

    max: Tensor
    others: Tensor
    target: Tensor
    """z_y; NaN until its column is seen, so for a target outside the vocabulary to the end."""
    logit_sum: Tensor | None
    """Σ z_v; None without statistics."""
    weighted_sum: Tensor | None
    r"""$\sum_{v \ne y} e^{z_v - m} z_v$; None without statistics."""

    @classmethod
    def start(cls, rows: int, device: torch.device, *, statistics: bool) -> "Running":
        """The state before the first column."""

        def full(value: float) -> Tensor:
            return torch.full((rows,), value, device=device, dtype=torch.float32)

        return cls(
            max=full(-torch.inf),
            others=full(0.0),
            target=full(torch.nan),
            logit_sum=full(0.0) if statistics else None,
            weighted_sum=full(0.0) if statistics else None,
        )

    @property
    def statistics(self) -> bool:
        return self.logit_sum is not None

    def rows(self, rows: slice) -> "Running":
        """A view of some rows; changes to it change this object."""
        return Running(
            max=self.max[rows],
            others=self.others[rows],
            target=self.target[rows],
            logit_sum=None if self.logit_sum is None else self.logit_sum[rows],
            weighted_sum=None if self.weighted_sum is None else self.weighted_sum[rows],
        )

    def add_statistics_(self, logits: Tensor, exps: Tensor, shrink: Tensor) -> None:
        """Fold in a tile's sums; `exps` has a 0 at the target."""
        assert self.logit_sum is not None
        assert self.weighted_sum is not None
        self.logit_sum.add_(logits.sum(dim=1))
        products = torch.where(exps > 0, exps * logits, 0.0)
        self.weighted_sum.mul_(shrink).add_(products.sum(dim=1))

    def finish(self, head: Head) -> "Finished":
        """The results after the last column."""
        base = torch.where(self.max == -torch.inf, 0.0, self.max)
        target_exp = torch.exp(self.target - base)
        total = self.others + target_exp
        return Finished(
            logps=self.target - base - total.log(),
            log_total=base + total.log(),
            base=base,
            total=total,
            complement=self.others / total,
            target_slope=head.slope(self.target),
        )

    def entropy(self, finished: "Finished") -> Tensor:
        r"""$\log \sum_v e^{z_v} - \sum_v p_v z_v$, in nats."""
        assert self.weighted_sum is not None
        target_exp = finished.total - self.others
        own = torch.where(target_exp > 0, target_exp * self.target, 0.0)
        return finished.log_total - (self.weighted_sum + own) / finished.total


@dataclass(kw_only=True, slots=True)
class Finished:
    """Results per row, float32."""

    logps: Tensor
    """log p(target), nats."""
    log_total: Tensor
    """log Σ e^z."""
    base: Tensor
    """The largest logit, or 0 where all are −inf."""
    total: Tensor
    """Σ e^(z − base)."""
    complement: Tensor
    """1 − p(target)."""
    target_slope: Tensor
    """∂z/∂a divided by the scale, at the target."""
