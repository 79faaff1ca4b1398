"""Step metrics, summed over micro-batches and ranks; time and memory of a step."""

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
"""Metrics that differ from run to run, unlike all others."""
_BYTES_PER_MIB = 2**20


@dataclass(kw_only=True, slots=True)
class BatchSums:
    """Sums over the examples of a batch without its fillers.

    One vector, so that the sums of all ranks take one reduction: `_ClassSums` of each class, the
    sum of losses, and count, sum and sum of squares of the mismatched log-ratios.

    In float64, so that the order of summation does not show in the metrics. Squares are of the
    values themselves, not of differences to a mean, which is not known before the reduction: in
    float64 a standard deviation of a millionth of the mean is still exact to 1e-4.
    """

    values: Float[Tensor, " sums"]

    @classmethod
    def zero(cls, device: torch.device) -> "BatchSums":
        return cls(values=torch.zeros(NUM_SUMS, dtype=cls.dtype(device), device=device))

    @staticmethod
    def dtype(device: torch.device) -> torch.dtype:
        """float64; float32 on Apple's devices, which have no float64."""
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
        """Add the matched completions of a micro-batch."""
        is_desirable = (desirable & ~is_filler).to(self.values.dtype)
        is_undesirable = (~desirable & ~is_filler).to(self.values.dtype)
        per_class = torch.stack([is_desirable, is_undesirable])  # [2, batch]
        ones = torch.ones_like(loss)
        terms = torch.stack([ones, reward, logps, gradient_left]).detach().to(self.values.dtype)
        terms = torch.cat([terms, terms[1:2].square()])  # [5, batch]
        class_sums = per_class @ terms.T  # [2, 5]
        total_loss = (loss.detach() * ~is_filler).to(self.values.dtype).sum()
        self.values[:_NUM_MATCHED_SUMS] += torch.cat([class_sums.flatten(), total_loss[None]])

    def add_mismatched(
        self, log_ratio: Float[Tensor, " batch"], is_filler: Bool[Tensor, " batch"]
    ) -> None:
        """Add the mismatched log-ratios of a micro-batch, in nats; z0 is their mean."""
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
    """Metrics of a batch: loss, standard error of z0, margin, and of each class the means of
    rewards, log-probs and gradient left and the standard deviation of rewards.

    Args:
        sums: `BatchSums.values` over all micro-batches and ranks.

    Returns:
        By name without the stage; None for a metric with too few examples.
    """
    desirable = _ClassSums(*sums[:_NUM_CLASS_SUMS])
    undesirable = _ClassSums(*sums[_NUM_CLASS_SUMS : 2 * _NUM_CLASS_SUMS])
    loss, num_mismatched, *mismatched = sums[2 * _NUM_CLASS_SUMS :]
    metrics = {"loss": _mean(loss, desirable.count + undesirable.count)}
    for name, one in (("desirable", desirable), ("undesirable", undesirable)):
        metrics[f"reward/{name}"] = _mean(one.reward, one.count)
        metrics[f"logps/{name}"] = _mean(one.logps, one.count)
        metrics[f"gradient_left/{name}"] = _mean(one.gradient_left, one.count)
        metrics[f"reward/{name}_std"] = sample_std(one.count, one.reward, one.squared_reward)
    rewards = metrics["reward/desirable"], metrics["reward/undesirable"]
    metrics["reward/margin"] = None
    if rewards[0] is not None and rewards[1] is not None:
        metrics["reward/margin"] = rewards[0] - rewards[1]
    std = sample_std(num_mismatched, *mismatched)
    metrics["z0_se"] = None if std is None else std / math.sqrt(num_mismatched)
    return metrics


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def sample_std(count: float, total: float, squares: float) -> float | None:
    r"""Sample standard deviation from sums; None for fewer than two values.

    $\sqrt{(\sum_i x_i^2 - (\sum_i x_i)^2 / n) / (n - 1)}$
    """
    if count < 2:
        return None
    variance = (squares - total * total / count) / (count - 1)
    return math.sqrt(max(variance, 0.0))  # rounding may make it negative; this order keeps a NaN


class StepClock:
    """Times steps from the end of one to the end of the next, waiting for data included. `start`
    excludes what lies between without being training: a validation, a checkpoint."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def start(self) -> None:
        """Time the next step from now on."""
        self._started = time.perf_counter()

    def measure(self, num_tokens: int, peaks_mib: Sequence[float]) -> dict[str, float | None]:
        """The metrics `MEASURED` of a step that has ended, on its device too.

        Args:
            num_tokens: matched tokens of the step without fillers, over all ranks.
            peaks_mib: `peak_memory_mib` of every rank, 0 where it is not known.
        """
        seconds = time.perf_counter() - self._started
        return {
            "tokens_per_second": num_tokens / seconds if seconds > 0 else None,
            "peak_memory_mib": max(peaks_mib) or None,
        }


def peak_memory_mib(device: torch.device) -> float | None:
    """Peak memory of this process so far: allocated by PyTorch on a CUDA device, else resident in
    host memory. None where the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _BYTES_PER_MIB
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB elsewhere
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
