"""Loading of tokenizers, from a directory or hub id, with a padding token and a chat template."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from kto_lightning.errors import ModelError
from kto_lightning.models.model_files import (
    adapter_base,
    check_model_files,
    first_line,
    is_adapter,
    reason_of_failure,
)

_VOCABULARIES = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken", "tekken.json")


def load_tokenizer(
    name: str, *, chat_template: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer; for an adapter directory without one, that of its base.

    Args:
        name: a directory or a hub id.
        chat_template: path of a Jinja chat template that replaces the tokenizer's.
        trust_remote_code: run code that comes with the tokenizer.

    Raises:
        ModelError: if there is no tokenizer, or no such template file.
    """
    if is_adapter(name) and not (Path(name) / "tokenizer_config.json").is_file():
        name = adapter_base(name)
    if not Path(name).is_dir():
        check_model_files(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise ModelError(
            f"{name} has no tokenizer that loads: {reason_of_failure(name, error).rstrip('.')}. "
            "Save one there with tokenizer.save_pretrained, or name another with --data.tokenizer."
        ) from error
    if _is_empty(name, tokenizer):
        raise ModelError(
            f"{name} has no tokenizer files. Save its tokenizer there with "
            "tokenizer.save_pretrained, or name another with --data.tokenizer."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            message = f"--data.chat_template {chat_template}: {first_line(error)}"
            raise ModelError(message) from error
    return tokenizer


def _is_empty(name: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it has no vocabulary: without tokenizer files transformers returns an empty one."""
    if not Path(name).is_dir() or any(f for p in _VOCABULARIES for f in Path(name).glob(p)):
        return False
    ids = tokenizer("some text", add_special_tokens=False)["input_ids"]
    return set(ids) <= set(tokenizer.all_special_ids)


def end_token_ids(tokenizer: PreTrainedTokenizerBase, model: str) -> set[int]:
    """The tokens at which a model stops: of its generation_config.json, and the tokenizer's.

    Args:
        tokenizer: whose end-of-text token counts.
        model: a directory or a hub id; for an adapter directory, that of its base.
    """
    try:
        base = adapter_base(model) if is_adapter(model) else model
        ids = GenerationConfig.from_pretrained(base).eos_token_id
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ModelError):
        ids = None  # it has none; where it is damaged, loading the model says so
    own: Any = tokenizer.eos_token_id  # Any: typed as any special token, lists included
    found = [*(ids if isinstance(ids, list) else [ids]), own]
    return {token for token in found if isinstance(token, int)}
