"""Records to token ids by TRL's own calls, many records in a call."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from kto_lightning.errors import ModelError

NO_TEMPLATE = "no chat template"
NO_EOS = "no end-of-text token"

_OF_TOKENIZING = frozenset(
    (
        *("tokenize", "padding", "truncation", "max_length", "tokenizer_kwargs"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
        "sanitize_control_tokens",
    )
)
"""Arguments of `apply_chat_template` that matter after the template."""

_Result = TypeVar("_Result")


def ids_of_records(
    records: list[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[int], str | None]]:
    """Of each record the ids of its prompt, those of prompt and completion, and its fault.

    All texts in two calls, each different one once: in calls of their own they take twice as long.
    Where a text stops its call, record by record.
    """
    texts = [_faultless(partial(_texts, json.loads(record), tokenizer)) for record in records]
    try:
        ids = _ids_of_texts((text for text, _ in texts if text is not None), tokenizer)
    except Exception:
        ids = {}
    for record, (text, fault) in zip(records, texts, strict=True):
        found: tuple[list[int], list[int]] | None = None
        if text is not None and text.prompt in ids.get(text.special, ()):
            found = ids[text.special][text.prompt], ids[text.special][text.whole]
        elif fault is None:
            found, fault = _faultless(partial(token_ids, json.loads(record), tokenizer))
        yield *(found or ([], [])), fault


def _faultless(attempt: Callable[[], _Result]) -> tuple[_Result | None, str | None]:
    """The result, or what was wrong: a template is somebody's program and can raise anything.

    Kept as a column and not raised here, so that whichever worker process is first, the first
    record in file order is named.
    """
    try:
        return attempt(), None
    except ModelError as error:
        return None, str(error)
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


@dataclass(frozen=True, slots=True)
class _Texts:
    """A record as the tokenizer gets it."""

    prompt: str
    whole: str
    special: bool
    """Whether the tokenizer adds its special tokens; a template writes its own."""


def _texts(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> _Texts | None:
    """The two texts whose ids `token_ids` gives; None where it alone knows how.

    Raises:
        ModelError: see `token_ids`.
    """
    if isinstance(record["completion"], str):
        return _Texts(*_plain_texts(record, tokenizer), special=True)
    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return None
    if not _OF_TOKENIZING.isdisjoint(record.get("chat_template_kwargs") or {}):
        return None
    return _Texts(*_apply_template(record, tokenizer, tokenize=False), special=False)


def _ids_of_texts(
    texts: Iterable[_Texts], tokenizer: PreTrainedTokenizerBase
) -> dict[bool, dict[str, list[int]]]:
    """By whether special tokens are added, the ids of each text."""
    different: dict[bool, dict[str, None]] = {True: {}, False: {}}
    for pair in texts:
        different[pair.special] |= {pair.prompt: None, pair.whole: None}
    return {
        special: dict(
            zip(found, _ids(tokenizer(list(found), add_special_tokens=special)), strict=True)
        )
        for special, found in different.items()
        if found
    }


def token_ids(
    record: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Ids of the prompt alone and of prompt and completion together, by TRL's own calls.

    Raises:
        ModelError: `NO_TEMPLATE` or `NO_EOS`, if the tokenizer lacks what the record needs.
    """
    if isinstance(record["completion"], str):
        prompt, whole = _plain_texts(record, tokenizer)
        return _ids(tokenizer(prompt)), _ids(tokenizer(whole))
    prompt, whole = _apply_template(record, tokenizer)
    return _ids(prompt), _ids(whole)


def _plain_texts(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    eos_token: Any = tokenizer.eos_token
    if eos_token is None:
        raise ModelError(NO_EOS)
    whole = record["prompt"] + record["completion"]
    ended = record["completion"].endswith(eos_token)
    return record["prompt"], whole if ended else whole + eos_token


def _apply_template(
    record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, **options: Any
) -> tuple[Any, Any]:
    if not tokenizer.chat_template:
        raise ModelError(NO_TEMPLATE)
    prompt, whole = record["prompt"], record["prompt"] + record["completion"]
    options |= {"tools": record.get("tools"), **(record.get("chat_template_kwargs") or {})}
    return (
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options),
        tokenizer.apply_chat_template(whole, **options),
    )


def _ids(encoding: Any) -> Any:
    return encoding["input_ids"]
