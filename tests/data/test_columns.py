"""Columns by name and path, and the names of other tools that are read without being asked for."""

from typing import Any

import pytest

from kto_lightning.data.columns import ColumnMapping, Columns, paths_of, unknown_path_error
from kto_lightning.errors import ConfigError


def fields_of(row: dict[str, Any], **columns: str) -> dict[str, Any]:
    return ColumnMapping(Columns(**columns) if columns else None, row).fields_of(row)


@pytest.mark.parametrize(
    ("row", "path", "found"),
    [
        ({"a": 1}, "a", 1),
        ({"a": {"b": [{"c": 7}]}}, "a.b.0.c", 7),
        ({"a.b": 1, "a": {"b": 2}}, "a.b", 1),  # a key with a dot comes first
        ({"a.b": [5]}, "a.b.0", 5),
        ({"a": {"b.c": {"d": 3}}}, "a.b.c.d", 3),
        ({"a.b": {"x": 0}, "a": {"b": {"c": 2}}}, "a.b.c", 2),
        ({"a": '{"b": [1, 2]}'}, "a.b.1", 2),  # JSON text in a cell
        ({"a": [{"v": [1, 2]}, {"v": 3}, {}]}, "a.*.v", [1, 2, 3]),
        ({"a": None}, "a", None),
    ],
)
def test_what_a_path_finds(row: dict[str, Any], path: str, found: object) -> None:
    assert fields_of(row, label=path)["label"] == found


@pytest.mark.parametrize("path", ["b", "a.x", "a.b.9", "a.b.-1", "a.b.²", "a.b.0.c.d", "a..b"])
def test_what_a_path_does_not_find(path: str) -> None:
    mapping = ColumnMapping(Columns(label=path), ["a"])
    assert "label" not in mapping.fields_of({"a": {"b": [{"c": 7}]}})
    assert mapping.found == {"label": False}


def test_a_named_column_takes_the_place_of_what_else_would_be_read() -> None:
    row = {"q": "Q", "completion": "A", "messages": [1], "chosen": "C", "label": 0, "score": 4}
    assert fields_of(row, prompt="q", completion="completion", label="score") == {
        **{"prompt": "Q", "completion": "A", "label": 4, "q": "Q", "score": 4}
    }
    assert fields_of(row, messages="messages")["messages"] == [1]
    assert "completion" not in fields_of(row, messages="messages")


ALIASED = [
    (
        {"conversations": [1], "kto_tag": True},
        {"conversations": [1], "kto_tag": True, "label": True},
        "read as: label <- kto_tag",
    ),
    (
        {"instruction": "Add.", "input": "1 2", "output": "3", "kto_tag": False},
        {"prompt": "Add.\n1 2", "completion": "3", "label": False},
        "read as: prompt <- instruction, input and history, completion <- output, label <- kto_tag",
    ),
    (
        {"instruction": "b", "output": "B", "history": [["a", "A"]], "kto_tag": True},
        {
            "prompt": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "A"},
                {"role": "user", "content": "b"},
            ]
        },
        None,
    ),
    (
        {
            "input": {"messages": [1], "tools": []},
            "preferred_output": [2],
            "non_preferred_output": [3],
        },
        {"prompt": [1], "tools": [], "chosen": [2], "rejected": [3]},
        "read as: prompt <- input.messages, tools <- input.tools, chosen <- preferred_output, "
        "rejected <- non_preferred_output",
    ),
    (
        {"messages": [1], "rejected_response": "no"},
        {"messages": [1], "rejected": "no"},
        "read as: rejected <- rejected_response",
    ),
    (
        {"messages": [1], "rejected_messages": [2]},
        {"chosen": [1], "rejected": [2]},
        "read as: chosen <- messages, rejected <- rejected_messages",
    ),
    ({"Prompt": "p", " LABEL ": 1}, {"prompt": "p", "label": 1}, "read as: prompt <- Prompt,"),
]


@pytest.mark.parametrize(("row", "expected", "note"), ALIASED)
def test_names_of_other_tools(row: dict[str, Any], expected: dict, note: str | None) -> None:
    mapping = ColumnMapping(None, row)
    found = mapping.fields_of(row)
    assert {key: found[key] for key in expected} == expected
    assert "messages" not in found or "chosen" not in found
    assert note is None or str(mapping.note).startswith(note)


def test_what_is_not_guessed() -> None:
    for row in (
        {"instruction": "Add.", "output": "3", "score": 1},
        {"question": "Q", "answer": "A", "rating": 5},
        {"prompt": "p", "completion": "c", "label": True, "kto_tag": False},
        {"label": 1, "Label": 2},
    ):
        assert ColumnMapping(None, row).fields_of(row) is row
        assert ColumnMapping(None, row).note is None


def test_a_column_that_is_named_is_not_read_as_another_tools() -> None:
    row = {"instruction": "I", "output": "O", "kto_tag": True, "text": "T", "score": 0}
    found = fields_of(row, prompt="text", completion="output")
    assert (found["prompt"], found["completion"], found["label"]) == ("T", "O", True)
    assert fields_of(row, label="score")["label"] == 0
    assert fields_of(row, label="score")["prompt"] == "I"


def test_columns_of_a_table_that_are_read() -> None:
    mapping = ColumnMapping(Columns(prompt="q", label="scores.0.value"), [])
    columns = ["id", "q", "completion", "scores", "images", "embedding"]
    assert mapping.columns_to_read(columns) == ["q", "completion", "scores", "images"]
    assert mapping.label_columns(columns) == ["scores"]


def test_errors_name_the_column() -> None:
    mapping = ColumnMapping(Columns(prompt="q"), [])
    assert (
        mapping.name_columns("'prompt' is null.")
        == "'prompt' is null. ('prompt' is read from 'q'.)"
    )
    assert mapping.name_columns("'label' is null.") == "'label' is null."


def test_a_path_that_no_record_has_is_answered_with_the_nearest() -> None:
    rows = [{"fields": {"prompt": "p"}, "ratings": [{"value": 3}]}]
    seen = [path for row in rows for path in paths_of(row)]
    assert seen == ["fields", "fields.prompt", "ratings", "ratings.0", "ratings.0.value"]
    error = str(unknown_path_error("prompt", "field.prompt", seen, "a.jsonl"))
    assert "--data.columns.prompt field.prompt: no record of a.jsonl has it." in error
    assert "The nearest is fields.prompt. The columns are fields, ratings." in error


@pytest.mark.parametrize(
    "columns", [{"prompt": ""}, {"messages": "a", "completion": "b"}, {"label": "." * 50}]
)
def test_columns_that_cannot_be(columns: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"--data\.columns"):
        Columns(**columns)
