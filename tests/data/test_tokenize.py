"""Tokenization: equal to TRL's token for token; truncation, the cache, errors."""

import json
import pickle
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoTokenizer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from kto_lightning.data import token_ids as token_ids_module
from kto_lightning.data import tokenize
from kto_lightning.data.examples import ExampleSet
from kto_lightning.data.token_ids import TokenizedRecord, token_ids, token_ids_of_records
from kto_lightning.data.tokenize import tokenize_records
from kto_lightning.errors import ConfigError, DataError, ModelError
from tests.support.factories import (
    BOS_ID,
    EOS_ID,
    chat_records,
    make_model,
    make_tokenizer,
    plain_records,
    tool_records,
    trl_chat_template,
)

ROOT = Path(__file__).resolve().parents[2]
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% endif %}"
)


def as_dataset(rows: list[dict[str, Any]]) -> Dataset:
    """What `load_records` makes of these rows."""
    parts = ("prompt", "completion", "tools", "chat_template_kwargs")
    return Dataset.from_dict(
        {
            "record": [json.dumps({k: row.get(k) for k in parts}) for row in rows],
            "desirable": [row["label"] for row in rows],
            "weight": [np.float32(row.get("weight", 1.0)) for row in rows],
            "file": ["train.jsonl"] * len(rows),
            "line": list(range(1, len(rows) + 1)),
        }
    )


def on_disk(rows: list[dict[str, Any]], directory: Path) -> Dataset:
    as_dataset(rows).save_to_disk(directory)
    return Dataset.load_from_disk(directory)


def ours(examples: ExampleSet) -> list[tuple[list[int], list[int]]]:
    return [(e.prompt_ids.tolist(), e.completion_ids.tolist()) for e in examples]


def trls(rows: list[dict[str, Any]], tokenizer, tmp_path: Path, max_length: int | None = None):
    model, reference = (make_model("llama", vocab_size=len(tokenizer)) for _ in range(2))
    arguments = KTOConfig(
        output_dir=str(tmp_path / "trl"),
        report_to=[],
        use_cpu=True,
        bf16=False,
        max_length=max_length,
        loss_type="apo_zero_unpaired",
    )
    data = Dataset.from_list(rows).with_format(None)
    trainer = KTOTrainer(
        model, reference, args=arguments, train_dataset=data, processing_class=tokenizer
    )
    made = trainer.train_dataset
    return list(zip(made["prompt_ids"], made["completion_ids"], strict=True))


def trls_or_skip(rows: list[dict[str, Any]], tokenizer, tmp_path: Path):
    """TRL's tokens; a skip where TRL itself fails in a template. One schema for all its rows gives
    a message without calls `tool_calls: null`, and with transformers 5.17 Llama 3.1's template is
    asked for the length of that."""
    try:
        return trls(rows, tokenizer, tmp_path)
    except TypeError as error:
        if traceback.extract_tb(error.__traceback__)[-1].filename != "<template>":
            raise
        pytest.skip(f"TRL itself cannot render these records: {error}")


@pytest.mark.parametrize("bos", [False, True])
def test_plain_text_has_trls_tokens(bos: bool, tmp_path: Path) -> None:
    rows = plain_records(40)
    rows[3]["completion"] += "<|endoftext|>"
    rows[4]["prompt"] = ""
    rows[5]["completion"] = ""
    rows[6]["prompt"] += "  "  # spaces that merge with the completion's first word
    tokenizer = make_tokenizer(bos=bos)
    examples = tokenize_records(as_dataset(rows), tokenizer, max_length=None)
    assert ours(examples) == trls(rows, tokenizer, tmp_path)
    assert all(e.completion_ids[-1] == tokenizer.eos_token_id for e in examples)
    assert examples[3].completion_ids.tolist().count(tokenizer.eos_token_id) == 1
    assert examples[4].prompt_ids.tolist() == ([BOS_ID] if bos else [])


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "llama3", "gemma", "phi3", "cohere"])
def test_chat_has_trls_tokens(template: str, tmp_path: Path) -> None:
    rows = chat_records(30, system=template in ("qwen2_5", "llama3"))
    tokenizer = make_tokenizer(chat_template=template, bos=template in ("llama3", "gemma"))
    examples = tokenize_records(as_dataset(rows), tokenizer, max_length=None)
    assert ours(examples) == trls(rows, tokenizer, tmp_path)
    assert len(set(examples.prompt_keys.tolist())) == len({str(r["prompt"]) for r in rows})


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "llama3_1"])
def test_tools_and_template_settings_have_trls_tokens(template: str, tmp_path: Path) -> None:
    # One tool, so that the rows of TRL's data set, which share one schema, gain no null keys.
    rows = [r for r in tool_records(40) if "measure" not in json.dumps(r["prompt"])]
    rows = [r for r in rows if "measure" not in json.dumps(r["completion"])]
    for i, row in enumerate(rows):
        row["tools"] = row["tools"][:1] if i % 2 else None
        row["chat_template_kwargs"] = {"enable_thinking": bool(i % 3)}
    tokenizer = make_tokenizer(chat_template=template)
    examples = tokenize_records(as_dataset(rows), tokenizer, max_length=None)
    prompts = [str(tokenizer.decode(e.prompt_ids)) for e in examples]
    assert ["search something" in prompt for prompt in prompts] == [
        bool(row["tools"]) for row in rows
    ]
    as_text = [{**row, "tools": json.dumps(row["tools"])} for row in rows]
    assert ours(examples) == trls_or_skip(as_text, tokenizer, tmp_path)


def ids_of(found: list[TokenizedRecord]) -> list[tuple[list[int], list[int], str | None]]:
    return [(item.prompt_ids, item.text_ids, item.fault) for item in found]


def test_batched_and_single_calls_give_the_same_ids() -> None:
    """Text and chat mixed, a text that recurs, and a record that has to go alone."""
    rows = [row for pair in zip(plain_records(6), chat_records(6), strict=True) for row in pair]
    rows += [rows[0], rows[1] | {"chat_template_kwargs": {"truncation": True, "max_length": 9}}]
    tokenizer = make_tokenizer(chat_template="llama3", bos=True)
    found = list(token_ids_of_records([json.dumps(row) for row in rows], tokenizer))
    assert ids_of(found) == [(*token_ids(row, tokenizer), None) for row in rows]
    assert len(found[-1].prompt_ids) == 9 < len(found[1].prompt_ids)


def test_a_text_that_fails_its_call_fails_no_other() -> None:
    rows = plain_records(4)
    rows[2]["completion"] = "\ud800"  # half of a character: nothing can encode it
    tokenizer = make_tokenizer()
    found = list(token_ids_of_records([json.dumps(row) for row in rows], tokenizer))
    bad = found.pop(2)
    assert bad.fault is not None
    assert bad.prompt_ids == bad.text_ids == []
    assert ids_of(found) == [(*token_ids(rows[i], tokenizer), None) for i in (0, 1, 3)]


def test_a_record_may_be_text_and_the_next_a_conversation() -> None:
    plain, chat = plain_records(5), chat_records(5)
    tokenizer = make_tokenizer(chat_template="qwen2_5")
    mixed = [row for pair in zip(plain, chat, strict=True) for row in pair]
    examples = ours(tokenize_records(as_dataset(mixed), tokenizer, max_length=None))
    alone = [tokenize_records(as_dataset(r), tokenizer, max_length=None) for r in (plain, chat)]
    assert examples[::2] == ours(alone[0])
    assert examples[1::2] == ours(alone[1])


def test_a_call_is_rendered_with_the_arguments_it_was_written_with(tmp_path: Path) -> None:
    rows, tokenizer = tool_records(12), make_tokenizer(chat_template="qwen2_5")
    made = ours(tokenize_records(as_dataset(rows), tokenizer, max_length=None))
    texts = [str(tokenizer.decode(ids)) for _, ids in made]
    for row, text in list(zip(rows, texts, strict=True))[::2]:
        call = row["completion"][0]["tool_calls"][0]["function"]
        assert f'"arguments": {json.dumps(call["arguments"], ensure_ascii=False)}}}' in text
    # One schema for all rows gives each call the other tool's argument too, as null.
    theirs = [str(tokenizer.decode(ids)) for _, ids in trls(rows, tokenizer, tmp_path)]
    assert '"query": null' in "".join(theirs)
    assert "null" not in "".join(texts)


def test_prompts_that_are_no_prefix_are_counted() -> None:
    template = (
        "{% for m in messages %}{{ m.content }};{% endfor %}{{ 'Bot:' if add_generation_prompt }}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    counts = tokenize_records(as_dataset(chat_records(9)), tokenizer, max_length=None).counts
    assert counts.prompts_not_prefix == 9
    assert counts.lost_prompt_end == "Bot:"


def letters(*lengths: tuple[int, int], label: bool = True) -> list[dict[str, Any]]:
    """Plain records of so many prompt and completion tokens, the added end of text included."""
    # Digits and punctuation in this order are never merged, so each is one token.
    rows = []
    for i, (prompt, completion) in enumerate(lengths):
        rows.append(
            {
                "prompt": "".join("!#$%&*+/"[(i + j) % 8] for j in range(prompt)),
                "completion": "".join("<=>@^~|"[(i + j) % 7] for j in range(completion - 1)),
                "label": label,
            }
        )
    return rows


def test_keep_start_cuts_ends_and_drops_what_has_no_room() -> None:
    rows = letters((3, 4), (6, 5), (10, 2)) + letters((9, 9), (12, 3), label=False)
    examples = tokenize_records(as_dataset(rows), make_tokenizer(), max_length=10)
    assert examples.rows.tolist() == [0, 1, 3]
    assert examples.prompt_lengths.tolist() == [3, 6, 9]
    assert examples.completion_lengths.tolist() == [4, 5, 9]
    assert [len(e.completion_ids) for e in examples] == [4, 5, 9]
    counts = examples.counts
    assert (counts.records, counts.desirable, counts.undesirable) == (5, 2, 1)
    assert (counts.dropped_desirable, counts.dropped_undesirable) == (1, 1)
    assert counts.dropped == ["train.jsonl:3", "train.jsonl:5"]
    assert (counts.truncated_desirable, counts.truncated_undesirable) == (1, 1)
    assert (counts.prompt_tokens, counts.completion_tokens) == (18, 4 + 4 + 1)
    assert examples.location(2) == "train.jsonl:4"


def test_keep_start_drops_what_trl_drops(tmp_path: Path) -> None:
    rows, tokenizer = plain_records(40), make_tokenizer()
    examples = tokenize_records(as_dataset(rows), tokenizer, max_length=30)
    assert 0 < len(examples) < 40
    assert ours(examples) == trls(rows, tokenizer, tmp_path, max_length=30)


def test_keep_end_cuts_the_prompts_start_and_drops_nothing() -> None:
    rows = letters((3, 4), (9, 5), (4, 12), (0, 12))
    data, tokenizer = as_dataset(rows), make_tokenizer()
    whole = tokenize_records(data, tokenizer, max_length=None)
    examples = tokenize_records(data, tokenizer, max_length=10, truncation="keep_end")
    assert examples.prompt_lengths.tolist() == [3, 5, 1, 0]
    assert [len(e.completion_ids) for e in examples] == [4, 5, 12, 12]
    assert examples[1].prompt_ids.tolist() == whole[1].prompt_ids[-5:].tolist()
    assert np.array_equal(examples.prompt_keys, whole.prompt_keys)
    assert examples.counts.truncated_desirable == 3
    assert examples.counts.completion_tokens == 4 + 5 + 9 + 10


SKIPS_ROLES = (
    "{% for m in messages if m.role in ('user', 'assistant') %}<|{{ m.role }}|>{{ m.content }}"
    "{% endfor %}"
)


def test_a_completion_without_a_token_is_refused() -> None:
    rows = chat_records(4)
    rows[2]["completion"][0]["role"] = "bot"
    tokenizer = make_tokenizer(chat_template=SKIPS_ROLES)
    with pytest.raises(DataError) as error:
        tokenize_records(as_dataset(rows), tokenizer, max_length=None)
    assert "1 of 4 records cannot be turned into tokens" in str(error.value)
    assert "train.jsonl:3: the completion has no token" in str(error.value)
    assert 'writes nothing for the role "bot"' in str(error.value)


def test_an_empty_completion_is_its_end_of_text_token() -> None:
    row = {"prompt": "a", "completion": "", "label": True}
    (example,) = tokenize_records(as_dataset([row]), make_tokenizer(), max_length=None)
    assert example.completion_ids.tolist() == [EOS_ID]


def test_labels_and_weights_follow_their_example() -> None:
    rows = plain_records(20)
    for i, row in enumerate(rows):
        row["weight"] = i / 4
    data = as_dataset(rows)
    subset = data.select([11, 3, 17])
    examples = tokenize_records(subset, make_tokenizer(), max_length=None)
    whole = tokenize_records(data, make_tokenizer(), max_length=None)
    assert [e.weight for e in examples] == examples.weights.tolist() == [2.75, 0.75, 4.25]
    assert examples.desirable.tolist() == [rows[i]["label"] for i in (11, 3, 17)]
    assert ours(examples) == [ours(whole)[i] for i in (11, 3, 17)]
    assert examples.location(0) == "train.jsonl:12"


def test_many_processes_and_a_copy_in_another_see_the_same(tmp_path: Path) -> None:
    rows, tokenizer = plain_records(50), make_tokenizer()
    one = tokenize_records(on_disk(rows, tmp_path / "a"), tokenizer, max_length=None)
    two = tokenize_records(as_dataset(rows), tokenizer, max_length=None, num_workers=2)
    assert ours(one) == ours(two)
    packed = pickle.dumps(one)
    assert ours(pickle.loads(packed)) == ours(one)


CACHE_PROBE = """
import sys
from datasets import Dataset
from transformers import AutoTokenizer
import kto_lightning.data.tokenize as tokenize

def refuse(*_):
    raise AssertionError("tokenized again")

tokenize.token_ids_of_records = refuse
records = Dataset.load_from_disk(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
tokenizer(["a", "bc"], padding=True, truncation=True, max_length=1)
examples = tokenize.tokenize_records(records, tokenizer, max_length=120)
print(len(examples), examples.prompt_lengths.sum())
"""


def test_a_second_process_finds_the_cache(tmp_path: Path) -> None:
    rows, tokenizer = chat_records(20), make_tokenizer(chat_template="qwen2_5")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    examples = tokenize_records(on_disk(rows, tmp_path / "records"), tokenizer, max_length=None)
    command = [
        sys.executable,
        "-c",
        CACHE_PROBE,
        str(tmp_path / "records"),
        str(tmp_path / "tokenizer"),
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    short = examples.prompt_lengths[examples.prompt_lengths < 120]
    assert 0 < len(short) < 20
    assert run.stdout.split() == [str(len(short)), str(short.sum())]


def test_the_cache_key_covers_data_template_and_tokenizer_but_not_the_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real = tokenize.token_ids_of_records
    monkeypatch.setattr(tokenize, "token_ids_of_records", lambda r, t: seen.extend(r) or real(r, t))

    def num_tokenized(data: Dataset, tokenizer, max_length: int | None = None) -> int:
        seen.clear()
        tokenize_records(data, tokenizer, max_length=max_length, truncation="keep_end")
        return len(seen)

    data = on_disk(chat_records(8), tmp_path / "a")
    tokenizer = make_tokenizer(chat_template="qwen2_5")
    assert num_tokenized(data, tokenizer) == 8
    assert num_tokenized(data, tokenizer, max_length=16) == 0
    assert num_tokenized(data.select(range(4)), tokenizer) == 4
    assert num_tokenized(on_disk(chat_records(8, seed=1), tmp_path / "b"), tokenizer) == 8
    tokenizer.chat_template = f"{{# another #}}{trl_chat_template('qwen2_5')}"
    assert num_tokenized(data, tokenizer) == 8
    assert num_tokenized(data, make_tokenizer(chat_template="qwen2_5", vocab_size=400)) == 8
    assert num_tokenized(data, make_tokenizer(chat_template="qwen2_5", bos=True)) == 8


@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_first_record_a_template_refuses_is_named(num_workers: int) -> None:
    rows = chat_records(30)
    for i in (29, 12, 17):
        rows[i]["prompt"] = [{"role": "user", "content": "a"}] * 2
    tokenizer = make_tokenizer(chat_template=STRICT)
    with pytest.raises(DataError) as error:
        tokenize_records(as_dataset(rows), tokenizer, max_length=None, num_workers=num_workers)
    lines = str(error.value).splitlines()
    assert "3 of 30 records" in lines[0]
    assert [line.split(": ")[0].strip() for line in lines[1:4]] == [
        "train.jsonl:13",
        "train.jsonl:18",
        "train.jsonl:30",
    ]
    assert "Conversation roles must alternate" in lines[1]


def test_a_conversation_needs_a_template_and_text_an_end_token() -> None:
    mixed = as_dataset(plain_records(2) + chat_records(2))
    with pytest.raises(ModelError, match=r"no chat template, and train\.jsonl:3.*--data.chat_temp"):
        tokenize_records(mixed, make_tokenizer(), max_length=None)
    tokenizer = make_tokenizer(chat_template="qwen2_5")
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match=r"no end-of-text token.*train\.jsonl:1"):
        tokenize_records(mixed, tokenizer, max_length=None)


def test_lengths_that_leave_nothing_say_what_to_do() -> None:
    data, tokenizer = as_dataset(letters((8, 3), (9, 4))), make_tokenizer()
    with pytest.raises(DataError, match=r"shortest has 8 tokens.*Raise --data.max_length"):
        tokenize_records(data, tokenizer, max_length=8)
    with pytest.raises(ConfigError, match=r"--data.max_length must .* got 1"):
        tokenize_records(data, tokenizer, max_length=1)
    with pytest.raises(DataError, match="no record"):
        tokenize_records(data.select([]), tokenizer, max_length=8)


def test_real_tool_calls_have_trls_tokens(shared_data: Path, tmp_path: Path) -> None:
    """Their arguments are JSON text, which this template prints as it is."""
    with (shared_data / "toolcalls_2386.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][::12]
    tokenizer = make_tokenizer(chat_template="qwen3")
    examples = tokenize_records(as_dataset(rows), tokenizer, max_length=None)
    assert any("tool_calls" in row["completion"][0] for row in rows)
    assert ours(examples) == trls(rows, tokenizer, tmp_path)
    assert examples.lost_parts() == []


def test_many_long_texts_take_many_calls_and_give_the_same_ids(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = make_tokenizer()
    records = list(as_dataset(plain_records(40))["record"])
    whole = [(item.prompt_ids, item.text_ids) for item in token_ids_of_records(records, tokenizer)]
    sizes: list[int] = []
    call = type(tokenizer).__call__

    def counted_call(self: Any, texts: Any, **options: Any) -> Any:
        sizes.append(sum(map(len, texts)))
        return call(self, texts, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counted_call)
    monkeypatch.setattr(token_ids_module, "_CHARACTERS_PER_CALL", 1000)
    split = [(item.prompt_ids, item.text_ids) for item in token_ids_of_records(records, tokenizer)]
    assert split == whole
    assert len(sizes) > 4
    assert max(sizes) <= 1000
