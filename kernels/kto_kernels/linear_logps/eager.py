r"""The definition in plain PyTorch: every logit in memory, the gradient by autograd.

With $a = W h + b$ and logits $z = s a$, or $z = c \tanh(s a / c)$ where the model caps them,

$$\log p(y_t) = z_{y_t} - \log \sum_v e^{z_v}.$$

With float64 tensors it is the ground truth of the tests; with tensors in the working precision its
error sets the tolerance for the kernels.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear


def linear_logps(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocabulary width"],
    targets: Int[Tensor, " tokens"],
    *,
    bias: Float[Tensor, " vocabulary"] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Float[Tensor, " tokens"]:
    """log p(target) of every row, in nats: float64 for float64 arguments, else float32.

    Arguments as for `kto_kernels.linear_logps`.
    """
    logits = eager_logits(hidden, weight, bias=bias, logit_scale=logit_scale, softcap=softcap)
    return logits.log_softmax(dim=1).gather(1, targets[:, None]).squeeze(1)


def eager_logits(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocabulary width"],
    *,
    bias: Float[Tensor, " vocabulary"] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Float[Tensor, "tokens vocabulary"]:
    """The logits, in float32 or, for float64 arguments, float64."""
    logits = linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
