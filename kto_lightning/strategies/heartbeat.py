"""Heartbeats between hosts: a lost host is noticed while the ranks wait for it in a collective.

A collective waits for a host that is gone until the strategy's timeout, half an hour: no packet
says that a cable was pulled out. torchrun's agents watch their own processes only, and NCCL's
watchdog its own collectives. Here every rank writes a count into the store of the process group's
rendezvous (PyTorch's `TCPStore`), over a connection of its own, and the first rank of each host
reads those of all. A count that stands still, or a store that does not answer, for `LOST_AFTER`
seconds ends the process: its main thread cannot be interrupted.

Silence is counted in this process's own readings, not by a clock: a process that was paused itself
takes no other for lost. All ranks on one host need none of this: their launcher watches them.
"""

import json
import math
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import Any

from lightning import Trainer
from torch.distributed import (  # documented there, but not declared as exported
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    Store,  # pyright: ignore[reportPrivateImportUsage]
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)

from kto_lightning.errors import ConfigError, StoppedRun, error_message, printable

LOST_AFTER = 60.0
"""Seconds without an answer after which a host is lost."""
TIMEOUT_VARIABLE = "KTO_LIGHTNING_HOST_TIMEOUT"
"""Environment variable with another number of seconds, the same on all hosts."""
READINGS = 12
"""Readings, and beats of every rank, in that time."""
FAILED_READINGS = 3
"""Readings until the others end after a rank that reported an error: time to meet it themselves."""
_RESUME = "Resume with the same command and --ckpt_path last."


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank writes."""

    host: str
    address: str
    """Of this host, as the store's host sees it."""
    count: int = 0
    ended: str | None = None
    """An error's message; "": the run has ended as it should; None: it goes on."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(slots=True)
class Peers:
    """The other ranks as this one's readings show them. A rank counts from the first change of its
    beat on: before that, it may be one that an earlier start of the same job has left.
    """

    beats: dict[int, Beat] = field(default_factory=dict)
    silent: dict[int, int] = field(default_factory=dict)
    """Readings since the last change, of the ranks that count."""
    names: dict[str, str] = field(default_factory=dict)
    """Of all hosts by their addresses, from the first reading on."""
    _values: dict[int, bytes] = field(default_factory=dict)

    def read(self, values: Mapping[int, bytes]) -> None:
        """Take one reading: the value of every other rank, empty if it has written none yet."""
        for rank, value in values.items():
            if not value:
                self._values.setdefault(rank, value)
                continue
            beat = Beat(**json.loads(value))
            self.names[beat.address] = beat.host
            if value != self._values.setdefault(rank, value):
                self._values[rank], self.silent[rank] = value, 0
                self.beats[rank] = beat
            elif rank in self.silent:
                self.silent[rank] += 1

    def has_finished(self, rank: int) -> bool:
        """Whether a rank has reported that its run ended as it should."""
        return rank in self.beats and self.beats[rank].ended == ""

    def problem(self, seconds: float) -> str | None:
        """Which rank is lost, if any.

        Args:
            seconds: without an answer after which it is, in `READINGS` readings.
        """
        for rank, silent in self.silent.items():
            beat = self.beats[rank]
            if beat.ended and silent >= FAILED_READINGS:
                return f"rank {rank} on host {beat.host} has ended with an error: {beat.ended}"
            if beat.ended is None and silent >= READINGS:
                return _silence(f"host {beat.host} (rank {rank})", seconds)
        return None


@contextmanager
def watch_hosts(trainer: Trainer) -> Iterator[Mapping[str, str]]:
    """End this process within the block if another host is lost; without several hosts, do nothing.

    Yields:
        The names of the hosts by their addresses, as far as they are known.

    Raises:
        ConfigError: if `TIMEOUT_VARIABLE` is not a number of seconds.
    """
    seconds = _seconds()
    if trainer.num_nodes == 1:
        yield {}
        return
    heartbeat = Heartbeat.of(trainer, seconds)
    ended = ""
    try:
        heartbeat.start()
        yield heartbeat.names
    except StoppedRun:  # on all ranks alike; one may be saving longer than the others
        raise
    except BaseException as error:
        ended = error_message(error) or type(error).__name__
        raise
    finally:
        heartbeat.stop(ended)


def _seconds() -> float:
    given = os.environ.get(TIMEOUT_VARIABLE, str(LOST_AFTER))
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 1.0 <= seconds < math.inf:
        raise ConfigError(
            f"the environment variable {TIMEOUT_VARIABLE} must be a number of seconds, at least 1, "
            f"got {given!r}."
        )
    return seconds


def _silence(host: str, seconds: float) -> str:
    return (
        f"{host} has not answered for {seconds:g} s: it is down or cut off, or its process is "
        f"stopped. {_RESUME}"
    )


class Heartbeat:
    """The beats of this rank, and on the first rank of each host the watch over the others.

    Args:
        connect: opens a connection to the store; may wait for it.
        store_host: what a message calls the host of the store.
        beat: the first of this rank.
        rank: of this process.
        num_ranks: of the run.
        watches: whether this rank judges the others.
        seconds: without an answer after which a host is lost.
    """

    def __init__(
        self,
        connect: Callable[[], Store],
        store_host: str,
        beat: Beat,
        *,
        rank: int,
        num_ranks: int,
        watches: bool,
        seconds: float,
    ) -> None:
        self._connect = connect
        self._store_host = store_host
        self._beat = beat
        self._rank = rank
        self._others = [other for other in range(num_ranks) if other != rank]
        self._watches = watches
        self._seconds = seconds
        self._interval = seconds / READINGS
        self._peers = Peers(names={beat.address: beat.host})
        self._readings = 0
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat_until_end, daemon=True)

    @classmethod
    def of(cls, trainer: Trainer, seconds: float) -> "Heartbeat":
        """The heartbeat of a trainer's rank, before or after its process group is there."""
        strategy: Any = trainer.strategy
        environment = strategy.cluster_environment
        address, port = environment.main_address, environment.main_port
        # torchrun's agent serves the store, or else the process of rank 0.
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

        def connect() -> Store:
            store = TCPStore(
                address,
                port,
                is_master=trainer.global_rank == 0 and not by_agent,
                timeout=timedelta(seconds=seconds),
                wait_for_workers=False,
                multi_tenant=True,
            )
            return PrefixStore("kto_lightning/heartbeat", store)

        return cls(
            connect,
            address,
            Beat(host=socket.gethostname(), address=_own_address(address, port)),
            rank=trainer.global_rank,
            num_ranks=trainer.world_size,
            watches=trainer.local_rank == 0,
            seconds=seconds,
        )

    @property
    def names(self) -> Mapping[str, str]:
        """Of the hosts by their addresses, as far as they are known."""
        return self._peers.names

    def start(self) -> None:
        """Begin to beat, and to watch; nobody waits for it."""
        self._beating.start()
        if self._watches:
            threading.Thread(target=self._watch_store, daemon=True).start()

    def stop(self, ended: str) -> None:
        """Tell the others that this rank ends: with an error's message, or "" as it should."""
        self._beat = replace(self._beat, ended=ended)
        self._ended.set()
        self._beating.join(self._interval)

    def _beat_until_end(self) -> None:
        store = None
        while not self._ended.is_set():
            try:
                store = store or self._connect()
                self._write(store)
                if self._watches:
                    self._read(store)
                self._readings += 1
            except RuntimeError:  # the store is not there yet or no more: see `_watch_store`
                store = None
            self._ended.wait(self._interval)
        if store is not None:
            with suppress(RuntimeError):
                self._write(store)

    def _write(self, store: Store) -> None:
        self._beat = replace(self._beat, count=self._beat.count + 1)
        store.set(str(self._rank), self._beat.to_json())

    def _read(self, store: Store) -> None:
        if self._readings == 0:
            for other in self._others:
                store.compare_set(str(other), "", "")  # or reading waits for those that are late
        values = store.multi_get([str(other) for other in self._others])
        self._peers.read(dict(zip(self._others, values, strict=True)))
        problem = self._peers.problem(self._seconds)
        if problem is not None:
            self._exit(problem)

    def _watch_store(self) -> None:
        """End this process if no reading ends for too long: the connection may be silent."""
        before, waited = 0, 0
        while not self._ended.wait(self._interval):
            waited = waited + 1 if before == self._readings else 0
            before = self._readings
            if before and waited >= READINGS and not self._peers.has_finished(0):
                self._exit(_silence(f"host {self._name_of_store_host()}", self._seconds))

    def _name_of_store_host(self) -> str:
        with suppress(OSError, KeyError):  # KeyError: no beat of it was read
            return self.names[socket.gethostbyname(self._store_host)]
        return self._store_host

    def _exit(self, problem: str) -> None:
        if self._ended.is_set():
            return
        prefix = f"[rank {self._rank}] error" if self._rank else "error"
        print(f"{prefix}: {printable(problem)}", file=sys.stderr, flush=True)
        os._exit(1)


def _own_address(address: str, port: int) -> str:
    """This host's address towards another; "" if it cannot be told. Nothing is sent."""
    with suppress(OSError):
        family, *_, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return probe.getsockname()[0]
    return ""
