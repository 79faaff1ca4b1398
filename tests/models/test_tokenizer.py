"""Tokenizers: where a chat template comes from, and the tokens at which a model stops."""

import json
from pathlib import Path

import pytest

from kto_lightning.errors import ModelError
from kto_lightning.models.tokenizer import end_token_ids, load_tokenizer, template_name
from tests.support.factories import EOS_ID, make_tokenizer


def saved(directory: Path, chat_template: str | None = None) -> str:
    make_tokenizer(chat_template=chat_template).save_pretrained(directory)
    return str(directory)


def test_a_chat_template_is_a_file_or_another_tokenizer(tmp_path: Path) -> None:
    name, other = saved(tmp_path / "a"), saved(tmp_path / "b", "qwen2_5")
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages }}", encoding="utf-8")
    from_file = load_tokenizer(name, chat_template=str(file))
    assert from_file.chat_template == "{{ messages }}"
    assert template_name(from_file) == f"the chat template '{file}'"
    from_other = load_tokenizer(name, chat_template=other)
    assert from_other.chat_template == load_tokenizer(other).chat_template
    assert template_name(load_tokenizer(other)) == f"the chat template of '{other}'"


def test_a_chat_template_that_is_not_there_is_named(tmp_path: Path) -> None:
    name = saved(tmp_path / "a")
    for given, said in (
        (str(tmp_path / "missing.jinja"), "No such file"),
        (str(tmp_path / "missing"), "is neither a file nor a tokenizer"),
        (name, "that tokenizer has no chat template"),
    ):
        with pytest.raises(ModelError, match=said) as error:
            load_tokenizer(name, chat_template=given)
        assert str(error.value).startswith(f"--data.chat_template {given}")


def test_a_model_stops_at_the_tokenizers_token_and_at_those_of_its_generation(
    tmp_path: Path,
) -> None:
    name = saved(tmp_path / "model")
    tokenizer, file = load_tokenizer(name), tmp_path / "model" / "generation_config.json"
    assert end_token_ids(tokenizer, name) == {EOS_ID}
    for ids, expected in ((7, {7, EOS_ID}), ([7, 8], {7, 8, EOS_ID}), (None, {EOS_ID})):
        file.write_text(json.dumps({"eos_token_id": ids}))
        assert end_token_ids(tokenizer, name) == expected
    file.write_text("not JSON")
    assert end_token_ids(tokenizer, name) == {EOS_ID}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    file.write_text(json.dumps({"eos_token_id": 9}))
    config = {"peft_type": "LORA", "base_model_name_or_path": name}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert end_token_ids(tokenizer, str(adapter)) == {9, EOS_ID}
