"""Matrix products with float32 results for operands of any type.

Rounding a vocabulary slice's product to bfloat16 before it is added to the others would bias the
sum, and a log-prob from bfloat16 logits is off by about 0.02 nats per token. cuBLAS can return its
float32 accumulators; a CPU returns the operands' type, which is converted.
"""

import torch
from torch import Tensor


def _has_float32_results(operand: Tensor) -> bool:
    return operand.device.type == "cuda" and torch.version.hip is None


def product(left: Tensor, right: Tensor, *, out: Tensor) -> Tensor:
    """out = left @ right; rounded once, to `out`'s type, if the device supports that."""
    if out.dtype == left.dtype:
        return torch.mm(left, right, out=out)
    if out.dtype == torch.float32 and _has_float32_results(left):
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return out.copy_(torch.mm(left, right))


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total += left @ right, for a float32 total."""
    if left.dtype == total.dtype:
        # `addmm_` is not counted by FlopCounterMode, which tests use.
        return torch.addmm(total, left, right, out=total)
    if _has_float32_results(left):
        return torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    return total.add_(torch.mm(left, right))
