"""What a step costs on this machine: the numbers of a row that the batch does not decide."""

import sys
import time
from collections.abc import Sequence

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

MEASURED = ("tokens_per_second", "peak_memory_mib")
_BYTES_PER_MIB = 2**20


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
