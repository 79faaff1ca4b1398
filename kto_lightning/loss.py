"""KTO (arXiv:2402.01306) on plain tensors: no config, no logger, no collective."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def kto_loss(
    log_ratio: Float[Tensor, " batch"],
    desirable: Bool[Tensor, " batch"],
    z0: Float[Tensor, ""],
    *,
    beta: float,
    weight: Float[Tensor, " batch"] | float = 1.0,
) -> Float[Tensor, " batch"]:
    r"""Per-example KTO loss, eqs. 7-8 of arXiv:2402.01306 without the constant λ_y.

    $$\lambda_y \, \sigma\bigl(-s \beta (\log \tfrac{\pi_\theta(y|x)}{\pi_{ref}(y|x)} - z_0)\bigr),
    \quad s = +1 \text{ if desirable else } -1$$

    The form σ(−u) instead of 1 − σ(u), which in float32 is exactly 0, gradient too, from u = 17 on.
    With `z0` = 0 this is the unpaired APO-zero loss (arXiv:2408.06266, eq. 7).

    Args:
        log_ratio: log π_θ(y|x) − log π_ref(y|x), in nats, summed over the completion.
        desirable: whether each completion was marked desirable.
        z0: the reference point in nats, one number for the whole batch, detached.
        beta: how strongly the policy is kept close to the reference (per nat).
        weight: λ of each example.
    """
    sign = torch.where(desirable, 1.0, -1.0)
    return weight * torch.sigmoid(-beta * sign * (log_ratio - z0))


def gradient_left(
    log_ratio: Float[Tensor, " batch"], z0: Float[Tensor, ""], *, beta: float
) -> Float[Tensor, " batch"]:
    r"""The share of the largest gradient that the loss still gives each example, from 1 to 0.

    $$4 \, \sigma(u) \, \sigma(-u), \quad
    u = \beta \bigl(\log \tfrac{\pi_\theta(y|x)}{\pi_{ref}(y|x)} - z_0\bigr)$$

    The derivative of `kto_loss` by the log-ratio is −λ_y s β σ(u) σ(−u), largest at u = 0. The same
    for both classes, as u and −u give the same.

    Args:
        log_ratio: log π_θ(y|x) − log π_ref(y|x), in nats, summed over the completion.
        z0: the reference point in nats.
        beta: how strongly the policy is kept close to the reference (per nat).
    """
    logits = beta * (log_ratio - z0)
    return 4 * torch.sigmoid(logits) * torch.sigmoid(-logits)


def reference_point(total: Float[Tensor, ""], count: int) -> Float[Tensor, ""]:
    r"""The KL reference estimate z0.

    $$\hat z_0 = \max\bigl(0, \tfrac1m \textstyle\sum_i
    \log \tfrac{\pi_\theta(y'_i|x_i)}{\pi_{ref}(y'_i|x_i)}\bigr)$$

    Section 4.2 of arXiv:2402.01306. Averaged first and clamped once: a mean of clamped parts is
    biased upward. No gradient flows through it.

    Args:
        total: the sum of the mismatched log-ratios over the whole batch and all ranks, in nats.
        count: how many there are, at least one.

    Raises:
        ValueError: if `count` is not positive.
    """
    if count < 1:
        raise ValueError(f"the reference point is a mean over at least one example, got {count}")
    return (total / count).clamp(min=0).detach()
