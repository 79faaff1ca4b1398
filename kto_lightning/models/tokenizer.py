"""Loading of tokenizers, from a directory or hub id, with a padding token and a chat template."""

import copy
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from kto_lightning.errors import ConfigError, ModelError
from kto_lightning.models.loading_errors import explain_loading, first_line
from kto_lightning.models.model_files import (
    adapter_base,
    check_model_files,
    check_regular_files,
    explain_missing_base,
    is_adapter,
    is_directory,
)

_VOCABULARIES = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken", "tekken.json")

_TEMPLATE_SUFFIXES = (".jinja", ".jinja2", ".j2", ".txt")
_TEMPLATE_SOURCE = "chat_template_source"
"""The attribute of a tokenizer that says which file or tokenizer its template was taken from."""


def load_tokenizer(
    name: str,
    *,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    given_base: str | None = None,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer; for an adapter directory without one, that of its base.

    Args:
        name: a directory or a hub id.
        chat_template: what replaces the tokenizer's chat template: a file with a Jinja template,
            the name of one of those that the tokenizer has, or the directory or hub id of another
            tokenizer, whose template it is.
        trust_remote_code: run code that comes with the tokenizer.
        given_base: see `adapter_base`.

    Raises:
        ModelError: if there is no tokenizer, or no such template.
    """
    if is_adapter(name) and not (Path(name) / "tokenizer_config.json").is_file():
        adapter, name = name, adapter_base(name, given_base)
        with explain_missing_base(adapter, name):
            tokenizer = _load(name, trust_remote_code=trust_remote_code)
    else:
        tokenizer = _load(name, trust_remote_code=trust_remote_code)
    if _is_empty(name, tokenizer):
        raise ModelError(
            f"{name} has no tokenizer files. Save its tokenizer there with "
            "tokenizer.save_pretrained, or name another with --data.tokenizer."
        )
    _complete(tokenizer, chat_template)
    return tokenizer


def take_tokenizer(tokenizer: Any, *, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer in memory, as `load_tokenizer` gives it of a directory.

    Raises:
        ConfigError: if it is no tokenizer of transformers.
        ModelError: if there is no such template.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        inner = isinstance(getattr(tokenizer, "tokenizer", None), PreTrainedTokenizerBase)
        advice = "Give its attribute tokenizer." if inner else "Load one with AutoTokenizer."
        raise ConfigError(
            "the tokenizer must be a directory, a hub id or a transformers "
            f"PreTrainedTokenizerBase, got {type(tokenizer).__name__}. {advice}"
        )
    taken = copy.deepcopy(tokenizer)
    _complete(taken, chat_template)
    return taken


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """A tokenizer's class and, where it is known, what it was loaded from."""
    source = f" (loaded from {tokenizer.name_or_path})" if tokenizer.name_or_path else ""
    return f"{type(tokenizer).__name__} in memory{source}"


def _complete(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> None:
    """Give it a padding token, and the chat template that is asked for."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None:
        tokenizer.chat_template = _find_template(chat_template, tokenizer)
        setattr(tokenizer, _TEMPLATE_SOURCE, chat_template)


def _find_template(name: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The template of that name, file or other tokenizer: a text, or several by name."""
    path = Path(name).expanduser()
    templates: Any = tokenizer.chat_template  # several by name, or one, or None
    named = templates if isinstance(templates, dict) else {}
    if name in named and not path.exists():
        return named[name]
    if not path.is_dir() and (path.exists() or path.suffix in _TEMPLATE_SUFFIXES):
        try:
            if path.exists() and not path.is_file():  # a pipe would be waited for
                raise ModelError(f"--data.chat_template {name} is not a file.")
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelError(f"--data.chat_template {name}: {first_line(error)}") from error
    try:
        template = load_tokenizer(str(path)).chat_template
    except ModelError as error:
        names = f", one of the tokenizer's templates ({', '.join(sorted(named))})" if named else ""
        raise ModelError(
            f"--data.chat_template {name} is neither a file{names} nor a tokenizer: {error}"
        ) from error
    if not template:
        raise ModelError(f"--data.chat_template {name}: that tokenizer has no chat template.")
    return template


def template_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template as messages name it, by where it came from."""
    source = getattr(tokenizer, _TEMPLATE_SOURCE, None)
    if source is not None:
        return f"the chat template {source!r}"
    return f"the chat template of {tokenizer.name_or_path or type(tokenizer).__name__!r}"


def _load(name: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    if is_directory(name):
        check_regular_files(Path(name))
    else:
        check_model_files(name)
    advice = "Save one there with tokenizer.save_pretrained, or name another with --data.tokenizer."
    with explain_loading(name, f"{name} has no tokenizer that loads", advice=advice):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)


def _is_empty(name: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it has no vocabulary: without tokenizer files transformers returns an empty one."""
    if not is_directory(name) or any(f for p in _VOCABULARIES for f in Path(name).glob(p)):
        return False
    ids = tokenizer("some text", add_special_tokens=False)["input_ids"]
    return set(ids) <= set(tokenizer.all_special_ids)


def end_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    model: str,
    given_base: str | None = None,
    generation: GenerationConfig | None = None,
) -> set[int]:
    """The tokens at which a model stops: of its generation_config.json, and the tokenizer's.

    Args:
        tokenizer: whose end-of-text token counts.
        model: a directory or a hub id; for an adapter directory, that of its base.
        given_base: see `adapter_base`.
        generation: of a model in memory, instead of the file.
    """
    try:
        if generation is None:
            base = adapter_base(model, given_base) if is_adapter(model) else model
            generation = GenerationConfig.from_pretrained(base)
        ids = generation.eos_token_id
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ModelError):
        ids = None  # it has none; where it is damaged, loading the model says so
    own: Any = tokenizer.eos_token_id  # Any: typed as any special token, lists included
    found = [*(ids if isinstance(ids, list) else [ids]), own]
    return {token for token in found if isinstance(token, int)}
