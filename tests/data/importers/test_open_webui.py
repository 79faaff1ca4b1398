"""Open WebUI: branches, ratings, and what is missing."""

import pytest

from kto_lightning.data.importers import find_importer
from kto_lightning.data.rows import SkippedRow
from tests.data.importers.exports import (
    message_of,
    read,
    texts,
    webui_chat,
    webui_feedback,
    webui_message,
)

U1 = webui_message("u1", None)
A1 = webui_message("a1", "u1")
OTHER = webui_message("a1b", "u1")
U2 = webui_message("u2", "a1")
A2 = webui_message("a2", "u2")
CHAT = webui_chat(U1, A1, OTHER, U2, A2)


def test_the_judged_message_and_what_came_before_it_in_its_branch():
    first, sibling, last = read(
        "open_webui",
        webui_feedback(CHAT, "a1"),
        webui_feedback(CHAT, "a1b", rating="-1"),
        webui_feedback(CHAT, "a2", rating=-1.0),
    )
    assert texts(first) == (["text of u1"], "text of a1", True)
    assert texts(sibling) == (["text of u1"], "text of a1b", False)
    assert texts(last) == (["text of u1", "text of a1", "text of u2"], "text of a2", False)
    assert (last.file, last.line, last.from_table) == ("f", 3, False)


def test_what_else_the_judgement_says_has_keys_of_its_own():
    (row,) = read("open_webui", webui_feedback(CHAT, "a1"))
    extra = {key: row.value[key] for key in ("details_rating", "reason", "comment", "tags")}
    assert extra == {"details_rating": 7, "reason": "clear", "comment": "", "tags": ["x"]}
    assert row.value["model"] == "m"


@pytest.mark.parametrize("place", [{"params": {"system": "Be short."}}, {"system": "Be short."}])
def test_the_system_prompt_of_the_chat_comes_first(place: dict):
    (row,) = read("open_webui", webui_feedback(webui_chat(U1, A1, **place), "a1"))
    assert row.value["prompt"][0] == {"role": "system", "content": "Be short."}
    (row,) = read("open_webui", webui_feedback(webui_chat(U1, A1, system=" "), "a1"))
    assert len(row.value["prompt"]) == 1


@pytest.mark.parametrize("rating", [None, 0, ""])
def test_a_rating_that_says_neither_is_left_out(rating: object):
    (skipped,) = read("open_webui", webui_feedback(CHAT, "a1", rating=rating))
    assert skipped == SkippedRow(file="f", line=1, why="without a judgement")


def test_an_answer_that_never_ended_is_left_out():
    chat = webui_chat(U1, A1 | {"done": False})
    (skipped,) = read("open_webui", webui_feedback(chat, "a1"))
    assert skipped == SkippedRow(file="f", line=1, why="with an unfinished answer")


@pytest.mark.parametrize(
    ("messages", "judged", "part"),
    [
        ((U1, A1), "a9", 'the message "a9" is missing'),
        ((A1,), "a1", 'the message "u1" is missing'),
        ((U1, A1), None, "'meta.message_id' must name the judged message, got null"),
        ((U1 | {"parentId": "a1"}, A1), "a1", "is its own ancestor"),
        ((U1 | {"parentId": 3}, A1), "a1", "'parentId' of the message \"u1\" must be"),
        ((U1, A1), "u1", "the judged message is not the assistant's"),
        ((A1 | {"parentId": None},), "a1", "no message of the user stands before"),
        ((U1, A1 | {"content": " "}), "a1", "must have text in 'content'"),
        ((U1 | {"content": None}, A1), "a1", "must have text in 'content', got null"),
        ((U1, A1 | {"error": {"content": "no server"}}), "a1", "is an error"),
        ((U1, A1 | {"error": True}, U2, A2), "a2", "is an error"),
        ((U1 | {"files": [{"type": "image", "url": "x"}]}, A1), "a1", '"u1" has files'),
        ((U1 | {"role": "tool"}, A1), "a1", 'the roles user, assistant, system, got "tool"'),
    ],
)
def test_an_incomplete_conversation_is_refused(messages: tuple, judged: str, part: str):
    (bad,) = read("open_webui", webui_feedback(webui_chat(*messages), judged))
    assert part in message_of(bad)
    assert bad.line == 1


@pytest.mark.parametrize("rating", ["good", 3, True, False, 0.5, [1]])
def test_an_unknown_rating_is_refused(rating: object):
    (bad,) = read("open_webui", webui_feedback(CHAT, "a1", rating=rating))
    assert message_of(bad).startswith("'rating' must be 1 or -1, got ")


def test_a_feedback_without_its_snapshot_says_where_it_is():
    feedback = webui_feedback(CHAT, "a1")
    del feedback["snapshot"]  # as the API's list gives it
    table = dict.fromkeys(("id", "model_id", "sibling_model_ids", "reason", "comment"), "")
    for row in (feedback, table | {"rating": "1"}):
        assert find_importer([row]) == "open_webui"
        (bad,) = read("open_webui", row)
        assert "Admin Panel > Evaluations > Feedback > Export > JSON" in message_of(bad)


@pytest.mark.parametrize(
    "block",
    [
        "> I look\n> it up.",
        "&gt; I look\n&gt; it up.",
    ],
)
def test_reasoning_gets_a_key_of_its_own(block: str):
    head = '<details type="reasoning" done="true" duration="3">\n<summary>Thought for 3 seconds'
    content = f"{head}</summary>\n{block}\n</details>\nYes, 1 &gt; 0."
    (row,) = read("open_webui", webui_feedback(webui_chat(U1, A1 | {"content": content}), "a1"))
    (answer,) = row.value["completion"]
    assert answer["content"] == "Yes, 1 &gt; 0."
    assert answer["reasoning_content"] == "I look\nit up."


def test_reasoning_between_texts_and_a_block_that_is_quoted_in_it():
    inner = '<details type="tool_calls">'
    block = f'<details type="reasoning" done="true">\n> I write {inner}.\n</details>'
    content = f"First.\n{block}\nThen.{block.replace(inner, 'more')}"
    (row,) = read("open_webui", webui_feedback(webui_chat(U1, A1 | {"content": content}), "a1"))
    (answer,) = row.value["completion"]
    assert answer["content"] == "First.\n\nThen."
    assert answer["reasoning_content"] == f"I write {inner}.\n\nI write more."


def test_what_the_model_has_not_written_as_text_is_refused():
    call = (
        '<details type="tool_calls" done="true" name="sky">\n<summary>Ran</summary>\n</details>\n'
    )
    (bad,) = read("open_webui", webui_feedback(webui_chat(U1, A1 | {"content": call + "a"}), "a1"))
    assert "a block of the type 'tool_calls'" in message_of(bad)
    only = '<details type="reasoning" done="true">\n> Hm.\n</details>'
    (bad,) = read("open_webui", webui_feedback(webui_chat(U1, A1 | {"content": only}), "a1"))
    assert "reasoning and no answer" in message_of(bad)
    open_blocks = '<details type="reasoning">' * 50_000
    (bad,) = read("open_webui", webui_feedback(webui_chat(U1, A1 | {"content": open_blocks}), "a1"))
    assert "reasoning that does not end" in message_of(bad)
    html = "<details><summary>More</summary>text</details>"
    (row,) = read("open_webui", webui_feedback(webui_chat(U1, A1 | {"content": html}), "a1"))
    assert texts(row)[1] == html


def test_rated_answers_of_exported_chats():
    rated = A1 | {"annotation": {"rating": 1, "reason": "clear"}}
    removed = A2 | {"annotation": {"rating": None}}
    chat = {"id": "c", "user_id": "u", "title": "t", "chat": webui_chat(U1, rated, U2, removed)}
    assert find_importer([chat]) == "open_webui"
    row, skipped = read("open_webui", chat)
    assert texts(row) == (["text of u1"], "text of a1", True)
    assert row.value["reason"] == "clear"
    assert skipped == SkippedRow(file="f", line=1, why="without a judgement")
    assert read("open_webui", {"chat": CHAT}) == []
