"""LibreChat: the forms of an exported conversation, parts of content, and what is missing."""

import copy
import json

import pytest

from kto_lightning.data.importers import find_importer
from kto_lightning.data.rows import Row, SkippedRow
from tests.data.importers.exports import (
    LIBRE_BRANCHES,
    LIBRECHAT_ROOT,
    down,
    libre_conversation,
    libre_message,
    message_of,
    read,
    texts,
    up,
)

JUDGED = [
    (["text of u1"], "text of a1", False),
    (["text of u1", "text of a1", "text of u2"], "text of a3", True),
]


def _nested() -> list[dict]:
    """The messages of `LIBRE_BRANCHES` in the recursive form."""
    messages = {item["messageId"]: item | {"children": []} for item in map(dict, LIBRE_BRANCHES)}
    for item in messages.values():
        parent = messages.get(item["parentMessageId"])
        if parent is not None:
            parent["children"].append(item)
    return [messages["u1"], messages["u3"]]


@pytest.mark.parametrize(
    ("rows", "lines"),
    [
        (list(LIBRE_BRANCHES), [2, 5]),
        ([libre_conversation(*LIBRE_BRANCHES)], [1, 1]),
        (_nested(), [1, 1]),
        ([libre_conversation(*_nested(), recursive=True)], [1, 1]),
        ([libre_conversation(messages=None, messagesTree=_nested(), recursive=True)], [1, 1]),
    ],
    ids=["messages", "conversation", "nested messages", "recursive", "messagesTree"],
)
def test_every_judged_answer_with_its_branch_in_every_form(rows: list, lines: list):
    assert find_importer(rows) == "librechat"
    outcomes = read("librechat", *rows)
    assert sorted(map(texts, outcomes), key=str) == sorted(JUDGED, key=str)
    assert [outcome.line for outcome in outcomes] == lines


def test_conversations_follow_each_other():
    second = [message | {"conversationId": "d"} for message in LIBRE_BRANCHES]
    assert len(read("librechat", *LIBRE_BRANCHES, *second)) == 4
    assert len(read("librechat", *[libre_conversation(*LIBRE_BRANCHES)] * 3)) == 6
    bad = read("librechat", LIBRE_BRANCHES[0], second[0], LIBRE_BRANCHES[1])[-1]
    assert 'the message "u1" is missing' in message_of(bad)
    assert bad.line == 3


def test_what_else_the_judgement_says_has_keys_of_its_own():
    tag = {"key": "clear_well_written", "label": "l", "direction": "thumbsUp"}
    messages = (libre_message("u1"), libre_message("a1", "u1", model="m", **up(tag=tag)))
    (row,) = read("librechat", libre_conversation(*messages))
    extra = {key: row.value[key] for key in ("tag", "comment", "model")}
    assert extra == {"tag": "clear_well_written", "comment": "ok", "model": "m"}


@pytest.mark.parametrize("place", [{"options": {"promptPrefix": "Hi."}}, {"promptPrefix": "Hi."}])
def test_the_system_prompt_comes_first(place: dict):
    first, *_ = read("librechat", libre_conversation(*LIBRE_BRANCHES, **place))
    assert first.value["prompt"][0] == {"role": "system", "content": "Hi."}


def test_parts_of_content_and_reasoning():
    parts = [
        {"type": "think", "think": "Hm."},
        {"type": "text", "text": "Yes,"},
        {"type": "agent_update", "agent_update": {"index": 0}},
        None,
        {"type": "text", "text": {"value": "it is."}},
    ]
    parts.remove(None)
    old = ":::thinking\nHm.\n:::\n\nYes, it is."
    for more in ({"text": "", "content": parts}, {"text": old}):
        answer = libre_message("a1", "u1", **more, **up())
        (row,) = read("librechat", libre_conversation(libre_message("u1"), answer))
        assert row.value["completion"] == [
            {"role": "assistant", "content": "Yes, it is.", "reasoning_content": "Hm."}
        ]


@pytest.mark.parametrize(
    ("question", "answer", "part"),
    [
        ({}, {"text": ""}, 'the message "a1" has no text'),
        ({"text": None}, {}, "'text', got null"),
        ({}, {"error": True}, "is an error"),
        ({"files": [{"file_id": "x"}]}, {}, "has 'files'"),
        ({"quotes": ["q"]}, {}, "has 'quotes'"),
        ({"isCreatedByUser": None}, {}, "must have true or false in 'isCreatedByUser'"),
        ({}, {"isCreatedByUser": True}, "is not the assistant's"),
        ({"parentMessageId": "a1"}, {}, "is its own ancestor"),
        ({"messageId": "u9"}, {}, 'the message "u1" is missing'),
        ({"messageId": "a1"}, {}, "two messages have the same 'messageId'"),
        ({}, {"content": [{"type": "tool_call", "tool_call": {}}]}, 'of the type "tool_call"'),
        ({}, {"content": [{"type": "error", "error": "e"}]}, 'of the type "error"'),
        ({}, {"content": [{"type": "text", "text": 3}]}, 'of the type "text" that is not text'),
        ({}, {"feedback": {"rating": "up"}}, "must be thumbsUp or thumbsDown"),
        ({}, {"parentMessageId": LIBRECHAT_ROOT}, "no message of the user stands before"),
    ],
)
def test_an_incomplete_conversation_is_refused(question: dict, answer: dict, part: str):
    messages = (libre_message("u1", **question), libre_message("a1", "u1", **down() | answer))
    bad = read("librechat", *messages)[-1]
    assert part in message_of(bad)
    assert bad.line == 2


def test_what_is_left_out():
    user = libre_message("u1")
    outcomes = read(
        "librechat",
        libre_conversation(user, libre_message("a1", "u1", feedback={"rating": None})),
        libre_conversation(user, libre_message("a1", "u1", unfinished=True, **up())),
        libre_conversation(user, libre_message("a1", "u1", feedback=None)),
        libre_conversation(),
    )
    assert outcomes == [
        SkippedRow(file="f", line=1, why="without a judgement"),
        SkippedRow(file="f", line=2, why="with an unfinished answer"),
    ]


def test_rows_that_are_no_conversations():
    bad, row = read("librechat", 3, libre_conversation(*LIBRE_BRANCHES[:2]))
    assert message_of(bad) == "must be a conversation or a message, got 3. Remove it."
    assert isinstance(row, Row)


def test_reading_changes_nothing_in_the_export():
    conversation = libre_conversation(*LIBRE_BRANCHES, options={"promptPrefix": "Hi."})
    before = copy.deepcopy(conversation)
    read("librechat", conversation)
    assert conversation == before


def test_messages_in_a_table_have_json_and_booleans_as_text():
    rows = [
        {key: str(value) if isinstance(value, bool) else value for key, value in message.items()}
        | {"feedback": json.dumps(message["feedback"]) if "feedback" in message else ""}
        | {"files": "[]"}
        for message in LIBRE_BRANCHES
    ]
    assert list(map(texts, read("librechat", *rows))) == JUDGED
