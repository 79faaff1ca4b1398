"""Checks of YAML before PyYAML loads it.

Its loader recurses in C: deep nesting is a segmentation fault, an alias inside its own anchor an
endless structure, and aliases of aliases fill the memory.
"""

import re
from typing import Any

import yaml

MAX_DEPTH = 50
MAX_NODES = 100_000
_HOLDS_KEYS = re.compile(r"[{*\n]")
_READER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class RefusedYAML(yaml.YAMLError):
    """What PyYAML would load, or end in."""


def check_yaml(text: str) -> None:
    """Check what loading does not survive, and keys that would silently replace others.

    Raises:
        RefusedYAML: with the line.
        YAMLError: if it is no YAML.
    """
    if len(text) <= MAX_DEPTH and not _HOLDS_KEYS.search(text):  # it cannot nest deeper
        return
    open_nodes: list[_Node] = []
    sizes: dict[str, int] = {}
    for event in yaml.parse(text, Loader=_READER):
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            open_nodes.append(_Node(event))
            if len(open_nodes) > MAX_DEPTH:
                raise _problem(event, f"it is nested more than {MAX_DEPTH} levels deep")
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            node = open_nodes.pop()
            _add(event, node.size, node.anchor, open_nodes, sizes)
        elif isinstance(event, yaml.ScalarEvent):
            _add(event, 1, event.anchor, open_nodes, sizes)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in {node.anchor for node in open_nodes}:
                raise _problem(event, f"*{event.anchor} stands inside its own &{event.anchor}")
            _add(event, sizes.get(event.anchor, 1), None, open_nodes, sizes)


def _add(
    event: Any, size: int, anchor: str | None, open_nodes: list["_Node"], sizes: dict[str, int]
) -> None:
    """Add a complete value to the node around it, and remember its size under its anchor."""
    if anchor is not None:
        sizes[anchor] = size
    if open_nodes:
        open_nodes[-1].add(event, size)
        if open_nodes[-1].size > MAX_NODES:
            raise _problem(event, f"its aliases stand for more than {MAX_NODES} values")


class _Node:
    """A mapping or sequence that has begun and not ended."""

    def __init__(self, event: Any) -> None:
        self.anchor, self.size = event.anchor, 1
        self._keys: set[str] | None = set() if isinstance(event, yaml.MappingStartEvent) else None
        self._is_key = True

    def add(self, event: Any, size: int) -> None:
        self.size += size
        if self._keys is None:
            return
        is_name = self._is_key and isinstance(event, yaml.ScalarEvent)
        if is_name and event.value != "<<":  # which merges, and may stand twice
            if event.value in self._keys:
                raise _problem(event, f"the key '{event.value}' is there twice")
            self._keys.add(event.value)
        self._is_key = not self._is_key


def _problem(event: Any, problem: str) -> RefusedYAML:
    return RefusedYAML(f"line {event.start_mark.line + 1}: {problem}")
