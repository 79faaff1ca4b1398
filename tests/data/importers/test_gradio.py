"""Gradio chat logs: the cells of the file, the place of the judged answer, thoughts."""

import csv
from pathlib import Path

import pytest

from kto_lightning.data.importers import IMPORTERS, find_importer
from kto_lightning.data.rows import Row, SkippedRow
from kto_lightning.data.sources import expand
from tests.data.importers.exports import (
    GRADIO_CHAT,
    chat_log,
    gradio_message,
    message_of,
    read,
    texts,
)

PAIRS = [["q1", "a1"], ["q2", "a2"], ["q3", None]]


@pytest.mark.parametrize(
    ("conversation", "first", "last"),
    [
        (GRADIO_CHAT, [1, 1], [3, 4]),
        (GRADIO_CHAT, 1, 4),
        (PAIRS, [0, 1], [1, 1]),
        (
            [
                item | {"content": [{"text": item["content"], "type": "text"}]}
                for item in GRADIO_CHAT
            ],
            [1, 1],
            [3, 4],
        ),
    ],
    ids=["messages", "an index", "tuples", "parts"],
)
def test_the_judged_answer_and_what_came_before_it(conversation: list, first: list, last: list):
    rows = [chat_log(conversation, first), chat_log(conversation, last, "Dislike")]
    assert find_importer(rows) == "gradio"
    one, two = read("gradio", *rows)
    assert texts(one) == (["q1"], "a1", True)
    assert texts(two) == (["q1", "a1", "q2"], "a2", False)


def test_the_file_has_other_cells_than_its_header_says(tmp_path: Path):
    row = chat_log([["a,-b", "c"]], [0, 1])
    cells = ["'" + row["conversation"], [0, 1], row["value"], row["timestamp"]]
    with open(tmp_path / "log.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerow(["conversation", "index", "value", "flag", "timestamp"])
        csv.writer(file).writerows([cells, [*cells, "a fifth"], cells[:3]])
    (source,) = expand(str(tmp_path / "log.csv"))
    rows = list(source.rows())
    assert find_importer([row.value for row in rows if isinstance(row, Row)]) == "gradio"
    first, second, short = IMPORTERS["gradio"].records(iter(rows))
    assert texts(first) == texts(second) == (["a,-b"], "c", True)
    assert "5 cells are needed, one per column, got 3" in message_of(short)


def test_thoughts_are_the_reasoning_of_the_answer():
    (row,) = read("gradio", chat_log(GRADIO_CHAT, [3, 4]))
    (answer,) = row.value["completion"]
    assert answer["reasoning_content"] == "Hm."
    assert "reasoning_content" not in row.value["prompt"][1]


def test_texts_of_one_group_are_one_answer():
    chat = [*GRADIO_CHAT[:2], gradio_message("assistant", "And more.")]
    (row,) = read("gradio", chat_log(chat, [1, 2]))
    assert texts(row) == (["q1"], "a1\nAnd more.", True)


def test_another_option_stays_a_word():
    (row,) = read("gradio", chat_log(GRADIO_CHAT, 1, "Spam"))
    assert (row.value["label"], row.value["value"]) == ("Spam", "Spam")


@pytest.mark.parametrize("value", [None, ""])
def test_a_judgement_taken_back_is_left_out(value: str | None):
    (skipped,) = read("gradio", chat_log(GRADIO_CHAT, 1, value))
    assert skipped == SkippedRow(file="f", line=1, why="without a judgement")


FILE = gradio_message("user", "", content={"path": "cat.png"})


@pytest.mark.parametrize(
    ("conversation", "index", "part"),
    [
        (GRADIO_CHAT, [0, 0], 'not the assistant\'s, its role is "user"'),
        (GRADIO_CHAT, [9, 9], "'index' must be the place of an answer"),
        (GRADIO_CHAT, True, "'index' must be the place of an answer"),
        (GRADIO_CHAT, "x", "'index' must be the place of an answer"),
        (PAIRS, [2, 1], "'index' must be the place of an answer"),
        (GRADIO_CHAT[1:2], [0, 0], "no message of the user stands before"),
        ([FILE, *GRADIO_CHAT], [2, 2], "item 1 of 'conversation' holds more than text"),
        ([[["cat.png"], "a1"]], [0, 1], "item 1 of 'conversation' holds more than text"),
        ([["q1", [{"file": {"path": "x"}}]]], [0, 1], "holds more than text"),
        ([["q1", " "]], [0, 1], "an answer in the conversation has no text"),
        ([["q1"]], [0, 1], "item 1 of 'conversation' must be a message or a question"),
        ([gradio_message("tool", "x")], 0, "item 1 of 'conversation' must be a message"),
    ],
)
def test_an_incomplete_conversation_is_refused(conversation: list, index: object, part: str):
    (bad,) = read("gradio", chat_log(conversation, index))
    assert part in message_of(bad)


def test_cells_that_are_not_json_are_refused():
    (bad,) = read("gradio", chat_log(GRADIO_CHAT, 1) | {"conversation": "[{'role': 'user'}]"})
    assert message_of(bad).startswith("'conversation' is invalid JSON")
    (bad,) = read("gradio", {"index": 1})
    assert message_of(bad).startswith("a judgement must have 'conversation'")
