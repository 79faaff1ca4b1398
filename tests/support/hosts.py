"""Two hosts on one machine: network namespaces with addresses and host names of their own.

Both see the same files, as hosts with a shared file system do. They are joined by a bridge in a
third namespace, from which a host can be detached: its packets are then dropped without an answer,
as by a cable that is pulled out of a switch.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.support.cli import ROOT

NAMES = ("alpha", "beta")
INTERFACE = "eth0"
PORT = 29400
TIME_LIMIT = 180.0
"""Seconds after which a job is regarded as hanging; its processes import everything."""


@dataclass(slots=True)
class Running:
    """A command that runs on a host, with its output in a file."""

    process: subprocess.Popen[bytes]
    file: Path

    @property
    def output(self) -> str:
        """Stdout and stderr so far."""
        return self.file.read_text(errors="replace")

    def wait(self, seconds: float = TIME_LIMIT) -> int:
        """The exit status; AssertionError if the command still runs after some seconds."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the command hangs\n{self.output}") from None


@dataclass(slots=True)
class Host:
    """A network namespace with an address and a host name."""

    name: str
    address: str
    namespace: str
    switch: str
    """The namespace of the bridge, where this host's port has its name."""
    names: Path
    """The addresses of both hosts, in place of /etc/hosts."""
    started: list[Running] = field(default_factory=list)

    def start(self, *arguments: Any, file: Path, cwd: Path = ROOT, **environment: str) -> Running:
        """Run `python` with these arguments on this host."""
        # Within the mount namespace that `ip netns exec` makes for the command alone.
        script = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        named = ("unshare", "--uts", "sh", "-c", script, self.name, self.names)
        command = ("ip", "netns", "exec", self.namespace, *named, sys.executable)
        settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": INTERFACE}
        settings["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"
        with file.open("ab") as output:
            process = subprocess.Popen(
                [*command, *map(str, arguments)],
                cwd=cwd,
                env=os.environ | settings | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.started.append(Running(process, file))
        return self.started[-1]

    def cut(self) -> None:
        """Drop all packets from and to this host."""
        _ip("-n", self.switch, "link", "set", self.name, "nomaster")

    def join(self) -> None:
        """Undo `cut`."""
        _ip("-n", self.switch, "link", "set", self.name, "master", "bridge")

    def processes(self) -> list[int]:
        """Ids of all processes on this host."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def kill(self) -> None:
        """Kill all processes on this host; its kernel still closes their connections."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        for running in self.started:
            running.process.wait()


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other; skips the test where namespaces may not be created."""
    prefix = f"kto{os.getpid()}"
    switch = f"{prefix}-switch"
    with TemporaryDirectory(prefix="kto_lightning_hosts_") as directory:
        names = Path(directory) / "hosts"
        hosts = [
            Host(name, f"10.77.0.{number}", f"{prefix}-{name}", switch, names)
            for number, name in enumerate(NAMES, start=1)
        ]
        lines = ["127.0.0.1 localhost", *(f"{host.address} {host.name}" for host in hosts)]
        names.write_text("\n".join(lines) + "\n")
        try:
            _create(switch, hosts)
        except (OSError, subprocess.CalledProcessError) as error:
            _remove(switch, hosts)
            reason = getattr(error, "stderr", None) or error
            pytest.skip(f"network namespaces cannot be created here: {reason}")
        try:
            yield hosts[0], hosts[1]
        finally:
            for host in hosts:
                host.kill()
            _remove(switch, hosts)


def wait_until(
    condition: Callable[[], bool], *running: Running, seconds: float = TIME_LIMIT
) -> None:
    """Wait until a condition is true; AssertionError with all output if it never is."""
    until = time.monotonic() + seconds
    while not condition():
        ended = running and all(one.process.poll() is not None for one in running)
        if ended or time.monotonic() > until:
            raise AssertionError("\n".join(["never true", *(one.output for one in running)]))
        time.sleep(0.05)


def _create(switch: str, hosts: list[Host]) -> None:
    _ip("netns", "add", switch)
    _ip("-n", switch, "link", "add", "bridge", "type", "bridge", "forward_delay", "0")
    _ip("-n", switch, "link", "set", "bridge", "up")
    for host in hosts:
        _ip("netns", "add", host.namespace)
        peer = ("peer", "name", INTERFACE, "netns", host.namespace)
        _ip("-n", switch, "link", "add", host.name, "type", "veth", *peer)
        host.join()
        _ip("-n", switch, "link", "set", host.name, "up")
        _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", INTERFACE)
        for interface in ("lo", INTERFACE):
            _ip("-n", host.namespace, "link", "set", interface, "up")


def _remove(switch: str, hosts: list[Host]) -> None:
    for namespace in (switch, *(host.namespace for host in hosts)):
        subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout
