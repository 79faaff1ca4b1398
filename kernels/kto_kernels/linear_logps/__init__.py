"""`linear_logps`: hidden states and a head's weight to the log-probabilities of given tokens.

| file | what it holds |
|---|---|
| `eager` | the twin in plain PyTorch that states the definition; slow, large, right |
| `head` | what lies between the product W h and a logit: bias, scale, soft-capping |
| `plan` | which of the four modes a call takes, and how its work is cut into tiles |
| `products` | matrix products with float32 results |
| `torch_tiles`, `triton_tiles` | row-wise work on one tile of logits, twice |
| `fused` | one Triton kernel from hidden states to log-sum-exp, no tile in memory |
| `running` | what is known of each row while the vocabulary goes by |
| `tiles` | the loop over tiles |
| `modes` | what each mode computes in its forward, keeps, and does in its backward |
| `function` | autograd and the public functions |
"""

from kto_kernels.linear_logps.function import (
    TokenStatistics,
    linear_logps,
    linear_logps_with_statistics,
)

__all__ = ["TokenStatistics", "linear_logps", "linear_logps_with_statistics"]
