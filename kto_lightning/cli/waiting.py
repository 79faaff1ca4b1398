"""How OpenMP's threads wait for each other, settled before PyTorch loads them."""

import os

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables of OpenMP, GNU's and LLVM's; any of them keeps what its owner chose."""

SPIN_COUNT = 1000
"""Tries of a waiting thread of GNU's OpenMP before it sleeps, 300,000 by default."""


def wait_passively() -> None:
    """Let a thread that waits for others sleep soon, where by default it spins for milliseconds.

    Where another process takes one of two cores, a spinning thread takes time from the thread that
    it waits for, and a step of a small model takes almost twice as long. But a thread that sleeps
    at once has to be woken up hundreds of times per step, with which the smallest models take
    twice as long on idle cores. A short spin is a compromise (`benchmarks/README.md`). With LLVM's
    OpenMP a thread sleeps at once.
    """
    if not any(name in os.environ for name in SETTINGS):
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)  # GNU's prefers it to the policy
