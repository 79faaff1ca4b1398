"""Fused log-probabilities of tokens from hidden states, without the logits."""

from kto_kernels.linear_logps import (
    TokenStatistics,
    linear_logps,
    linear_logps_with_statistics,
)

__all__ = ["TokenStatistics", "linear_logps", "linear_logps_with_statistics"]
