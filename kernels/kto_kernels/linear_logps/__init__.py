"""`linear_logps`: from hidden states and a head's weight to the log-probs of given tokens.

| file | content |
|---|---|
| `eager` | the definition in plain PyTorch: slow, with all logits in memory |
| `head` | from the product W h to a logit: bias, scale, soft-capping |
| `plan` | the choice among the four modes, and of the tiles' size |
| `products` | matrix products with float32 results |
| `torch_tiles`, `triton_tiles` | row-wise operations on a tile of logits, in PyTorch and Triton |
| `fused` | one Triton kernel from hidden states to log-sum-exp, without a tile in memory |
| `running` | each row's online log-sum-exp over the slices of the vocabulary |
| `tiles` | the loop over tiles |
| `modes` | forward and backward of each mode |
| `function` | the autograd function and the public functions |
"""

from kto_kernels.linear_logps.function import (
    TokenStatistics,
    linear_logps,
    linear_logps_with_statistics,
)

__all__ = ["TokenStatistics", "linear_logps", "linear_logps_with_statistics"]
