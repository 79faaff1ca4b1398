"""What a step says of itself: sums over its micro-batches and ranks, then one row of numbers."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from kto_lightning.batches.types import StepBatch
from kto_lightning.distributed import by_rank

try:
    import resource
except ImportError:  # Windows
    resource = None

_NUM_CLASS_SUMS = 5
_NUM_MATCHED_SUMS = 2 * _NUM_CLASS_SUMS + 1
NUM_SUMS = _NUM_MATCHED_SUMS + 3
MEASURED = ("tokens_per_second", "peak_memory_mib")
_BYTES_PER_MIB = 2**20


@dataclass(kw_only=True, slots=True)
class BatchSums:
    """Sums over the examples of a batch, in float64, so that the order of adding shows nowhere.

    A vector, so that all ranks' are added in one reduction: of each class `_ClassSums`, the losses'
    sum, and count, sum and sum of squares of the mismatched log-ratios. Fillers are in
    none. Squares are of float32 values as they are, not of differences to a mean that no
    rank knows yet: in float64 a spread of a millionth of the mean is still exact to 1e-4.
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
        gradient_left: Float[Tensor, " batch"],
        desirable: Bool[Tensor, " batch"],
        is_filler: Bool[Tensor, " batch"],
    ) -> None:
        good = (desirable & ~is_filler).to(self.values.dtype)
        bad = (~desirable & ~is_filler).to(self.values.dtype)
        per_class = torch.stack([good, bad])  # [2, batch]
        ones = torch.ones_like(loss)
        terms = torch.stack([ones, reward, logps, gradient_left]).detach().to(self.values.dtype)
        terms = torch.cat([terms, terms[1:2].square()])  # [5, batch]
        class_sums = per_class @ terms.T  # [2, 5]
        total_loss = (loss.detach() * ~is_filler).to(self.values.dtype).sum()
        self.values[:_NUM_MATCHED_SUMS] += torch.cat([class_sums.flatten(), total_loss[None]])

    def add_mismatched(
        self, log_ratio: Float[Tensor, " batch"], is_filler: Bool[Tensor, " batch"]
    ) -> None:
        """Mismatched log-ratios in nats, of which z0 is the mean."""
        terms = (log_ratio.detach() * ~is_filler).to(self.values.dtype)
        sums = torch.stack([(~is_filler).sum().to(terms), terms.sum(), terms.square().sum()])
        self.values[_NUM_MATCHED_SUMS:] += sums


@dataclass(slots=True)
class _ClassSums:
    count: float
    reward: float
    logps: float
    gradient_left: float
    squared_reward: float


def batch_metrics(sums: list[float]) -> dict[str, float | None]:
    """`loss`, `z0_se`, the margin, and of each class the means of rewards, log-probs and gradient
    left and the rewards' standard deviation. None for what there are too few examples for.

    Args:
        sums: `BatchSums.values` over all micro-batches and ranks.
    """
    good = _ClassSums(*sums[:_NUM_CLASS_SUMS])
    bad = _ClassSums(*sums[_NUM_CLASS_SUMS : 2 * _NUM_CLASS_SUMS])
    loss, num_mismatched, *mismatched = sums[2 * _NUM_CLASS_SUMS :]
    metrics = {"loss": _mean(loss, good.count + bad.count)}
    for name, one in (("desirable", good), ("undesirable", bad)):
        metrics[f"reward/{name}"] = _mean(one.reward, one.count)
        metrics[f"logps/{name}"] = _mean(one.logps, one.count)
        metrics[f"gradient_left/{name}"] = _mean(one.gradient_left, one.count)
        metrics[f"reward/{name}_std"] = sample_std(one.count, one.reward, one.squared_reward)
    desirable, undesirable = metrics["reward/desirable"], metrics["reward/undesirable"]
    metrics["reward/margin"] = None
    if desirable is not None and undesirable is not None:
        metrics["reward/margin"] = desirable - undesirable
    std = sample_std(num_mismatched, *mismatched)
    metrics["z0_se"] = None if std is None else std / math.sqrt(num_mismatched)
    return metrics


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def sample_std(count: float, total: float, squares: float) -> float | None:
    r"""$\sqrt{(\sum_i x_i^2 - (\sum_i x_i)^2 / n) / (n - 1)}$; None of fewer than two."""
    if count < 2:
        return None
    variance = (squares - total * total / count) / (count - 1)
    return math.sqrt(max(variance, 0.0))  # rounding may leave less; a NaN stays one in this order


class StepClock:
    """Seconds from the end of one step to the end of the next, waiting for data included; whatever
    lies between them without being training (validation, a checkpoint) is left out by `start`."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def start(self) -> None:
        """From now on the next step is timed."""
        self._started = time.perf_counter()

    def measures(self, num_tokens: int, peaks_mib: Sequence[float]) -> dict[str, float | None]:
        """`MEASURED` of a step that just ended, its device already waited for.

        Args:
            num_tokens: real matched tokens of the step, over all ranks.
            peaks_mib: `peak_memory_mib` of every rank, 0 where it is not known.
        """
        seconds = time.perf_counter() - self._started
        return {
            "tokens_per_second": num_tokens / seconds if seconds > 0 else None,
            "peak_memory_mib": max(peaks_mib) or None,
        }


def peak_memory_mib(device: torch.device) -> float | None:
    """The most memory that this process has held so far, of one device and in MiB: what PyTorch
    allocated on a CUDA device, else resident memory. None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _BYTES_PER_MIB
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # of getrusage: bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _BYTES_PER_MIB


def read_step(
    batch: StepBatch,
    sums: BatchSums,
    auxiliary: Float[Tensor, ""],
    scalars: Float[Tensor, " 3"],
    *,
    rank: int,
    num_ranks: int,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> tuple[dict[str, float | None], list[float]]:
    """A training step's metrics over all ranks, and each rank's peak memory in MiB.

    One reduction and one copy to the host: the only place where a step waits for its device. It
    comes before the optimizer step, which depends on these numbers and then runs while the next
    batch is prepared.

    Args:
        batch: this rank's part of the step.
        sums: over its micro-batches.
        auxiliary: this rank's sum of auxiliary losses.
        scalars: z0 before and after its clamp, and the gradient norm: the same on all ranks.
        rank: of `num_ranks`, of this process.
        sum_over_ranks: adds a tensor over all ranks.
    """
    device = sums.values.device
    peak = by_rank(peak_memory_mib(device) or 0.0, rank, num_ranks)
    parts = [peak.to(sums.values), sums.values, auxiliary[None].to(sums.values)]
    over_ranks = sum_over_ranks(torch.cat(parts))
    together = torch.cat([over_ranks, scalars.to(over_ranks)]).tolist()
    peaks, numbers = together[:num_ranks], together[num_ranks:]
    *totals, auxiliary_total, z0_raw, z0, norm = numbers
    metrics = batch_metrics(totals)
    if metrics["loss"] is not None:
        metrics["loss"] += auxiliary_total
    metrics |= {"z0": z0, "z0_raw": z0_raw, "grad_norm": norm}
    metrics["tokens"] = batch.num_tokens
    return metrics, peaks
