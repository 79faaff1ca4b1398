"""What every fuzzer shares: odd values, mutations of valid files, and the property to hold.

A command given any input ends with exit status 0, or with 1 or 2 and a message that names the
place; never with a traceback, never beyond bounds of time and memory.
"""

import copy
import json
import os
import re
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.support.cli import run_cli

SCALE = float(os.environ.get("KTO_FUZZ_SCALE", "1"))
"""How many times the examples of `make test` a fuzzer tries; `make fuzz` raises it."""
SECONDS = 120
"""The longest that one command may take, far above what any of them needs."""
MEBIBYTES = 600
"""The most by which one command may raise the process's peak of memory."""
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def fuzz(max_examples: int) -> Callable:
    """Settings of a fuzzer that tries so many examples in `make test`."""
    return settings(
        max_examples=max(1, int(max_examples * SCALE)),
        deadline=None,
        derandomize=SCALE == 1,  # `make test` tries the same inputs every time
        suppress_health_check=list(HealthCheck),  # examples are files, and commands take a second
    )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a command ended."""

    status: int
    out: str
    err: str


def run_within_bounds(*arguments: Any, names: str | tuple[str, ...] = ()) -> Outcome:
    """Run a command in this process and assert the property above.

    Args:
        arguments: of `python -m kto_lightning`.
        names: what a message of failure must name, at least one of them: a file, an option.
    """
    out, err = StringIO(), StringIO()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with _time_limit(SECONDS), redirect_stdout(out), redirect_stderr(err):
        try:
            status = run_cli(*arguments)
        except Exception:
            err.write(traceback.format_exc())
            status = -1
    raised = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    outcome = Outcome(status=status, out=out.getvalue(), err=err.getvalue())
    assert status in (0, 1, 2), outcome.err
    assert "Traceback" not in outcome.err, outcome.err
    assert raised < MEBIBYTES, f"{raised:.0f} MiB more: {outcome}"
    for stream in (outcome.out, outcome.err):
        found = _CONTROLS.search(stream)
        assert found is None, f"control character {found!r} in {stream!r}"
    if status:
        assert "error:" in outcome.err, outcome
        names = (names,) if isinstance(names, str) else names
        assert not names or any(name in outcome.err for name in names), outcome
    return outcome


class _TookTooLong(BaseException):
    """Not an `Exception`, so that no handler of the command takes it for a fault of the input."""


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _TookTooLong(f"the command ran for more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


ODD_TEXT = st.one_of(
    st.sampled_from(
        (
            *("", " ", "\n", "\x00", "\x1b[31mred\x1b[0m", "\x9b2J", "\u202eevil", "[/INST]"),
            *("[bold]", "{{ 7 * 7 }}", "{% for %}", "<script>alert(1)</script>", "</script>"),
            *(
                "../../etc/passwd",
                "~",
                "~nobody",
                "C:\\x",
                "a" * 100_000,
                "👍",
                "e\u0301",
                "\ufeff",
            ),
            *("NaN", "1e400", "true", "null", "---\nx: y", "`rm`", "|a|b|", "=1+1", "\ud7ff"),
            *("<|endoftext|>", "<|im_end|>", "<think>a</think>", "<image>", "\r", "\u2028"),
        )
    ),
    st.text(max_size=40),
)
ODD_NUMBERS = st.one_of(
    st.integers(-3, 6),
    st.sampled_from((10**20, -(10**20), 10**400, 2**31, 2**63, -1, 0)),
    st.floats(),
)
ODD_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), ODD_NUMBERS, ODD_TEXT),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(ODD_TEXT, inner, max_size=4)
    ),
    max_leaves=8,
)


def deep(depth: int) -> Any:
    """Lists within lists."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


@st.composite
def mutated_json(draw: st.DrawFn, document: Any, *, most: int = 3) -> Any:
    """A document in which a few values, at any depth, are replaced, removed, renamed or doubled."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, most))):
        places = list(_places(document))
        if not places:
            return draw(ODD_VALUES)
        parent, key = draw(st.sampled_from(places))
        change = draw(st.sampled_from(("replace", "replace", "remove", "rename", "nest", "double")))
        value = parent[key]
        if change == "remove":
            del parent[key]
        elif change == "rename" and isinstance(parent, dict):
            parent[draw(ODD_TEXT)] = parent.pop(key)
        elif change == "nest":
            parent[key] = draw(st.sampled_from(([value], {"x": value}, deep(300))))
        elif change == "double" and isinstance(value, (list, str)):
            parent[key] = value + value
        else:
            parent[key] = draw(ODD_VALUES)
    return document


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """All (container, key) pairs in a document."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    if isinstance(value, (dict, list)):
        for key in list(keys):
            yield value, key
            if isinstance(value[key], (dict, list)):
                yield from _places(value[key])


def to_json(value: Any) -> bytes:
    """JSON with all that Python writes beyond it: NaN, Infinity, unpaired surrogates as escapes."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)
    try:
        return json.dumps(value).encode()
    finally:
        sys.setrecursionlimit(limit)


@st.composite
def mutated_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Content with a flipped bit, a cut, a doubled or removed stretch, or odd bytes put in."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        if not content:
            break
        start = draw(st.integers(0, len(content) - 1))
        end = min(len(content), start + draw(st.integers(1, 64)))
        change = draw(
            st.sampled_from(("flip", "flip", "cut", "remove", "double", "insert", "zero"))
        )
        if change == "flip":
            content[start] ^= 1 << draw(st.integers(0, 7))
        elif change == "cut":
            del content[start:]
        elif change == "remove":
            del content[start:end]
        elif change == "double":
            content[start:start] = content[start:end]
        elif change == "insert":
            odd = (b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n\n", b'"', b"{", b"\xc3")
            content[start:start] = draw(st.sampled_from(odd))
        else:
            content[start:end] = bytes(end - start)
    return bytes(content)
