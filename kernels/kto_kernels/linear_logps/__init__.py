"""`linear_logps`: hidden states and a head's weight to the log-probabilities of given tokens."""

from kto_kernels.linear_logps.eager import linear_logps

__all__ = ["linear_logps"]
