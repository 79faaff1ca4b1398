"""Finds conversations with other keys for speaker and text, and judgements of single turns."""

from collections.abc import Iterator, Sequence

from kto_lightning.data.columns import ColumnMapping, Columns
from kto_lightning.data.messages import SHAREGPT_ROLES, is_message
from kto_lightning.data.proposal.facts import ALL, ColumnFacts, columns_of
from kto_lightning.data.proposal.names import word_set
from kto_lightning.data.strict_json import RecordError, parse_json_or_text
from kto_lightning.data.turns import role_of

Found = dict[str, str]
SPEAKER = word_set("speaker author sender who name participant user role_name type by role from")
SAID = word_set("text message content body utterance value said")
ROLES = frozenset(SHAREGPT_ROLES.values())
IN_MESSAGES = ("messages", "role", "content")


def find_conversation(facts: list[ColumnFacts]) -> Found:
    """The list of messages that have other keys than `role` and `content`; nothing without one."""
    by_path = {column.path: column for column in facts}
    for name, text in _inside_lists(facts, SAID):
        for other, speaker in _inside_lists(facts, SPEAKER):
            if other != name or not by_path[f"{name}.0.{text}"].texts:
                continue
            if {"user", "assistant"} <= _roles(by_path, name, speaker) <= ROLES:
                return {"messages": name, "role": speaker, "content": text}
    return {}


def unknown_speakers(facts: list[ColumnFacts]) -> tuple[str, str, list[str]] | None:
    """A list of messages whose speakers are unknown: its path, their key, and the first of them."""
    by_path = {column.path: column for column in facts}
    for name, text in _inside_lists(facts, SAID):
        for other, speaker in _inside_lists(facts, SPEAKER):
            if other == name and by_path[f"{name}.0.{text}"].texts:
                unknown = _roles(by_path, name, speaker) - ROLES
                return name, speaker, sorted(map(str, unknown))[:3]
    return None


def _inside_lists(facts: list[ColumnFacts], names: frozenset[str]) -> Iterator[tuple[str, str]]:
    """The lists with a key of such a name in their first object, each with the path of the key."""
    for column in facts:
        parts = column.path.split(".")
        if parts[-1].lower() in names and "0" in parts and ALL not in parts:
            at = len(parts) - 1 - parts[::-1].index("0")
            name, key = ".".join(parts[:at]), ".".join(parts[at + 1 :])
            if name and key:
                yield name, key


def _roles(by_path: dict[str, ColumnFacts], name: str, speaker: str) -> set[object]:
    paths = (f"{name}.{place}.{speaker}" for place in (ALL, "0"))
    column = next((by_path[path] for path in paths if path in by_path), None)
    cells = [] if column is None else column.cells
    return {role_of(cell) for cell in cells if isinstance(cell, str)}


def inside_answers(rows: Sequence[object], found: Found) -> list[ColumnFacts]:
    """The columns that only the assistant's messages of the conversations have."""
    mapping = _mapping(rows, found)
    messages = [
        message
        for row in rows
        if isinstance(row, dict)
        for message in _messages(mapping.fields_of(row))
    ]
    answers = [m for m in messages if role_of(m.get("role", m.get("from"))) == "assistant"]
    others = [m for m in messages if role_of(m.get("role", m.get("from"))) != "assistant"]
    elsewhere = {column.path for column in columns_of(others) if column.cells}
    return [column for column in columns_of(answers) if column.path not in elsewhere]


def has_unjudged(rows: Sequence[object], found: Found) -> bool:
    """Whether some row has no judged answer, or is none that could have one."""
    mapping = _mapping(rows, found)
    try:
        return not all(
            isinstance(row, dict) and all("label" in judged for judged in mapping.rows_of(row))
            for row in rows
        )
    except RecordError:
        return False


def _mapping(rows: Sequence[object], found: Found) -> ColumnMapping:
    named = {role: path for role, path in found.items() if role in (*IN_MESSAGES, "label")}
    keys = {str(key) for row in rows if isinstance(row, dict) for key in row}
    return ColumnMapping(Columns(**named), keys)


def _messages(fields: dict) -> list[dict]:
    messages = fields.get("messages")
    messages = parse_json_or_text(messages)
    items = messages if isinstance(messages, list) else []
    return [item for item in items if isinstance(item, dict) and is_message(item)]
