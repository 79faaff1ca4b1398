"""One OUTPUT, one run: a lock file with the process and host that hold it.

`OUTPUT/run.lock` is locked by `flock`, which the kernel releases when its holder ends, in whatever
way: on one machine a lock that is held is never stale, and no process id has to be believed. Across
machines `flock` depends on the file system (NFS passes it on, some mounts and Lustre do not), so
the holder also renews the file's time of change, and a process on another host watches that time,
as the file server tells it, for `WATCHED` seconds: if it stands still, the holder has ended. A job
that SLURM requeues has its old job id and needs not watch.

The file is removed at a run's end. One that is left names a run that was killed.
"""

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kto_lightning.errors import ConfigError

try:
    import fcntl
except ImportError:  # not a POSIX system: what the file says must do
    fcntl = None

NAME = "run.lock"
RENEWED_EVERY = 5.0
"""Seconds between two renewals of the file's time of change."""
WATCHED = 4 * RENEWED_EVERY
"""Seconds without a renewal after which a holder on another host has ended."""
PATIENCE = 3.0
"""Seconds to wait for a holder on this machine: a killed process takes a moment to end."""
_NOT_SUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL}
_SHOWN = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """A process that runs `fit`."""

    pid: int
    host: str
    started: str
    """The host's boot and when the process started since; it tells two of the same id apart."""
    job: str | None = None
    """SLURM's job id."""

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host[:_SHOWN]}"

    @property
    def is_here(self) -> bool:
        """Whether the process ran on this host, since it was booted."""
        boot = self.started.partition(" ")[0]
        return self.host == socket.gethostname() and boot == _boot()

    @property
    def runs_here(self) -> bool:
        """Whether the process still runs on this host."""
        return self.is_here and self.started == _start_of(self.pid)


def this_process() -> Holder:
    """The process that calls this, as a holder."""
    pid = os.getpid()
    return Holder(
        pid=pid,
        host=socket.gethostname(),
        started=_start_of(pid) or "unknown",
        job=os.environ.get("SLURM_JOB_ID"),
    )


def _boot() -> str:
    """An id of this host's last boot; the same where it cannot be told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return "unknown"


def _start_of(pid: int) -> str | None:
    """When a process of this host started, since which boot; None if it has ended.

    Without `/proc` every process that exists is taken for the one that is meant.
    """
    if not os.path.exists("/proc/self/stat"):
        try:
            os.kill(pid, 0)
        except (OSError, OverflowError):
            return None
        return f"{_boot()} unknown"
    try:
        # After the command, which may contain anything, up to its last parenthesis.
        values = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if values[0] in (b"Z", b"X") else f"{_boot()} {int(values[19])}"
    except (OSError, ValueError, IndexError):
        return None


@contextmanager
def run_lock(output_dir: str | Path) -> Iterator[None]:
    """Hold an OUTPUT for the block; what another process left when it was killed is taken over.

    Raises:
        ConfigError: if another run holds it, with its process and host.
        OSError: if the directory cannot be written.
    """
    path = Path(output_dir) / NAME
    created = _make_directories(path.parent)
    try:
        file = _acquire(path)
    except BaseException:
        _remove_empty(created)
        raise
    _open_locks.add(file)
    ended = threading.Event()
    try:
        _write(file, this_process())
        threading.Thread(target=_renew, args=(file, ended), daemon=True).start()
        yield
    finally:
        ended.set()
        _open_locks.discard(file)
        with suppress(OSError):
            path.unlink()  # before the lock is released: who opened it by then tries again
        os.close(file)
        _remove_empty(created)


def _make_directories(directory: Path) -> list[Path]:
    """Make a directory; returns those that did not exist, the innermost first."""
    missing = [d for d in (directory, *directory.parents) if not d.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(directories: list[Path]) -> None:
    with suppress(OSError):  # not empty
        for directory in directories:
            directory.rmdir()


def _acquire(path: Path) -> int:
    """The locked file's descriptor."""
    until = time.monotonic() + PATIENCE
    while True:
        file = _open(path)
        try:
            if _try_lock(file):
                if _is_at(file, path):
                    _check_left_by_dead(file, path)
                    return file
            elif time.monotonic() > until:
                raise _in_use(path, _read(file))
        except BaseException:
            os.close(file)
            raise
        os.close(file)
        time.sleep(0.05)


def _open(path: Path) -> int:
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is not a regular file. Remove it.")
    return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)


def _try_lock(file: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _NOT_SUPPORTED
    return True


def _is_at(file: int, path: Path) -> bool:
    """Whether the file is the one at `path`, and not one that its holder has just removed."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except OSError:
        return False


def _check_left_by_dead(file: int, path: Path) -> None:
    """Check that the holder that the file names has ended, where the lock alone does not tell.

    Raises:
        ConfigError: if it has not.
    """
    holder, own = _read(file), this_process()
    if holder is None or (holder.pid, holder.host, holder.started) == (
        own.pid,
        own.host,
        own.started,
    ):
        return
    same_job = holder.job is not None and holder.job == own.job
    if holder.runs_here or not (holder.is_here or same_job or _stands_still(path)):
        raise _in_use(path, holder)


def _stands_still(path: Path) -> bool:
    """Whether the file is not renewed for `WATCHED` seconds. Opened anew each time, because NFS
    answers from a cache otherwise."""
    before, until = _changed(path), time.monotonic() + WATCHED
    while time.monotonic() < until:
        time.sleep(WATCHED / 40)
        if _changed(path) != before:
            return False
    return True


def _changed(path: Path) -> int:
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _in_use(path: Path, holder: Holder | None) -> ConfigError:
    who = holder or "another process"
    return ConfigError(
        f"--output_dir {path.parent} is in use by a run: {who}. Wait for its end or stop it, or "
        "give another --output_dir."
    )


def _write(file: int, holder: Holder) -> None:
    text = json.dumps(asdict(holder)).encode() + b"\n"
    os.ftruncate(file, 0)
    os.lseek(file, 0, os.SEEK_SET)
    os.write(file, text)


def _read(file: int) -> Holder | None:
    os.lseek(file, 0, os.SEEK_SET)
    return holder_from(os.read(file, 4096))


def holder_from(content: Any) -> Holder | None:
    """A holder from its JSON, or from what that holds; None if it is none."""
    try:
        found = json.loads(content) if isinstance(content, bytes) else content
        job = found.get("job")
        return Holder(
            pid=int(found["pid"]),
            host=str(found["host"]),
            started=str(found["started"]),
            job=None if job is None else str(job),
        )
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError):
        return None


def is_running(output_dir: str | Path, holder: Holder) -> bool:
    """Whether the run of a holder still runs; on another host, whether it was renewed lately."""
    if holder.is_here:
        return holder.runs_here
    try:
        age = time.time() - (Path(output_dir) / NAME).stat().st_mtime
    except OSError:
        return False
    return age < 2 * WATCHED


def _renew(file: int, ended: threading.Event) -> None:
    while not ended.wait(RENEWED_EVERY):
        with suppress(OSError):  # closed at this moment, or the file server is away
            os.utime(file)


_open_locks: set[int] = set()
"""Descriptors of locks held by this process."""


def _close_in_child() -> None:
    """Close locks in a forked process, such as a loader worker, which may outlive the run."""
    for file in _open_locks:
        with suppress(OSError):
            os.close(file)
    _open_locks.clear()


_register: Callable[..., None] | None = getattr(os, "register_at_fork", None)
if _register is not None:
    _register(after_in_child=_close_in_child)
