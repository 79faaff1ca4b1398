"""Standard streams that never end a run: a closed pipe, a full disk, a closed descriptor."""

import errno
import io
import os
import select
import sys
from typing import Any, TextIO


class _DroppingFile(io.FileIO):
    """Writes to a descriptor of the process; what cannot be written is dropped.

    Attributes:
        error: of the first bytes that were dropped; None: all were written.
    """

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            while (written := super().write(data)) is None:  # a slow reader of a non-blocking pipe
                select.select([], [self], [])
        except OSError as error:
            self.error = self.error or error
            return len(data)
        return written


def protect_streams() -> None:
    """Replace this process's stdin, stdout and stderr by streams that raise no `OSError`.

    A closed descriptor is opened on the null device first: the next file that is opened would get
    its number, and with it what libraries print.
    """
    if os.name != "posix":
        return
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
            os.set_inheritable(opened, True)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 (open as long as the process)
    sys.stdout = _protected(sys.stdout, 1, errors="replace")  # for a terminal limited to ASCII
    sys.stderr = _protected(sys.stderr, 2, errors="backslashreplace")


def lost_output() -> OSError | None:
    """Why stdout lost something that was printed; None if it did not, or nobody reads it."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    error = raw.error if isinstance(raw, _DroppingFile) else None
    return None if error is not None and error.errno == errno.EPIPE else error


def _protected(stream: TextIO | None, descriptor: int, *, errors: str) -> TextIO:
    file = _DroppingFile(descriptor, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(file),
        encoding=None if stream is None else stream.encoding,
        errors=errors,
        line_buffering=stream is not None and bool(stream.line_buffering),
        write_through=isinstance(stream, io.TextIOWrapper) and stream.write_through,
    )
