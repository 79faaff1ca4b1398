"""Log-probs of tokens from hidden states, without the full matrix of logits in memory."""

from kto_kernels.linear_logps import (
    TokenStatistics,
    linear_logps,
    linear_logps_with_statistics,
)

__all__ = ["TokenStatistics", "linear_logps", "linear_logps_with_statistics"]
