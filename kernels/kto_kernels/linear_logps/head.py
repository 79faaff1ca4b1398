r"""The steps from the product W h to a logit: bias, scale, final soft-capping.

With $a = W h + b$: $z = s a$, or $z = c \tanh(s a / c)$ where the model caps its logits, so that
$\partial z / \partial a = s$ or $s (1 - (z / c)^2)$: a function of the logit alone.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """The constants of a language model head."""

    logit_scale: float = 1.0
    """s: Cohere's `logit_scale`, Granite's 1 / `logits_scaling`."""
    softcap: float | None = None
    """c: Gemma-2's `final_logit_softcapping`; None where logits are not capped."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.logit_scale):
            raise ValueError(f"logit_scale must be a finite number, got {self.logit_scale}")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(
                f"softcap must be a positive finite number, got {self.softcap}; "
                "give None for logits that are not capped"
            )

    def transform_(
        self, products: Tensor, bias: Tensor | None, *, want_slope: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Turn float32 products W h into logits, in place.

        Returns:
            the logits, and their slope: ∂z/∂a divided by the scale; None where it is 1 everywhere
            or not wanted.
        """
        if bias is not None:
            products.add_(bias)
        if self.softcap is None:
            return products if self.logit_scale == 1.0 else products.mul_(self.logit_scale), None
        capped = products.mul_(self.logit_scale / self.softcap).tanh_()
        slope = torch.square(capped).neg_().add_(1.0) if want_slope else None
        return capped.mul_(self.softcap), slope

    def slope(self, logits: Tensor) -> Tensor:
        """∂z/∂a divided by the scale, from the logits."""
        if self.softcap is None:
            return torch.ones_like(logits)
        return torch.square(logits / self.softcap).neg_().add_(1.0)
