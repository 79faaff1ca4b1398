"""The autograd function around the four modes, and the public functions."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from kto_kernels.linear_logps.head import Head
from kto_kernels.linear_logps.modes import (
    frozen_head_forward,
    fused_logps,
    kept_forward,
    plain_forward,
    trained_backward,
)
from kto_kernels.linear_logps.plan import Mode, Needs, Plan, make_plan
from kto_kernels.linear_logps.tiles import Inputs


@dataclass(kw_only=True, slots=True)
class TokenStatistics:
    """Log-prob, entropy and mean logit of each row, float32."""

    logps: Float32[Tensor, " tokens"]
    """log p(target), in nats; differentiable."""
    entropy: Float32[Tensor, " tokens"]
    """Of the distribution over the vocabulary, in nats; not differentiable."""
    mean_logit: Float32[Tensor, " tokens"]
    """Over the vocabulary; not differentiable."""


def linear_logps(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocabulary width"],
    targets: Int[Tensor, " tokens"],
    *,
    bias: Float[Tensor, " vocabulary"] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Float32[Tensor, " tokens"]:
    """log p(target) of every row, in nats, float32, differentiable once.

    Gradients flow to those of `hidden`, `weight` and `bias` that require one, and decide what is
    computed and kept (`plan.Mode`). Under autocast the products are in autocast's type.

    Args:
        hidden: the decoder's last hidden states, one row per predicted token.
        weight: the language model head: a parameter, frozen or not, or a tensor computed from some.
        targets: the token that each row is to predict, in `[0, V)`.
        bias: the head's bias.
        logit_scale: factor on the logits (Cohere's `logit_scale`, Granite's 1 / `logits_scaling`).
        softcap: final soft-capping (Gemma-2's `final_logit_softcapping`), after the scale; None: no
            capping.

    Raises:
        ValueError: if shapes do not fit, `logit_scale` is not finite or `softcap` is not positive
            and finite.
        TypeError: if `hidden` and `weight` differ in type outside autocast.
        IndexError: on a CPU, if a target is outside the vocabulary. On a GPU its log-prob is NaN,
            because a check would need device synchronisation.
    """
    return _score(hidden, weight, targets, bias, Head(logit_scale=logit_scale, softcap=softcap))[0]


def linear_logps_with_statistics(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocabulary width"],
    targets: Int[Tensor, " tokens"],
    *,
    bias: Float[Tensor, " vocabulary"] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> TokenStatistics:
    """`linear_logps` with the entropy and the mean logit of every row, from the same pass.

    Arguments and errors as for `linear_logps`.
    """
    head = Head(logit_scale=logit_scale, softcap=softcap)
    logps, entropy, mean_logit = _score(hidden, weight, targets, bias, head, statistics=True)
    assert entropy is not None
    assert mean_logit is not None
    return TokenStatistics(logps=logps, entropy=entropy, mean_logit=mean_logit)


def _score(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    head: Head,
    *,
    statistics: bool = False,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """logps, entropy, mean logit; tests and benchmarks give a `plan` instead of the chosen one."""
    _check(hidden, weight, targets, bias)
    targets = targets.long().contiguous()
    needs = Needs.of(hidden, weight, bias)
    plan = plan or make_plan(hidden, weight, needs, statistics=statistics)
    with torch.cuda.device_of(hidden), torch.autocast(hidden.device.type, enabled=False):
        if plan.mode is Mode.GRADIENT_FREE:
            inputs = Inputs(
                hidden=hidden, weight=weight, bias=bias, targets=targets, head=head, plan=plan
            )
            with torch.no_grad():
                if plan.fused:
                    return fused_logps(inputs), None, None
                forward = plain_forward(inputs, statistics=statistics)
            return forward.logps, forward.entropy, forward.mean_logit
        return _LinearLogps.apply(hidden, weight, bias, targets, head, plan, needs, statistics)


class _LinearLogps(torch.autograd.Function):
    """The three modes that have a gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, head, plan, needs, statistics):
        inputs = Inputs(
            hidden=hidden, weight=weight, bias=bias, targets=targets, head=head, plan=plan
        )
        if plan.mode is Mode.FROZEN_HEAD:
            forward = frozen_head_forward(inputs, statistics=statistics)
            ctx.save_for_backward(forward.hidden_gradient)
        else:
            run = kept_forward if plan.mode is Mode.KEPT else plain_forward
            forward = run(inputs, statistics=statistics)
            per_row = (targets, forward.log_total, forward.complement)
            ctx.save_for_backward(hidden, weight, bias, *per_row, *forward.tiles)
        ctx.head, ctx.plan, ctx.needs, ctx.dtype = head, plan, needs, hidden.dtype
        ctx.set_materialize_grads(False)
        outputs = forward.logps, forward.entropy, forward.mean_logit
        ctx.mark_non_differentiable(*(output for output in outputs[1:] if output is not None))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, *_of_statistics):
        no_gradients = (None,) * 5
        if gradient is None:
            return None, None, None, *no_gradients
        if ctx.plan.mode is Mode.FROZEN_HEAD:
            (unit,) = ctx.saved_tensors
            hidden_gradient = torch.empty_like(unit, dtype=ctx.dtype)
            torch.mul(unit, gradient[:, None], out=hidden_gradient)
            return hidden_gradient, None, None, *no_gradients
        hidden, weight, bias, targets, log_total, complement, *tiles = ctx.saved_tensors
        inputs = Inputs(
            hidden=hidden,
            weight=weight,
            bias=bias,
            targets=targets,
            head=ctx.head,
            plan=ctx.plan,
        )
        with torch.autocast(hidden.device.type, enabled=False):
            gradients = trained_backward(
                inputs,
                gradient,
                ctx.needs,
                log_total=log_total,
                complement=complement,
                tiles=tiles,
            )
        return *gradients, *no_gradients


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden must be [tokens, width] and weight [vocabulary, width], "
            f"got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets must hold one token per row of hidden, {hidden.shape[0]}, "
            f"got shape {list(targets.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must hold one number per row of weight, {weight.shape[0]}, "
            f"got shape {list(bias.shape)}"
        )
    if targets.device.type == "cpu" and targets.numel():
        low, high = (int(bound) for bound in targets.aminmax())
        if low < 0 or high >= weight.shape[0]:
            raise IndexError(
                f"targets must lie in [0, {weight.shape[0]}), got {low} to {high}; "
                "remove rows that predict nothing"
            )
