"""Factories of the other tests: models that attend, tokenizers and records that are varied."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.factories import (
    ARCHITECTURES,
    BOS_ID,
    EOS_ID,
    PAD_ID,
    chat_records,
    make_model,
    make_tokenizer,
    plain_records,
    save_model,
    tool_records,
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_attend_and_are_far_from_uniform(architecture: str) -> None:
    model = make_model(architecture, vocab_size=300)
    first, second = torch.randint(3, 300, (2, 1, 24))
    second[:, -1] = first[:, -1]
    with torch.no_grad():
        logits = model(first).logits[0]
        other = model(second).logits[0]
    assert logits.dtype == torch.float32
    assert logits.std() > 0.2
    # The last token is the same; only what came before it differs.
    assert (logits[-1] - other[-1]).abs().max() > 0.1
    again = make_model(architecture, vocab_size=300)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_a_saved_model_opens_as_any_hugging_face_directory(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template="qwen2_5")
    directory = save_model(tmp_path / "model", "qwen2", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(directory)
    opened = AutoTokenizer.from_pretrained(directory)
    messages = chat_records(1)[0]["prompt"]
    rendered = [t.apply_chat_template(messages, tokenize=False) for t in (opened, tokenizer)]
    assert rendered[0] == rendered[1]
    ids = opened(rendered[0])["input_ids"]
    assert ids == tokenizer(rendered[1])["input_ids"]
    assert max(ids) < model.config.vocab_size


def test_special_tokens_stay_whole_and_bos_is_added_on_request() -> None:
    tokenizer = make_tokenizer(chat_template="llama3", bos=True)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (
        PAD_ID,
        EOS_ID,
        BOS_ID,
    )
    assert tokenizer("<|eot_id|>")["input_ids"] == [
        BOS_ID,
        tokenizer.convert_tokens_to_ids("<|eot_id|>"),
    ]
    assert make_tokenizer()("hi")["input_ids"][0] != BOS_ID


@pytest.mark.parametrize("make", [plain_records, chat_records, tool_records])
def test_records_are_many_sided_and_reproducible(make) -> None:
    records = make(60, seed=3)
    assert records == make(60, seed=3) != make(60, seed=4)
    assert {record["label"] for record in records} == {True, False}
    if make is not tool_records:
        assert len({str(record["prompt"]) for record in records}) < 60
