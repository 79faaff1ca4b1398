"""Heartbeats: what counts as a lost host, and that nothing else does."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from torch.distributed import HashStore, Store, TCPStore

from kto_lightning.errors import ConfigError
from kto_lightning.strategies import heartbeat
from kto_lightning.strategies.heartbeat import FAILED_READINGS, READINGS, Beat, Heartbeat, Peers
from tests.support.ranks import run_ranks


def value(count: int, ended: str | None = None) -> bytes:
    return Beat(host="beta", address="10.0.0.2", count=count, ended=ended).to_json().encode()


def read_in_turn(peers: Peers, *values: bytes) -> None:
    for one in values:
        peers.read({1: one})


def test_a_rank_whose_beat_stands_still_is_lost():
    peers = Peers()
    read_in_turn(peers, b"", value(1), *[value(2)] * READINGS)
    assert peers.problem(60.0) is None
    peers.read({1: value(2)})
    assert peers.problem(60.0) == (
        "host beta (rank 1) has not answered for 60 s: it is down or cut off, or its process is "
        "stopped. Resume with the same command and --ckpt_path last."
    )
    peers.read({1: value(3)})
    assert peers.problem(60.0) is None


@pytest.mark.parametrize("left", [b"", value(5), value(5, "it failed"), value(5, "")])
def test_what_an_earlier_start_of_the_job_left_is_not_judged(left: bytes):
    peers = Peers()
    read_in_turn(peers, *[left] * (3 * READINGS))
    assert peers.problem(60.0) is None
    assert not peers.has_finished(1)


def test_a_host_has_its_name_from_the_first_reading():
    """Or one that is lost soon after the start would have none."""
    peers = Peers(names={"10.0.0.1": "alpha"})
    peers.read({1: value(7)})
    assert peers.names == {"10.0.0.1": "alpha", "10.0.0.2": "beta"}


def test_a_rank_that_has_finished_may_be_silent():
    peers = Peers()
    read_in_turn(peers, value(1), *[value(2, "")] * (3 * READINGS))
    assert peers.problem(60.0) is None
    assert peers.has_finished(1)


def test_the_error_of_a_rank_is_reported_once_others_had_time_to_meet_it():
    peers = Peers()
    read_in_turn(peers, value(1), *[value(2, "no such file.")] * FAILED_READINGS)
    assert peers.problem(60.0) is None
    peers.read({1: value(2, "no such file.")})
    assert peers.problem(60.0) == "rank 1 on host beta has ended with an error: no such file."


@pytest.mark.parametrize("given", ["soon", "0.5", "nan", "inf"])
def test_a_wrong_time_limit_is_refused(given: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(heartbeat.TIMEOUT_VARIABLE, given)
    with pytest.raises(ConfigError, match=f"must be a number of seconds, at least 1, got '{given}"):
        heartbeat._seconds()


def beating(store: Store, rank: int, seconds: float) -> Heartbeat:
    """The heartbeat of one of two ranks, of which the first watches."""
    beat = Beat(host=("alpha", "beta")[rank], address=f"10.0.0.{rank + 1}")
    options: Any = {"rank": rank, "num_ranks": 2, "watches": rank == 0, "seconds": seconds}
    return Heartbeat(lambda: store, "alpha", beat, **options)


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would have ended this process."""
    found: list[str] = []
    monkeypatch.setattr(Heartbeat, "_exit", lambda self, problem: found.append(problem))
    return found


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_ranks_that_beat_are_not_lost_and_hosts_get_their_names(problems: list[str]):
    store = HashStore()
    one, other = beating(store, 0, 6.0), beating(store, 1, 6.0)
    one.start()
    other.start()
    wait_for(lambda: "10.0.0.2" in one.names)
    other.stop("")
    wait_for(lambda: one._peers.has_finished(1))
    one.stop("")
    assert problems == []
    assert one.names == {"10.0.0.1": "alpha", "10.0.0.2": "beta"}


def test_a_rank_that_no_longer_beats_is_lost(problems: list[str], monkeypatch: pytest.MonkeyPatch):
    store = HashStore()
    one, other = beating(store, 0, 1.2), beating(store, 1, 1.2)
    one.start()
    other.start()
    wait_for(lambda: 1 in one._peers.beats)
    monkeypatch.setattr(other, "_write", lambda store: None)  # as if its process were stopped
    wait_for(lambda: problems)
    one.stop("")
    other.stop("")
    assert problems[0].startswith("host beta (rank 1) has not answered for 1.2 s")


@pytest.mark.parametrize("store_host", ["alpha", "localhost"])
def test_the_host_of_a_store_that_is_gone_is_lost(store_host: str, problems: list[str]):
    """A name that resolves, and whose host has no beat that was read, is one too."""

    def connect() -> Store:
        return TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = server.port
    beat = Beat(host="beta", address="127.0.0.2")
    options: Any = {"rank": 1, "num_ranks": 2, "watches": True, "seconds": 2.4}
    other = Heartbeat(connect, store_host, beat, **options)
    other.start()
    wait_for(lambda: other._readings > 1)
    assert problems == []
    del server
    wait_for(lambda: problems)
    other.stop("")
    assert problems[0].startswith(f"host {store_host} has not answered for 2.4 s")


def end_in_a_thread() -> None:
    """For `prepare` of a job: the watch ends the process, whose main thread waits."""
    rank = beating(HashStore(), 1, 60.0)
    threading.Thread(target=rank._exit, args=("host alpha is gone.",)).start()
    time.sleep(600)


def test_a_lost_host_ends_the_process_although_its_main_thread_waits():
    (ended,) = run_ranks(ranks=1, prepare=end_in_a_thread)
    assert ended.status == 1
    assert ended.err == "[rank 1] error: host alpha is gone.\n"
