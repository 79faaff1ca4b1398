"""The end of a rank whose parent process ends; imported before anything heavy."""

import ctypes
import os
import signal
import sys

STARTED_BY = "KTO_LIGHTNING_STARTED_BY"
"""Environment variable with the id of the process that a rank must not outlive."""
_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


def end_with_parent() -> None:
    """Let the kernel kill this process, if it is a rank that `launch_ranks` started, when the
    thread that did ends: the main thread of the first rank.

    Python could not: the main thread here may be inside a collective that nothing interrupts. This
    is Linux's; elsewhere there is no NCCL, and gloo tells a rank that its peer has ended.

    Raises:
        SystemExit: if that process has ended already.
    """
    starter = os.environ.pop(STARTED_BY, None)  # not for processes that this one starts
    if starter is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != int(starter):  # before the call above
        sys.exit("error: the process that started this rank has ended.")
