"""The parts of a record that are not in its tokens."""

import json
import time
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kto_lightning.data.lost import LostPart, OtherEnd, losses_of
from kto_lightning.data.tokenize import tokenize_json_records
from tests.support.factories import chat_records, make_tokenizer, plain_records, tool_records

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
USER = {"role": "user", "content": "How much are two apples?"}
ANSWER = {"role": "assistant", "content": "They are four dollars."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "function": {"name": "price", "arguments": {"fruit": "apple", "n": 2}}}
    ],
}
TOOL = {"type": "function", "function": {"name": "price", "description": "", "parameters": {}}}


def lost(template: str, *messages: dict[str, Any], tools: Any = None) -> list[str]:
    record = {"prompt": messages[:-1], "completion": messages[-1:], "tools": tools}
    return lost_in(make_tokenizer(chat_template=template, bos=True), record)


def lost_in(tokenizer: PreTrainedTokenizerFast, record: dict[str, Any]) -> list[str]:
    columns = tokenize_json_records([json.dumps(record)], [0], tokenizer)
    assert columns["fault"] == [None]
    return columns["lost_parts"][0]


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "llama3_1", "gemma3", "glm4moe"])
def test_nothing_is_missed_that_is_there(template: str) -> None:
    tokenizer = make_tokenizer(chat_template=template, bos=True)
    rows = chat_records(20)
    if template != "gemma3":
        rows += [row | {"completion": row["completion"][:1]} for row in tool_records(20)]
    columns = tokenize_json_records(
        [json.dumps(r) for r in rows], list(range(len(rows))), tokenizer
    )
    assert [names for names in columns["lost_parts"] if names] == []


@pytest.mark.parametrize(
    "answer",
    [
        "  spaces \n\n at both ends \t",
        'quotes " and \\ and \n lines',
        "ﬁne ① ünïcödé Ελλάδα 你好 🎉 <|endoftext|> \u2581",
        "<|im_end|> inside",
        "<b>&amp;</b>",
    ],
)
def test_text_is_found_however_it_is_written(answer: str) -> None:
    message = ANSWER | {"content": answer}
    call = CALL | {
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": answer}}}]
    }
    for template in ("qwen2_5", "llama3", "gemma"):
        assert lost(template, USER, message) == []
    for template in ("qwen2_5", "qwen3", "llama3_1"):
        assert lost(template, USER, call) == []
    record = {"prompt": answer, "completion": answer}
    assert lost_in(make_tokenizer(), record) == []


def test_each_part_is_missed_by_its_name() -> None:
    thinking = ANSWER | {"reasoning_content": "two times two"}
    assert lost(PLAIN, USER, thinking) == ["reasoning of completion"]
    assert lost(PLAIN, USER, thinking, USER, ANSWER) == ["reasoning of prompt"]
    assert lost(PLAIN, USER, CALL) == ["tool calls of completion"]
    assert lost(PLAIN, USER, CALL, USER, ANSWER, tools=[TOOL]) == [
        "tools of record",
        "tool calls of prompt",
    ]
    users = "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.content }};{% endfor %}"
    system = {"role": "system", "content": "Be brief."}
    assert lost(users, system, USER, ANSWER) == ["system message of prompt"]
    assert lost(users, USER, {"role": "bot", "content": "Well"}, USER, ANSWER) == ["text of prompt"]


def test_a_refusal_beside_the_text_is_looked_for() -> None:
    refusal = ANSWER | {"refusal": "No such thing."}
    assert lost(PLAIN, USER, refusal) == ["refusal of completion"]


def test_reasoning_in_the_text_is_a_part_of_its_own() -> None:
    answer = ANSWER | {"content": "<think>\nTwo times two.\n</think>\n\nFour dollars."}
    cuts = (
        "{% for m in messages %}{{ m.role }}:{{ m.content.split('</think>')[-1] }}\n{% endfor %}"
        "{{ 'assistant:<think>\n' if add_generation_prompt }}"
    )
    assert lost(cuts, USER, answer) == ["reasoning of completion"]
    assert lost(PLAIN, USER, answer) == []
    # Here the prompt ends with the tag that opens the completion.
    opens = PLAIN + "{{ 'assistant: <think>\n' if add_generation_prompt }}"
    assert lost(opens, USER, answer) == []


def test_the_prompt_does_not_stand_for_the_completion() -> None:
    """The completion's text also stands in the prompt."""
    template = "{% for m in messages %}{{ m.role }}:{{ m.content if not loop.last or loop.first }}"
    answer = {"role": "assistant", "content": "two apples"}
    assert lost(template + "\n{% endfor %}", USER, answer) == ["text of completion"]


def test_arguments_are_found_in_a_notation_of_the_templates_own() -> None:
    template = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}({% for k, v in c.function.arguments.items() %}"
        "{{ k }}={{ v | tojson }}, {% endfor %}){% endfor %}{% endfor %}"
    )
    text = json.dumps(CALL["tool_calls"][0]["function"]["arguments"])
    call = json.loads(json.dumps(CALL))
    call["tool_calls"][0]["function"]["arguments"] = text
    assert lost(template, USER, CALL) == lost(template, USER, call) == []
    only_keys = template.replace("={{ v | tojson }}", "")
    assert lost(only_keys, USER, call) == ["tool calls of completion"]


def test_a_long_conversation_is_looked_through_once() -> None:
    turns = [{"role": "user", "content": f"turn {i} of a long talk"} for i in range(20_000)]
    lines = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    start = time.monotonic()
    assert lost(lines, *turns, ANSWER) == []
    assert lost(lines.replace("messages", "messages[-9:]"), *turns, ANSWER) == ["text of prompt"]
    assert time.monotonic() - start < 60


def words_tokenizer(*words: str, **options: Any) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(("<unk>", "<end>", *words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<end>", **options
    )


def test_what_the_tokenizer_changes_is_told_from_what_it_drops() -> None:
    tokenizer = words_tokenizer("a", "fine", "day", "!")
    assert lost_in(tokenizer, {"prompt": "A ﬁne", "completion": " DAY!"}) == []
    assert lost_in(tokenizer, {"prompt": "A", "completion": " fine night"}) == [
        "some characters of record"
    ]


def test_bytes_of_one_character_on_both_sides_of_the_start() -> None:
    rows = [row | {"prompt": row["prompt"] + "é", "completion": "è"} for row in plain_records(5)]
    columns = tokenize_json_records(
        [json.dumps(row) for row in rows], list(range(5)), make_tokenizer(vocab_size=300)
    )
    assert columns["lost_parts"] == [[]] * 5


def test_sentences_count_and_name_the_first() -> None:
    parts = [
        LostPart(name="reasoning of completion", count=4, first="x.jsonl:3"),
        LostPart(name="tools of record", count=1, first="x.jsonl:1"),
        LostPart(name="some characters of record", count=2, first="x.jsonl:2"),
    ]
    end = OtherEnd(token="<|im_end|>", end_tokens=["</s>", "<eos>"], count=1, first="x.jsonl:9")
    template, tokenizer, ends = (loss.sentence for loss in losses_of(parts, end))
    assert template.startswith(
        "the chat template drops the reasoning of 4 completions, first at x.jsonl:3, and the "
        "tools of 1 record, first at x.jsonl:1: the model is trained without them. Give"
    )
    assert tokenizer.startswith(
        "the tokenizer drops some characters of 2 records, first at x.jsonl:2: it has no token"
    )
    assert ends.startswith(
        "1 completion ends with '<|im_end|>', at which the model does not stop, first at "
        "x.jsonl:9: it stops at '</s>' and '<eos>'. End"
    )
    assert list(losses_of([], None)) == []
    (earlier,) = losses_of([LostPart(name="reasoning of prompt", count=1, first="x:1")], None)
    assert "may be intended" in earlier.action
    assert "may be intended" not in template
