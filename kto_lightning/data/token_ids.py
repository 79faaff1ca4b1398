"""Token ids of records, by the calls that TRL makes, batched over many records."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from kto_lightning.data.chat_template import MessageForms
from kto_lightning.data.template_limits import TemplateLimitError, check_growth, limit_rendering
from kto_lightning.errors import ModelError

NO_TEMPLATE = "no chat template"
NO_EOS = "no end-of-text token"

_TOKENIZATION_KWARGS = frozenset(
    (
        *("tokenize", "padding", "truncation", "max_length", "tokenizer_kwargs"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
        "sanitize_control_tokens",
    )
)
"""Arguments of `apply_chat_template` that take effect after rendering."""

_CHARACTERS_PER_CALL = 2_000_000
"""A tokenizer's own results take some 300 bytes for each until its call is over."""

RecordJson = dict[str, Any]  # Any: values of the JSON in the column `record`
_Result = TypeVar("_Result")


@dataclass(kw_only=True, slots=True)
class TokenizedRecord:
    """The token ids of a record, by the calls that TRL makes."""

    record: RecordJson
    prompt_ids: list[int]
    """Of the prompt alone."""
    text_ids: list[int]
    """Of prompt + completion."""
    texts: tuple[str, str] | None = None
    """The prompt and the whole text that the ids were made from; None: not known."""
    fault: str | None = None
    """Why there are no ids."""


def token_ids_of_records(
    records: list[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[TokenizedRecord]:
    """Tokenize records, given as JSON.

    Many texts are tokenized in one call, duplicates once: one call per text takes twice as long. If
    a text makes such a call fail, each record is tokenized on its own.

    Raises:
        TemplateLimitError: if the chat template takes too long or too much memory.
    """
    forms = MessageForms(tokenizer)
    parsed: list[RecordJson] = [json.loads(record) for record in records]
    texts: list[tuple[_RenderedRecord | None, str | None]] = []
    for row, (record, json_text) in enumerate(zip(parsed, records, strict=True)):
        texts.append(_attempt(row, partial(_render, record, len(json_text), forms)))
    try:
        ids = _tokenize_texts((text for text, _ in texts if text is not None), tokenizer)
    except Exception:
        ids = {}
    for row, (record, (text, fault)) in enumerate(zip(parsed, texts, strict=True)):
        found: tuple[list[int], list[int]] | None = None
        if text is not None and text.prompt in ids.get(text.special, ()):
            found = ids[text.special][text.prompt], ids[text.special][text.whole]
        elif fault is None:
            found, fault = _attempt(row, partial(token_ids, record, tokenizer))
        prompt_ids, text_ids = found or ([], [])
        yield TokenizedRecord(
            record=record,
            prompt_ids=prompt_ids,
            text_ids=text_ids,
            texts=None if text is None else (text.prompt, text.whole),
            fault=fault,
        )


_MAX_FAULT = 500
"""Characters of what a template raises, which may quote the record."""


def _attempt(row: int, compute: Callable[[], _Result]) -> tuple[_Result | None, str | None]:
    """The result, or an error message: a chat template is a program and can raise anything.

    The message is stored in a column instead of being raised, so that the first record in file
    order is reported, whichever worker process fails first.
    """
    try:
        return compute(), None
    except TemplateLimitError as error:
        raise TemplateLimitError(error.what, row) from error
    except ModelError as error:
        return None, str(error)
    except Exception as error:
        said = f"{type(error).__name__}: {error}".removesuffix(": ")
        return None, said if len(said) <= _MAX_FAULT else f"{said[: _MAX_FAULT - 1]}…"


@dataclass(frozen=True, slots=True)
class _RenderedRecord:
    """The two texts of a record that the tokenizer is given."""

    prompt: str
    whole: str
    special: bool
    """Whether the tokenizer adds special tokens; a chat template writes its own."""


def _render(record: RecordJson, size: int, forms: MessageForms) -> _RenderedRecord | None:
    """The two texts whose ids are those of `token_ids`; None where only `token_ids` is correct.

    Raises:
        ModelError: see `token_ids`.
    """
    tokenizer = forms.tokenizer
    if isinstance(record["completion"], str):
        return _RenderedRecord(*_plain_texts(record, tokenizer), special=True)
    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return None
    if not _TOKENIZATION_KWARGS.isdisjoint(record.get("chat_template_kwargs") or {}):
        return None
    with limit_rendering(size):
        prompt, whole = _apply_template(record, forms, tokenize=False)
    source = size + len(str(tokenizer.chat_template))
    return _RenderedRecord(check_growth(prompt, source), check_growth(whole, source), special=False)


def _tokenize_texts(
    texts: Iterable[_RenderedRecord], tokenizer: PreTrainedTokenizerBase
) -> dict[bool, dict[str, list[int]]]:
    """The ids of each text, keyed by whether special tokens are added."""
    unique: dict[bool, dict[str, None]] = {True: {}, False: {}}
    for pair in texts:
        unique[pair.special] |= {pair.prompt: None, pair.whole: None}
    return {
        special: {
            text: ids
            for texts in _split(found)
            for text, ids in zip(
                texts, _ids(tokenizer(texts, add_special_tokens=special)), strict=True
            )
        }
        for special, found in unique.items()
    }


def _split(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts with at most `_CHARACTERS_PER_CALL` characters together, or of one text."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > _CHARACTERS_PER_CALL:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def token_ids(
    record: RecordJson, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Ids of the prompt alone and of prompt + completion, by TRL's own calls.

    Raises:
        ModelError: `NO_TEMPLATE` or `NO_EOS`, if the tokenizer lacks what the record needs.
        TemplateLimitError: if the chat template exceeds its limits.
    """
    if isinstance(record["completion"], str):
        prompt, whole = _plain_texts(record, tokenizer)
        return _ids(tokenizer(prompt)), _ids(tokenizer(whole))
    with limit_rendering(len(json.dumps(record))):
        prompt, whole = _apply_template(record, MessageForms(tokenizer))
    return _ids(prompt), _ids(whole)


def _plain_texts(record: RecordJson, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    eos_token: Any = tokenizer.eos_token  # Any: typed as any special token, ids and lists included
    if eos_token is None:
        raise ModelError(NO_EOS)
    whole = record["prompt"] + record["completion"]
    ended = record["completion"].endswith(eos_token)
    return record["prompt"], whole if ended else whole + eos_token


def _apply_template(
    record: RecordJson,
    forms: MessageForms,
    **options: Any,  # Any: its own keywords, and the record's
) -> tuple[Any, Any]:  # Any: texts, or what `_ids` takes
    tokenizer = forms.tokenizer
    if not tokenizer.chat_template:
        raise ModelError(NO_TEMPLATE)
    tools = record.get("tools")
    prompt, completion = (
        forms.convert(record[key], with_tools=bool(tools)) for key in ("prompt", "completion")
    )
    options |= {"tools": tools, **(record.get("chat_template_kwargs") or {})}
    return (
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options),
        tokenizer.apply_chat_template(prompt + completion, **options),
    )


def common_prefix_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The number of items at the start in which both agree, of token ids or characters."""
    if second[: len(first)] == first:
        return len(first)
    # strict=False: a text may be shorter than its prompt with the generation prompt.
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _ids(encoding: Any) -> Any:  # Any: a BatchEncoding of one text or of several
    return encoding["input_ids"]
