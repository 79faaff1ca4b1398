"""`Importer`: how one tool's export is recognised and turned into rows of our own form."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from kto_lightning.data.rows import BadRecord, Row, SkippedRow
from kto_lightning.data.strict_json import RecordError, parse_json_or_text, quote

Judged = dict[str, object] | str | RecordError
"""What became of one judged answer: a row in our own form, why it is left out, or what is wrong."""
RowReader = Callable[[Iterator[Row | BadRecord]], Iterator[Row | BadRecord | SkippedRow]]

NO_JUDGEMENT = "without a judgement"
UNFINISHED = "with an unfinished answer"


@dataclass(frozen=True, kw_only=True, slots=True)
class Importer:
    """The importer of one tool's export."""

    what: str
    """The export that it reads, for messages: `an Open WebUI feedback history`."""
    matches: Callable[[Sequence[object]], bool]
    """Whether the values of a file's first rows have the structure of the export."""
    records: RowReader
    """Turns the rows of an export into rows with `prompt`, `completion` and `label`, one for each
    judged answer, with what else the judgement says as further keys."""
    nothing_found: str
    """What to say of an export without a single judged answer."""


def most(rows: Sequence[object], test: Callable[[dict], bool]) -> bool:
    """Whether more than half of the rows are objects that pass the test."""
    return sum(isinstance(row, dict) and test(row) for row in rows) * 2 > len(rows)


def read_each(
    rows: Iterable[Row | BadRecord], judge: Callable[[object], Iterator[Judged]]
) -> Iterator[Row | BadRecord | SkippedRow]:
    """Read an export whose rows do not depend on each other."""
    for row in rows:
        if isinstance(row, BadRecord):
            yield row
        else:
            for judged in judge(row.value):
                yield to_row(row, judged)


def read_groups(
    rows: Iterable[Row | BadRecord],
    key: Callable[[object], object],
    judge: Callable[[list[Row]], Iterator[Row | BadRecord | SkippedRow]],
) -> Iterator[Row | BadRecord | SkippedRow]:
    """Read an export in which consecutive rows with the same key belong together."""
    for group in _grouped(rows, key):
        if isinstance(group, BadRecord):
            yield group
        else:
            yield from judge(group)


def _grouped(
    rows: Iterable[Row | BadRecord], key: Callable[[object], object]
) -> Iterator[list[Row] | BadRecord]:
    """Consecutive rows with the same key; a row whose key is None stands alone."""
    group: list[Row] = []
    last: object = None
    for row in rows:
        if isinstance(row, BadRecord):
            yield row
            continue
        current = key(row.value)
        if group and (current is None or current != last):
            yield group
            group = []
        group.append(row)
        last = current
    if group:
        yield group


def to_row(row: Row, judged: Judged) -> Row | BadRecord | SkippedRow:
    """What became of a judged answer, at the place of the row that holds the judgement."""
    if isinstance(judged, RecordError):
        return BadRecord(file=row.file, line=row.line, message=str(judged), kind=judged.kind)
    if isinstance(judged, str):
        return SkippedRow(file=row.file, line=row.line, why=judged)
    return Row(file=row.file, line=row.line, value=judged)


def make_record(
    messages: list[dict], label: bool | str, system: object = None, **judgement: object
) -> dict[str, object]:
    """A row in our own form, from the messages of a branch up to the judged answer.

    Args:
        messages: from the first one of the conversation; the last one was judged.
        label: whether it is desirable, or a word of which the tool does not tell it.
        system: the system prompt of the conversation; blank or no text is none.
        judgement: what else the judgement says.

    Raises:
        RecordError: if the last message is not the assistant's or nothing was asked before it.
    """
    *prompt, answer = messages
    if answer["role"] != "assistant":
        raise RecordError(
            f"the judged message is not the assistant's, its role is {quote(answer['role'])}. "
            "Remove the judgement.",
            kind="the judged message is not the assistant's",
        )
    if not any(message["role"] == "user" for message in prompt):
        raise RecordError(
            "no message of the user stands before the judged answer. Remove the judgement."
        )
    if isinstance(system, str) and system.strip():
        prompt.insert(0, {"role": "system", "content": system})
    return {"prompt": prompt, "completion": [answer], "label": label, **judgement}


def flag(value: object) -> object:
    """A boolean, also where a table has it as a word; any other value as it is."""
    words = {"true": True, "false": False}
    return words.get(value.casefold(), value) if isinstance(value, str) else value


def refusal(message: object, what: str) -> RecordError:
    """The error for a message of a judged conversation that cannot be trained on.

    Args:
        message: its id or number.
        what: such as `has files`; what follows `, got ` is the value got.
    """
    kind = f"a message {what}".split(", got ", 1)[0]
    return RecordError(f"the message {quote(message)} {what}. Remove the judgement.", kind=kind)


def at(value: object, *keys: str) -> object:
    """The value at a path of keys, also in the JSON text of a cell; None where there is none."""
    for key in keys:
        if isinstance(value, str) and value.startswith("{"):
            value = parse_json_or_text(value)
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value
