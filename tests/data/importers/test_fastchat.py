"""FastChat logs: votes on one answer and between two, and what is missing."""

import pytest

from kto_lightning.data.importers import find_importer
from kto_lightning.data.rows import SkippedRow
from tests.data.importers.exports import arena_state, arena_vote, message_of, read, texts

STATE = arena_state("q1", "a1", "q2", "a2")
OTHER = arena_state("q1", "b1", "q2", "b2", model_name="n")
LEFT, RIGHT = ["q1", "a1", "q2"], ["q1", "b1", "q2"]


def test_votes_on_one_answer():
    rows = [arena_vote(vote, STATE) for vote in ("chat", "upvote", "downvote")]
    assert find_importer(rows) == "fastchat"
    good, bad = read("fastchat", *rows)
    assert texts(good) == (LEFT, "a2", True)
    assert texts(bad) == (LEFT, "a2", False)
    assert (good.line, bad.line) == (2, 3)
    assert (good.value["model"], good.value["vote"]) == ("m", "upvote")


@pytest.mark.parametrize(
    ("vote", "labels"),
    [("leftvote", (True, False)), ("rightvote", (False, True)), ("bothbad_vote", (False, False))],
)
def test_votes_between_two_answers(vote: str, labels: tuple):
    left, right = read("fastchat", arena_vote(vote, STATE, OTHER))
    assert texts(left) == (LEFT, "a2", labels[0])
    assert texts(right) == (RIGHT, "b2", labels[1])
    assert (left.value["model"], right.value["model"], right.line) == ("m", "n", 1)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (arena_vote("tievote", STATE, OTHER), "with a tie"),
        (arena_vote("flag", STATE), "without a judgement"),
    ],
)
def test_votes_that_say_neither_are_left_out(row: dict, why: str):
    assert read("fastchat", row) == [SkippedRow(file="f", line=1, why=why)]


@pytest.mark.parametrize("key", ["system_message", "system"])
def test_the_system_message_comes_first(key: str):
    state = arena_state("q1", "a1", **{"system_message": ""} | {key: "Be short."})
    (row,) = read("fastchat", arena_vote("upvote", state))
    assert row.value["prompt"][0] == {"role": "system", "content": "Be short."}
    (row,) = read("fastchat", arena_vote("upvote", STATE))
    assert row.value["prompt"][0]["role"] == "user"


def test_examples_of_the_template_are_left_out():
    state = arena_state("example", "its answer", "q1", "a1", offset=2)
    (row,) = read("fastchat", arena_vote("upvote", state))
    assert texts(row) == (["q1"], "a1", True)


def test_a_text_beside_an_empty_list_of_images_is_text():
    (row,) = read("fastchat", arena_vote("upvote", arena_state(["q1", []], "a1")))
    assert texts(row)[0] == ["q1"]


ERROR = "**NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE.**"


@pytest.mark.parametrize(
    ("state", "part"),
    [
        (arena_state("q1", None), "message 2 must be text, got null"),
        (arena_state("q1", ""), "message 2 must be text"),
        (arena_state("q1", "a1", "q2"), "the judged message is not the assistant's"),
        (arena_state("q1", ERROR + "\n\n(error_code: 4)"), "message 2 is an error of the server"),
        (arena_state(["q1", ["cat.png"]], "a1"), "message 1 must be text"),
        (arena_state("q1", "a1", has_csam_image=False), "may hold images"),
        (arena_state("q1", "a1", messages=[["USER", "q"], ["USER", "a"]]), "message 2 must be ["),
        (arena_state("q1", "a1", offset=2), "has no messages"),
        (arena_state("q1", "a1", offset="0"), "'offset' must be a number"),
        (arena_state("q1", "a1", roles=["USER"]), "'roles' two names"),
    ],
)
def test_an_incomplete_conversation_is_refused(state: dict, part: str):
    (bad,) = read("fastchat", arena_vote("downvote", state))
    assert part in message_of(bad)


def test_a_vote_needs_its_conversations():
    (bad,) = read("fastchat", arena_vote("leftvote", STATE))
    assert message_of(bad) == "a 'leftvote' needs 2 conversations, got 1. Remove it."
    (bad,) = read("fastchat", {"type": "upvote"})
    assert message_of(bad).startswith("an entry of the log must have 'type' and 'state'")
