"""Chainlit threads: judged answers and judged runs, and what is missing."""

import json

import pytest

from kto_lightning.data.importers import find_importer
from kto_lightning.data.rows import SkippedRow
from tests.data.importers.exports import (
    CHAINLIT_STEPS,
    chainlit_step,
    chainlit_thread,
    judged,
    message_of,
    read,
    texts,
)

JUDGED = [
    (["text of s02"], "text of s05", True),
    (["text of s02", "text of s05", "text of s06"], "text of s07", False),
]
USER = chainlit_step("s01", "user_message")


@pytest.mark.parametrize(
    ("rows", "lines"),
    [
        ([chainlit_thread(*CHAINLIT_STEPS)], [1, 1]),
        ([chainlit_thread(*reversed(CHAINLIT_STEPS))], [1, 1]),
        (CHAINLIT_STEPS, [3, 7]),
    ],
    ids=["thread", "in another order", "steps"],
)
def test_judged_answers_and_runs_with_what_came_before(rows: list, lines: list):
    assert find_importer(rows) == "chainlit"
    outcomes = read("chainlit", *rows)
    assert list(map(texts, outcomes)) == JUDGED
    assert [outcome.line for outcome in outcomes] == lines
    assert outcomes[0].value["comment"] == "fine"


def test_threads_follow_each_other():
    other = [step | {"threadId": "other"} for step in CHAINLIT_STEPS]
    assert list(map(texts, read("chainlit", *CHAINLIT_STEPS, *other))) == JUDGED * 2
    thread = chainlit_thread(*CHAINLIT_STEPS)
    assert list(map(texts, read("chainlit", thread, thread))) == JUDGED * 2


def test_steps_without_a_time_keep_their_order():
    steps = [step | {"createdAt": None} for step in CHAINLIT_STEPS]
    assert list(map(texts, read("chainlit", chainlit_thread(*steps)))) == JUDGED


def test_what_is_left_out():
    outcomes = read(
        "chainlit",
        chainlit_thread(USER, chainlit_step("s02", "assistant_message", **judged(None))),
        chainlit_thread(
            USER, chainlit_step("s02", "assistant_message", **judged(1), streaming=True)
        ),
        chainlit_thread(USER, chainlit_step("s02", "assistant_message")),
    )
    assert outcomes == [
        SkippedRow(file="f", line=1, why="without a judgement"),
        SkippedRow(file="f", line=2, why="with an unfinished answer"),
    ]


@pytest.mark.parametrize(
    ("question", "answer", "part"),
    [
        ({"output": ""}, {}, 'the message "s01" must have text'),
        ({}, {"output": None}, "'output', got null"),
        ({}, {"isError": True}, "is an error of the app"),
        ({}, {"type": "user_message"}, "is not the assistant's"),
        ({}, {"type": "tool"}, "has no answer"),
        ({"type": "run"}, {}, "no message of the user stands before"),
        ({}, judged(-1), "'feedback.value' must be 0 or 1, got -1"),
        ({}, judged(2), "'feedback.value' must be 0 or 1, got 2"),
    ],
)
def test_an_incomplete_thread_is_refused(question: dict, answer: dict, part: str):
    step = chainlit_step("s02", "assistant_message", **judged(1)) | answer
    (bad,) = read("chainlit", chainlit_thread(USER | question, step))
    assert part in message_of(bad)


def test_a_message_with_files_is_refused():
    files = [{"id": "e", "type": "image", "forId": "s06"}]
    one, two = read("chainlit", chainlit_thread(*CHAINLIT_STEPS, elements=files))
    assert texts(one) == JUDGED[0]
    assert 'the message "s06" has files' in message_of(two)
    sources = [{"id": "e", "type": "text", "forId": "s05"}]
    assert len(read("chainlit", chainlit_thread(*CHAINLIT_STEPS, elements=sources))) == 2


def test_rows_that_are_no_threads():
    bad, *rest = read("chainlit", {"id": 3}, chainlit_thread(*CHAINLIT_STEPS))
    assert message_of(bad).startswith("must be a thread or a step, got ")
    assert len(rest) == 2


def test_steps_in_a_table_have_json_and_booleans_as_text():
    steps = [
        step
        | {"isError": "False", "streaming": "false"}
        | {"feedback": json.dumps(step["feedback"]) if step.get("feedback") else ""}
        for step in CHAINLIT_STEPS
    ]
    assert list(map(texts, read("chainlit", *steps))) == JUDGED
    assert "is an error of the app" in message_of(
        read("chainlit", *(step | {"isError": "True"} for step in steps))[0]
    )
