"""What a step says of itself: sums over its micro-batches and ranks, then one row of numbers."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

NUM_SUMS = 7


@dataclass(kw_only=True, slots=True)
class BatchSums:
    """Sums over the examples of a batch, in float64, so that the order of adding shows nowhere.

    A vector, so that all ranks' are added in one reduction. Stand-ins (not `counted`) are in none.
    """

    values: Float[Tensor, " sums"]

    @classmethod
    def zero(cls, device: torch.device) -> "BatchSums":
        return cls(values=torch.zeros(NUM_SUMS, dtype=cls.dtype(device), device=device))

    @staticmethod
    def dtype(device: torch.device) -> torch.dtype:
        """float64, which costs nothing at this size; Apple's devices have none."""
        return torch.float32 if device.type == "mps" else torch.float64

    def add(
        self,
        *,
        loss: Float[Tensor, " batch"],
        reward: Float[Tensor, " batch"],
        logps: Float32[Tensor, " batch"],
        desirable: Bool[Tensor, " batch"],
        counted: Bool[Tensor, " batch"],
    ) -> None:
        good = (desirable & counted).to(self.values.dtype)
        bad = (~desirable & counted).to(self.values.dtype)
        per_class = torch.stack([good, bad])  # [2, batch]
        terms = torch.stack([torch.ones_like(loss), reward, logps]).detach()  # [3, batch]
        class_sums = per_class @ terms.to(self.values.dtype).T  # [2, 3]
        total_loss = (loss.detach() * counted).to(self.values.dtype).sum()
        self.values += torch.cat([class_sums.flatten(), total_loss[None]])


def batch_metrics(sums: list[float]) -> dict[str, float | None]:
    """`loss`, class means of rewards and log-probs, and the margin; None where a class is absent.

    Args:
        sums: `BatchSums.values` over all micro-batches and ranks.
    """
    good, good_reward, good_logps, bad, bad_reward, bad_logps, loss = sums

    def mean(total: float, count: float) -> float | None:
        return total / count if count else None

    desirable, undesirable = mean(good_reward, good), mean(bad_reward, bad)
    margin = None
    if desirable is not None and undesirable is not None:
        margin = desirable - undesirable
    return {
        "loss": mean(loss, good + bad),
        "reward/desirable": desirable,
        "reward/undesirable": undesirable,
        "reward/margin": margin,
        "logps/desirable": mean(good_logps, good),
        "logps/undesirable": mean(bad_logps, bad),
    }
