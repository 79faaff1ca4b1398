"""A real model with its own tokenizer and chat template: what tiny random ones cannot show."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kto_lightning.data.dataset import load_records
from kto_lightning.data.tokenize import tokenize_records
from kto_lightning.models.tokenizer import load_tokenizer
from kto_lightning.training.checkpoints import list_checkpoints
from tests.support.cli import checkpoint_tensors, fit, numbers, run_cli, weights
from tests.support.factories import write_jsonl
from tests.support.tolerances import RELATIVE, assert_errs_like_plain

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of TRL, Lightning, peft

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
JUDGED = (
    ("What is the capital of Italy?", "Rome.", True),
    ("Name two fruits.", "1. Apple\n2. Pear", True),
    ("Say hello in French.", "I am a language model and cannot do so.", False),
    ("How much is two plus three?", "five", True),
    ("Write a line about the sea.", "the sea is blue 🌊 and wide — always.", True),
    ("What is honey?", "Honey is sweet. Honey is sweet. Honey is sweet.", False),
    ("Is 7 less than 9?", "Yes", True),
    ("Answer in JSON.", '{"answer": [1, 2, {"three": null}]}', True),
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def chat(prompt: str, completion: str, label: bool) -> dict[str, Any]:
    """The judged answer as the second turn of a conversation, behind a system message."""
    before = [{"role": "system", "content": "Be brief."}, user(QUESTION), assistant(ANSWER)]
    return {
        "prompt": [*before, user(prompt)],
        "completion": [assistant(completion)],
        "label": label,
    }


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = [chat(*each) for each in JUDGED]
    # One prompt without a system message, for which the template has one of its own.
    records[1]["prompt"] = records[1]["prompt"][-1:]
    return write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", records)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = [
        {"prompt": f"Question: {prompt}\nAnswer:", "completion": f" {completion}", "label": label}
        for prompt, completion, label in JUDGED
    ]
    return write_jsonl(tmp_path_factory.mktemp("texts") / "texts.jsonl", records)


def answer(directory: Path) -> str:
    """What the model says to QUESTION, most probable token by token."""
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    inputs = tokenizer.apply_chat_template(
        [user(QUESTION)], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])


def train(model: Path, records: Path, output: Path, *options: Any) -> Path:
    """Two epochs of two steps."""
    rate = ("--model.learning_rate", 1e-5, "--trainer.max_epochs", 2)
    return fit(model, records, output, *rate, *options)


def test_it_answers_with_its_own_template(smollm2):
    assert answer(smollm2) == f"{ANSWER}<|im_end|>"


@pytest.mark.parametrize("form", ["chats", "texts"])
@pytest.mark.parametrize("options", [(), ("--lora", 8)], ids=["full", "lora"])
def test_two_steps_agree_with_trl(form, options, smollm2, request, capsys):
    records = request.getfixturevalue(form)
    arguments = ["--model", smollm2, "--data", records, "--steps", 2, "--batch_size", 4]
    assert run_cli("parity", *arguments, "--learning_rate", 1e-5, "--json", *options) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["agrees"]
    # `parity` may allow more to a model that is sensitive to rounding. These need no more: z0 and
    # rewards alone do, differences of log-probs which thirty layers round.
    for name in ("loss", "logps/desirable", "logps/undesirable", "grad_norm"):
        column = report["columns"][f"train/{name}"]
        assert column["difference"] <= RELATIVE * abs(column["trl"]), name


def test_the_end_of_an_answer_is_learnt_although_it_pads_too(smollm2, chats, texts):
    tokenizer = load_tokenizer(str(smollm2))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == end
    [newline] = tokenizer("\n")["input_ids"]
    for records, last in ((chats, [end, newline]), (texts, [end])):
        tokenized = tokenize_records(load_records(str(records)), tokenizer, max_length=512)
        for completion in (example.completion_ids for example in tokenized):
            assert list(completion)[-len(last) :] == last
            assert list(completion).count(end) == 1


def test_what_is_exported_is_what_was_trained(smollm2, chats, tmp_path):
    output = train(smollm2, chats, tmp_path)
    exported = weights(output)
    [*_, last] = checkpoint_tensors(output).values()
    found = {name: next(t for n, t in last.items() if n.endswith(name)) for name in exported}
    assert all(torch.equal(exported[name], found[name]) for name in exported)
    assert answer(output / "model") == f"{ANSWER}<|im_end|>"  # four small steps forget nothing
    template = (smollm2 / "chat_template.jinja").read_text()
    assert (output / "model" / "chat_template.jinja").read_text() == template


def test_an_adapter_merges_into_the_model_it_was_trained_with(smollm2, chats, tmp_path):
    adapter = ("--model.lora.r", 8, "--model.learning_rate", 1e-3)
    output = train(smollm2, chats, tmp_path / "run", *adapter)
    checkpoint = list_checkpoints(output)[-1][1]
    assert run_cli("export", checkpoint, tmp_path / "merged", "--merge") == 0
    from peft import AutoPeftModelForCausalLM

    adapted: Any = AutoPeftModelForCausalLM.from_pretrained(output / "adapter")
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = AutoTokenizer.from_pretrained(smollm2)(QUESTION, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        found, plain = (model(input_ids=ids).logits for model in (merged, adapted))
        truth = adapted.double()(input_ids=ids).logits
    assert_errs_like_plain(found, plain, truth)


def test_cached_references_give_the_same_steps(smollm2, chats, tmp_path):
    computed = numbers(train(smollm2, chats, tmp_path / "computed"))
    cache = ("--model.reference_cache", tmp_path / "cache")
    cached = numbers(train(smollm2, chats, tmp_path / "cached", *cache))
    assert len(computed) == 4
    for mine, other in zip(cached, computed, strict=True):
        assert mine["train/loss"] == pytest.approx(other["train/loss"], rel=RELATIVE)


def test_an_interrupted_run_goes_on_bit_for_bit(smollm2, texts, tmp_path):
    whole = train(smollm2, texts, tmp_path / "whole")
    halves = tmp_path / "halves"
    train(smollm2, texts, halves, "--trainer.max_steps", 2)
    train(smollm2, texts, halves, "--ckpt_path", "last")
    expected = weights(whole)
    found = weights(halves)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
