"""The prompt of a pair: in a column of its own, in its conversations, or in its texts."""

from pathlib import Path

import pytest

from kto_lightning.data.dataset import read_records
from kto_lightning.data.records import Record
from tests.data.rows import BAD, GOOD, USER, jsonl, message_of

TALK = "\n\nHuman: Is it raining?\n\nAssistant: Where?\n\nHuman: Here.\n\nAssistant:"


def read_pair(tmp_path: Path, row: dict) -> tuple[Record, Record]:
    chosen, rejected = read_records(jsonl(tmp_path / "pair.jsonl", row))
    assert isinstance(chosen, Record), chosen
    assert isinstance(rejected, Record), rejected
    assert chosen.prompt == rejected.prompt
    assert chosen.prompt_guessed == rejected.prompt_guessed
    return chosen, rejected


def texts(pair: tuple[Record, Record]) -> tuple:
    return pair[0].prompt, pair[0].completion, pair[1].completion


@pytest.mark.parametrize(
    ("columns", "prompt"),
    [
        ({"question": "Is it raining?"}, "Is it raining?"),
        ({"query": "Is it raining?", "system": ""}, "Is it raining?"),
        ({"instruction": "Is it raining?"}, "Is it raining?"),
        ({"instruction": "Translate.", "input": "Regen"}, "Translate.\nRegen"),
        ({"instruction": "Translate.", "input": ""}, "Translate."),
        ({"input": "Regen", "question": None}, "Regen"),
    ],
)
def test_a_question_is_the_prompt_of_plain_answers(
    tmp_path: Path, columns: dict, prompt: str
) -> None:
    pair = read_pair(tmp_path, columns | {"chosen": "Yes, it is.", "rejected": "Yes, no."})
    assert texts(pair) == (prompt, "Yes, it is.", "Yes, no.")
    assert not pair[0].prompt_guessed


@pytest.mark.parametrize("key", ["messages", "conversations"])
@pytest.mark.parametrize("asked", [[USER], [USER, GOOD]])
@pytest.mark.parametrize("whole", [True, False])
def test_a_conversation_is_the_prompt_of_answers(
    tmp_path: Path, key: str, asked: list, whole: bool
) -> None:
    before = [USER] if whole else []
    row = {key: asked, "chosen": [*before, GOOD], "rejected": [*before, BAD]}
    assert texts(read_pair(tmp_path, row)) == ([USER], [GOOD], [BAD])
    row |= {"chosen": GOOD["content"], "rejected": BAD["content"]}
    assert texts(read_pair(tmp_path, row)) == ([USER], [GOOD], [BAD])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"topic": "Is it raining?", "chosen": "Yes.", "rejected": "No.", "score": 1},
            "'chosen' and 'rejected' have no prompt, and it is unknown whether one of topic is it.",
        ),
        (
            {"topic": "Is it raining?", "chosen": "It is.", "rejected": "It was."},
            "'chosen' and 'rejected' have no prompt, and it is unknown whether one of topic is it.",
        ),
        (
            {"turns": [USER], "chosen": [GOOD], "rejected": [BAD]},
            "'chosen' and 'rejected' have no prompt, and it is unknown whether one of turns is it.",
        ),
        (
            {"question": "a", "messages": [USER], "chosen": "b", "rejected": "c"},
            "it is unknown which of messages, question is the prompt",
        ),
        (
            {"messages": [USER, BAD], "chosen": "Yes.", "rejected": "No."},
            "'messages' ends with an answer that is not the chosen one.",
        ),
        (
            {"instruction": ["a"], "chosen": "b", "rejected": "c"},
            "'instruction' must be text.",
        ),
        (
            {"prompt": "Rain?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            "the prompt is not among the messages that 'chosen' and 'rejected' begin with.",
        ),
        (
            {"question": "Is it raining?", "system": "Be brief.", "chosen": "b", "rejected": "c"},
            'the system prompt "Be brief." stands beside plain text,',
        ),
        ({"chosen": [GOOD], "rejected": [BAD]}, "there is no message before the completion."),
    ],
)
def test_a_pair_without_a_certain_prompt_is_refused(
    tmp_path: Path, row: dict, message: str
) -> None:
    assert message_of(tmp_path, row).startswith(message)


def test_transcripts_are_cut_after_the_last_speakers_turn(tmp_path: Path) -> None:
    row = {"chosen": TALK + " The sky is wet.", "rejected": TALK + " There is sun."}
    for extra in ({}, {"source": "a forum"}, {"question": "Is it raining?"}):
        pair = read_pair(tmp_path, row | extra)
        assert texts(pair) == (TALK, " The sky is wet.", " There is sun.")
        assert not pair[0].prompt_guessed


def test_a_cut_before_other_turns_is_uncertain(tmp_path: Path) -> None:
    more = " Yes.\n\nHuman: Sure?\n\nAssistant: Sure."
    pair = read_pair(tmp_path, {"chosen": TALK + more, "rejected": TALK + " No."})
    assert texts(pair) == (TALK, more, " No.")
    assert pair[0].prompt_guessed


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is bright.", "The sky is blue.", "The sky is"),
        ("First line\nbright", "First line\nblue", "First line\n"),
        ("The word", "The words", "The"),
        ("Yes.", "No.", ""),
        ("天空是蓝色", "天空是绿色", "天空是"),
    ],
)
def test_other_texts_are_cut_at_a_word(
    tmp_path: Path, chosen: str, rejected: str, prompt: str
) -> None:
    pair = read_pair(tmp_path, {"chosen": chosen, "rejected": rejected})
    assert texts(pair) == (prompt, chosen[len(prompt) :], rejected[len(prompt) :])
    assert pair[0].prompt_guessed
