"""How OpenMP's threads wait for each other, settled before PyTorch loads them."""

import os

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables of OpenMP, GNU's and LLVM's; any of them keeps what its owner chose."""


def wait_passively() -> None:
    """Let a thread that waits for others sleep, where by default it spins.

    Spinning is a little faster on cores that nobody else uses. Where another process takes one of
    two cores, the threads spin for a share of work whose thread is not running, and a step of a
    small model takes almost twice as long (`benchmarks/README.md`).
    """
    if not any(name in os.environ for name in SETTINGS):
        os.environ["OMP_WAIT_POLICY"] = "passive"
