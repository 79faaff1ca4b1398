"""Fused log-probabilities of tokens from hidden states, without the logits."""

from kto_kernels.linear_logps import linear_logps

__all__ = ["linear_logps"]
