"""Every form of a record and label, and the message for every invalid one."""

import json
from pathlib import Path

import pytest
from trl.data_utils import extract_prompt

from kto_lightning.data.dataset import read_records
from kto_lightning.data.records import MAX_CHARACTERS, Record
from tests.data.rows import BAD, CALL, GOOD, PLAIN, USER, jsonl, message_of, read_one


def test_a_plain_record(tmp_path: Path) -> None:
    record = read_one(tmp_path, PLAIN | {"context": {"ignored": True}})
    expected = Record(
        prompt="Is it raining?",
        completion=" Yes.",
        desirable=True,
        weight=1.0,
        tools=None,
        chat_template_kwargs={},
        file=str(tmp_path / "one.jsonl"),
        line=1,
    )
    assert record == expected


def test_what_a_table_leaves_empty_is_not_there(tmp_path: Path) -> None:
    empty = {"images": [], "video": None, "audio": "", "tools": [], "system": " "}
    assert read_one(tmp_path, PLAIN | empty).prompt == PLAIN["prompt"]


def test_a_prompt_may_repeat_a_part_of_the_messages(tmp_path: Path) -> None:
    row = {"messages": [USER, GOOD], "label": True}
    for prompt in (USER["content"], [USER]):
        assert read_one(tmp_path, row | {"prompt": prompt}).prompt == [USER]


@pytest.mark.parametrize("beside", [[USER, GOOD], json.dumps([USER]), 2, "a note", [], None])
def test_messages_beside_prompt_and_completion_may_repeat_them(
    tmp_path: Path, beside: object
) -> None:
    record = read_one(tmp_path, PLAIN | {"messages": beside})
    assert (record.prompt, record.completion) == (PLAIN["prompt"], PLAIN["completion"])


def test_a_chat_record_keeps_what_templates_may_ask_for(tmp_path: Path) -> None:
    said = {"role": "tool", "content": "wet", "name": "sky", "tool_call_id": "1"}
    thought = GOOD | {"reasoning": "It is wet."}
    tools = [{"type": "function", "function": {"name": "sky", "b": 1, "a": None}}]
    row = {"prompt": [USER, CALL, said | {"tool_calls": None}], "completion": [thought]}
    record = read_one(tmp_path, row | {"label": True, "tools": json.dumps(tools), "weight": 2})
    assert record.prompt == [USER, CALL, said]
    assert record.completion == [thought]
    assert record.tools == tools
    assert record.weight == 2.0


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_the_last_turn_of_the_assistant_is_the_completion(tmp_path: Path, key: str) -> None:
    record = read_one(tmp_path, {key: [USER, BAD, USER, GOOD, USER], "label": False})
    assert record.prompt == [USER, BAD, USER]
    assert record.completion == [GOOD]


def test_sharegpt_is_translated(tmp_path: Path) -> None:
    call = {"name": "sky", "arguments": {"at": "noon"}}
    turns = [("system", "Be brief."), ("human", "Rain?"), ("function_call", json.dumps(call))]
    turns += [("observation", "wet"), ("gpt", "Yes.")]
    row = {"conversations": [{"from": name, "value": text} for name, text in turns], "label": 1}
    record = read_one(tmp_path, row)
    assert record.prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rain?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": call}],
        },
        {"role": "tool", "content": "wet"},
    ]
    assert record.completion == [GOOD]


def test_text_beside_messages_becomes_a_turn(tmp_path: Path) -> None:
    for prompt, completion in (([USER], GOOD["content"]), (USER["content"], [GOOD])):
        row = {"prompt": prompt, "completion": completion, "label": True}
        record = read_one(tmp_path, row)
        assert (record.prompt, record.completion) == ([USER], [GOOD])


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_column_is_the_first_message(tmp_path: Path, key: str) -> None:
    said = {"role": "system", "content": "Be brief."}
    for row in (
        {"messages": [USER, GOOD], "label": True},
        {"conversations": [USER, GOOD], "label": True},
        {"prompt": [USER], "completion": [GOOD], "label": True},
        {"prompt": [USER], "completion": GOOD["content"], "label": True},
    ):
        record = read_one(tmp_path, row | {key: "Be brief."})
        assert (record.prompt, record.completion) == ([said, USER], [GOOD])
        assert read_one(tmp_path, row | {key: ""}).prompt == [USER]
    for pair in (
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"messages": [USER], "chosen": GOOD["content"], "rejected": BAD["content"]},
    ):
        assert read_pair(tmp_path, pair | {key: "Be brief."}) == ([said, USER], [GOOD], [BAD])


def read_pair(tmp_path: Path, row: dict) -> tuple:
    path = jsonl(tmp_path / "pair.jsonl", PLAIN, row | {"weight": 3})
    _, chosen, rejected = read_records(path)
    assert isinstance(chosen, Record)
    assert isinstance(rejected, Record)
    assert chosen.prompt == rejected.prompt
    assert (chosen.desirable, rejected.desirable) == (True, False)
    assert chosen.weight == rejected.weight == 3
    assert chosen.line == rejected.line == 2
    return chosen.prompt, chosen.completion, rejected.completion


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("Rain?", " Yes.", " No."),
        ([USER], [GOOD], [BAD]),
        (USER["content"], [GOOD], [BAD]),
        ([USER], GOOD["content"], BAD["content"]),
        # Whole conversations beside their prompt
        (USER["content"], [USER, GOOD], [USER, BAD]),
        ([USER], [USER, GOOD], [USER, BAD]),
        (None, [USER, GOOD], [USER, BAD]),
    ],
)
def test_a_pair_becomes_two_records(
    tmp_path: Path, prompt: object, chosen: object, rejected: object
) -> None:
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "label": None}
    expected = ([USER], [GOOD], [BAD])
    if isinstance(prompt, str) and isinstance(chosen, str):
        expected = (prompt, chosen, rejected)
    assert read_pair(tmp_path, row) == expected


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("The sky is blue.", "The sky is green."),
        ("same", "same"),
        ("a b", "a b c"),
        ("a b c", "a b"),
        ("a ", "a b"),
        ([USER, GOOD, USER, GOOD], [USER, GOOD, USER, BAD]),
        ([USER, GOOD], [USER, GOOD]),
        ([USER, GOOD], [USER, GOOD, USER, BAD]),
    ],
)
def test_a_missing_prompt_is_found_as_trl_finds_it(
    tmp_path: Path, chosen: str | list, rejected: str | list
) -> None:
    ours = read_pair(tmp_path, {"chosen": chosen, "rejected": rejected})
    theirs = extract_prompt({"chosen": chosen, "rejected": rejected})
    assert ours == (theirs["prompt"], theirs["chosen"], theirs["rejected"])


def test_pairs_without_a_common_beginning_have_no_prompt(tmp_path: Path) -> None:
    # TRL would look at the character before the first and cut off the last one.
    assert read_pair(tmp_path, {"chosen": "b ", "rejected": "c"}) == ("", "b ", "c")
    assert read_pair(tmp_path, {"chosen": "", "rejected": "c"}) == ("", "", "c")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            PLAIN | {"label": None},
            "'label' must be true or false, got null. Drop the line or give it a label; "
            "--data.unlabeled skip leaves such lines out.",
        ),
        (
            PLAIN | {"label": "maybe"},
            """'label' must be true or false, got "maybe". Drop the line or give it a label, or """
            "name such words with --data.labels.good and --data.labels.bad.",
        ),
        (
            {"prompt": "a", "completion": "b"},
            "'label' is missing; the record has prompt, completion. Drop the line or give it a "
            "label.",
        ),
        (
            {"prompt": "a", "label": True, "text": "b"},
            "'completion' is missing; the record has prompt, label, text. Drop the line or add it.",
        ),
        (
            {"question": "a"},
            "'prompt' is missing; the record has question. Drop the line or add it.",
        ),
        (PLAIN | {"prompt": None}, "'prompt' is null. Drop the line or fill it in."),
        (
            PLAIN | {"prompt": 7},
            "'prompt' must be a string or a non-empty list of messages, got 7. "
            "Fix or remove the line.",
        ),
        (
            PLAIN | {"completion": []},
            "'completion' must be a string or a non-empty list of messages, got []. "
            "Fix or remove the line.",
        ),
        (
            {"messages": "hello", "label": True},
            "'messages' must be a non-empty list of messages, got \"hello\". "
            "Fix or remove the line.",
        ),
        (
            PLAIN | {"prompt": [USER, "a"]},
            "'prompt[1]' must be an object with 'role' and 'content', got \"a\". "
            "Fix or remove the line.",
        ),
        (
            PLAIN | {"prompt": [{"role": "user", "content": None}]},
            "'prompt[0].content' must be text (null only beside 'tool_calls'), got null. "
            "Fix or remove the line.",
        ),
        (
            PLAIN | {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
            "'prompt[0].content' must be text (null only beside 'tool_calls'), "
            'got [{"type": "image"}]. Fix or remove the line.',
        ),
        (PLAIN | {"prompt": [USER | {"role": 1}]}, "'prompt[0].role' must be a name, got 1."),
        (
            {"conversations": [{"from": "cat", "value": "miaow"}], "label": True},
            "'conversations[0].from' must be one of human, user, gpt,",
        ),
        (
            {"messages": [USER], "label": True},
            "no message has the role assistant, so there is no completion. Remove the line.",
        ),
        (
            {"messages": [GOOD], "label": True},
            "there is no message before the completion. Add a prompt or remove the line.",
        ),
        ({"prompt": "a", "chosen": "b"}, "'rejected' is missing; the record has"),
        (
            {"chosen": "b", "rejected": [GOOD]},
            "'chosen' and 'rejected' must both be text or both messages. Fix the line.",
        ),
        (
            PLAIN | {"tools": "{not json"},
            "'tools' must be a list of objects, got \"{not json\". Fix or remove it.",
        ),
        (
            PLAIN | {"chat_template_kwargs": [1]},
            "'chat_template_kwargs' must be an object, got [1]. Fix it.",
        ),
        (
            PLAIN | {"chat_template_kwargs": {"tokenize": False}},
            "'chat_template_kwargs' may not set tokenize: tokenization sets it. Remove it.",
        ),
        (
            PLAIN | {"weight": -1},
            "'weight' must be a positive, finite number, got -1. Fix it, or omit it for 1.0.",
        ),
        (
            PLAIN | {"system": "Be brief."},
            'the system prompt "Be brief." stands beside plain text, which has no place for it.',
        ),
        (
            {"messages": [{"role": "developer", "content": "a"}, USER, GOOD], "label": True}
            | {"system_prompt": "b"},
            'the system prompt "b" stands beside messages that have one already.',
        ),
        (PLAIN | {"system": ["a"]}, "'system' must be text, got [\"a\"]."),
        (PLAIN | {"system": "a", "system_prompt": "b"}, "'system' and 'system_prompt' differ."),
        (PLAIN | {"images": ["a.png"]}, "'images' is given, but only text is trained on."),
        (PLAIN | {"audio": {"path": "a.wav"}}, "'audio' is given, but only text is trained on."),
        (
            {"messages": [USER | {"images": ["a"]}, GOOD], "label": True},
            "'images' is given, but only text is trained on.",
        ),
        (
            {"messages": [USER | {"content": [{"type": "image", "text": ""}]}, GOOD]}
            | {"label": True},
            "a message holds a part of the type image, but only text is trained on.",
        ),
        (
            PLAIN | {"tools": [{"name": "sky"}]},
            "'tools' stand beside plain text, and only a chat template can show them.",
        ),
        (
            {"prompt": "Snow?", "messages": [USER, GOOD], "label": True},
            "'prompt' is not a part of 'messages', which is read. Keep one of the two.",
        ),
        (
            PLAIN | {"messages": [{"role": "system", "content": "Be brief."}, USER, GOOD]},
            "'messages' says more than 'prompt' and 'completion', which are read.",
        ),
        (
            PLAIN | {"conversations": [{"from": "human", "value": "Snow?"}]},
            "'conversations' says more than 'prompt' and 'completion', which are read.",
        ),
        ([1], "a record must be a JSON object, got [1]. Drop or wrap it."),
    ],
)
def test_messages_of_bad_records(tmp_path: Path, row: object, message: str) -> None:
    assert message_of(tmp_path, row).startswith(message)


@pytest.mark.parametrize("weight", [0, True, "heavy", 1e-50, 1e39, 10**400, [1], "nan"])
def test_bad_weights(tmp_path: Path, weight: object) -> None:
    assert message_of(tmp_path, PLAIN | {"weight": weight}).startswith("'weight' must be")


def test_a_record_too_long_to_tokenize_is_refused(tmp_path: Path) -> None:
    row = {"prompt": "a" * (MAX_CHARACTERS + 1), "completion": "b", "label": True}
    message = message_of(tmp_path, row)
    assert "characters, and at most 16,000,000 are read" in message
    assert len(message) < 200


@pytest.mark.parametrize("kind", ["thinking", "tool_use", "file"])
def test_a_content_part_that_holds_more_than_text_is_refused(tmp_path: Path, kind: str) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": kind, "text": "b", kind: "c"}]
    row = {"prompt": [USER | {"content": parts}], "completion": [GOOD], "label": True}
    assert f"holds a part of the type {kind}, but only text" in message_of(tmp_path, row)
