"""Limits on the time, memory and output of a chat template, a program that comes with a tokenizer.

The time limit is a signal (SIGALRM), because a template cannot be interrupted otherwise without a
process of its own. Python delivers signals to the main thread only, which is where records are
tokenized: in `fit`, in the workers of `datasets` and in loader processes. In any other thread, as
on systems without SIGALRM, there is no time limit. The memory limit is the process's address space,
so that one huge string is refused by the allocator instead of filling the machine.
"""

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

SECONDS = 10.0
"""A record takes a template less than a millisecond; a machine may be busy."""
BYTES_PER_SECOND = 1e6
"""A larger record has more time: one second for so many of its bytes."""
SPARE_BYTES = 1 << 30
SPARE_PER_BYTE = 64
MAX_GROWTH = 100
"""The most characters of a rendered text, as a multiple of those of its record and template."""

_MEMORY = Path("/proc/self/statm")


class TemplateLimitError(Exception):
    """A chat template has used up its time or memory. Further records are not tried: it may do so
    for each of them.

    Attributes:
        what: what it does, for the message.
        row: the record, once it is known.
    """

    def __init__(self, what: str, row: int | None = None) -> None:
        super().__init__(what, row)
        self.what, self.row = what, row


@contextmanager
def limit_rendering(record_bytes: int) -> Iterator[None]:
    """Limit time and memory of the block, which renders a record of so many bytes.

    Raises:
        TemplateLimitError: if it takes too long, or asks for too much memory.
    """
    spare = SPARE_BYTES + SPARE_PER_BYTE * record_bytes
    seconds = SECONDS + record_bytes / BYTES_PER_SECOND
    timed = hasattr(signal, "setitimer") and _in_main_thread()
    try:
        with _limit_memory(spare), _limit_time(seconds) if timed else nullcontext():
            yield
    except MemoryError as error:
        what = f"asks for more than {spare >> 20:,} MiB of memory to render this record"
        raise TemplateLimitError(what) from error


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def _limit_time(seconds: float) -> Iterator[None]:
    def expire(*_: object) -> None:
        raise TemplateLimitError(f"takes longer than {seconds:.3g} s to render this record")

    # Else the garbage of others may be collected in here, whose finalizers may take long, as a
    # loader's that waits for its workers: a signal in one is printed and ignored.
    collects_garbage = gc.isenabled()
    gc.disable()
    handler, start = signal.signal(signal.SIGALRM, expire), time.monotonic()
    # It repeats, because Python ignores what is raised while it runs a finalizer.
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if collects_garbage:
            gc.enable()
        if left:  # someone else's alarm, which goes on
            left = max(left - (time.monotonic() - start), 1e-6)
            signal.setitimer(signal.ITIMER_REAL, left, interval)


@contextmanager
def _limit_memory(spare: int) -> Iterator[None]:
    try:
        import resource

        used = int(_MEMORY.read_bytes().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    except (ImportError, OSError):  # not on Linux
        yield
        return
    limits = [used + spare, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def check_growth(text: str, template_and_record: int) -> str:
    """The rendered text, if its length is in proportion to what it was rendered from.

    Raises:
        TemplateLimitError: if it is not.
    """
    if len(text) > MAX_GROWTH * template_and_record:
        raise TemplateLimitError(
            f"writes {len(text):,} characters for this record, more than {MAX_GROWTH} times those "
            "of the record and of itself"
        )
    return text
