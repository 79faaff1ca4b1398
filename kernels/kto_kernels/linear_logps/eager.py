r"""Per-token log-probabilities of given targets, in plain PyTorch, a chunk of tokens at a time.

With $a = W h + b$ and logits $z = s a$, or $z = c \tanh(s a / c)$ where the model caps them,

$$\log p(y_t) = z_{y_t} - \log \sum_v e^{z_v}.$$

Each chunk's logits live only while the chunk is worked on: its backward computes them again
(`torch.utils.checkpoint`), so nothing of shape `[tokens, vocabulary]` is ever kept.
"""

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

MAX_CHUNK_LOGITS = 2**26
"""Logits of one chunk at most: 256 MiB in float32."""


def linear_logps(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocabulary width"],
    targets: Int[Tensor, " tokens"],
    *,
    bias: Float[Tensor, " vocabulary"] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Float32[Tensor, " tokens"]:
    """log p(target) of every row, in nats, float32.

    Args:
        hidden: the decoder's last hidden states, one row per predicted token.
        weight: the language model head, `[V, D]`.
        targets: the token each row must predict, in `[0, V)`.
        bias: the head's bias.
        logit_scale: factor on the logits (Cohere's `logit_scale`, Granite's 1 / `logits_scaling`).
        softcap: final soft-capping (Gemma-2's `final_logit_softcapping`), after the scale.
    """
    chunk = max(1, MAX_CHUNK_LOGITS // weight.shape[0])

    def chunk_logps(hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = linear(hidden, weight, bias).float()
        if logit_scale != 1.0:
            logits = logits * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        target_logits = logits.gather(1, targets[:, None]).squeeze(1)
        return target_logits - logits.logsumexp(dim=1)

    if hidden.shape[0] <= chunk:
        return chunk_logps(hidden, targets, weight, bias)
    return torch.cat(
        [
            _rematerialised(chunk_logps, h, t, weight, bias)
            for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)
        ]
    )


def _rematerialised(function, *arguments):
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False)
