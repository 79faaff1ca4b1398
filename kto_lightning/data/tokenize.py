"""Tokenization of a data set: in parallel, cached on disk, independent of `max_length`.

The ids equal TRL's (`trl.trainer.kto_trainer`, `_prepare_dataset`), token for token, for the record
as it was written. TRL's rows come from `datasets`, which may change them first: `Dataset.from_list`
gives all rows one schema, so that a tool call also has the arguments of all other tools, as null;
`load_dataset("json")` rounds floats to ten digits. Neither happens here.

The cache holds whole sequences, and `ExampleSet` truncates when it is created, so that another
`max_length` needs no new tokenization.
"""

import json
import os
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from datasets import Dataset, Features, List, Value, is_caching_enabled
from transformers import PreTrainedTokenizerBase

from kto_lightning.data.audit import lost_parts_of
from kto_lightning.data.caches import load_or_make
from kto_lightning.data.examples import ExampleSet, Truncation, location
from kto_lightning.data.strict_json import quote
from kto_lightning.data.template_limits import TemplateLimitError
from kto_lightning.data.token_ids import (
    NO_EOS,
    NO_TEMPLATE,
    TokenizedRecord,
    common_prefix_length,
    token_ids_of_records,
)
from kto_lightning.errors import ConfigError, DataError, ModelError
from kto_lightning.models.tokenizer import template_name

_FORMAT_VERSION = 3
"""Part of the cache key: raise it when the columns or the tokenization change."""

_MIN_RECORDS_FOR_WORKERS = 10000
"""Above this number, starting worker processes takes less time than it saves."""

_MAX_WORKERS = 8
_NUM_SHOWN = 5

_COLUMNS = Features(
    {
        "prompt_ids": List(Value("int32")),
        "completion_ids": List(Value("int32")),
        "prompt_key": Value("int64"),
        "num_lost": Value("int32"),  # tokens at the prompt's end that the whole text does not have
        "max_id": Value("int32"),  # the largest id of both; -1 without one
        "end_id": Value("int32"),  # the completion's last token but white space; -1 without one
        "lost_parts": List(Value("string")),  # parts of the record that the tokens lack
        "fault": Value("string"),  # why the record cannot be tokenized; null where it can
    }
)


def tokenize_records(
    records: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    truncation: Truncation = "keep_start",
    num_workers: int | None = None,
) -> ExampleSet:
    """Tokenize the result of `load_records`, or read the token ids from the cache beside it.

    Args:
        records: columns `record` (JSON of prompt, completion, tools and chat_template_kwargs),
            `desirable`, `weight`, `file` and `line`.
        tokenizer: with the chat template to use.
        max_length: limit on the tokens of prompt + completion; None: no limit.
        truncation: what an example above the limit keeps. `keep_start` cuts its end, and drops the
            example if the prompt alone reaches the limit; `keep_end` first cuts the prompt's start,
            down to one token.
        num_workers: processes; None: chosen by the number of records and of cores.

    Raises:
        ConfigError: if `max_length` is below 2.
        DataError: if the chat template cannot render a record or exceeds its limits, a
            completion has no token, or no example is left.
        ModelError: if the tokenizer lacks the chat template or the end-of-text token that the
            records need.
    """
    if max_length is not None and max_length < 2:
        raise ConfigError(
            f"--data.max_length must leave room for two tokens, one to predict the other, got "
            f"{max_length}. Raise it, or set it to null for no limit."
        )
    if len(records) == 0:
        raise DataError("There is no record to train on. Check --data.train.")
    fingerprint = _fingerprint(records, tokenizer)

    def make() -> Dataset:
        return records.map(
            tokenize_json_records,
            batched=True,
            input_columns=["record"],
            remove_columns=records.column_names,
            features=_COLUMNS,
            fn_kwargs={"tokenizer": tokenizer},
            with_indices=True,
            num_proc=_num_processes(len(records), num_workers),
            new_fingerprint=fingerprint,
            desc="Tokenizing",
        )

    try:
        if records.cache_files and is_caching_enabled():
            directory = Path(records.cache_files[0]["filename"]).parent
            name = f"cache-{fingerprint}"
            tokenized = load_or_make(make, directory, f"{name}*.arrow", name=name, what="token ids")
        else:
            tokenized = make()
        _check_faults(records, tokenized, tokenizer)
        lost = _lost_prompt_end(records, tokenized, tokenizer)
    except TemplateLimitError as error:
        where = location(records, error.row or 0)
        raise template_limit_error(where, error.what, tokenizer) from None
    return ExampleSet(
        records, tokenized, max_length=max_length, truncation=truncation, lost_prompt_end=lost
    )


def tokenize_json_records(
    records: list[str], indices: list[int], tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[Any]]:
    """The columns of the cache for records as JSON; `fault` says why one cannot be tokenized.

    Raises:
        TemplateLimitError: if the chat template exceeds its limits; `row` is one of `indices`.
    """
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}  # Any: one type a column
    try:
        tokenized = list(token_ids_of_records(records, tokenizer))
    except TemplateLimitError as error:
        raise TemplateLimitError(error.what, indices[error.row or 0]) from error
    starts = [common_prefix_length(item.prompt_ids, item.text_ids) for item in tokenized]
    is_space = _WhiteSpace(tokenizer)
    for item, start, lost in zip(
        tokenized, starts, lost_parts_of(tokenized, starts, tokenizer), strict=True
    ):
        kept = np.asarray(item.prompt_ids[:start], dtype=np.int32)
        completion = item.text_ids[start:]
        key = blake2b(kept.tobytes(), digest_size=8).digest()
        columns["prompt_ids"].append(kept)
        columns["completion_ids"].append(np.asarray(completion, dtype=np.int32))
        columns["prompt_key"].append(int.from_bytes(key, "little", signed=True))
        columns["num_lost"].append(len(item.prompt_ids) - start)
        columns["max_id"].append(max(item.text_ids, default=-1))
        end = next((token for token in reversed(completion) if not is_space[token]), -1)
        columns["end_id"].append(end)
        columns["lost_parts"].append(lost)
        columns["fault"].append(item.fault or (None if completion else _no_token_fault(item)))
    return columns


def _no_token_fault(item: TokenizedRecord) -> str:
    completion = item.record["completion"]
    if isinstance(completion, str):
        return "the completion has no token"
    roles = ", ".join(dict.fromkeys(quote(message.get("role")) for message in completion))
    return f"the completion has no token: the chat template writes nothing for the role {roles}"


class _WhiteSpace(dict[int, bool]):
    """Whether a token is white space, by its id."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> bool:
        self[token] = not str(self._tokenizer.decode([token])).strip()
        return self[token]


def _fingerprint(records: Dataset, tokenizer: PreTrainedTokenizerBase) -> str:
    """The cache key of the token ids: a hash of what determines them, and of nothing else."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary: Any = [tokenizer.get_vocab(), repr(tokenizer.init_kwargs)]  # Any: JSON
    else:
        vocabulary = json.loads(backend.to_str())
        # State of the last call with padding or truncation; tokenization here uses neither.
        vocabulary = {k: v for k, v in vocabulary.items() if k not in ("padding", "truncation")}
    content = {
        "version": [_FORMAT_VERSION, transformers.__version__],
        "records": records._fingerprint,
        "class": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
        "vocabulary": vocabulary,
        "special_tokens": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
    }
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _num_processes(num_records: int, num_workers: int | None) -> int | None:
    """The number of worker processes; None: tokenize in this process."""
    if num_workers is None:
        if num_records <= _MIN_RECORDS_FOR_WORKERS:
            return None
        allowed = getattr(os, "sched_getaffinity", None)
        num_cores = len(allowed(0)) if allowed else os.cpu_count() or 1
        num_workers = min(num_cores, _MAX_WORKERS)
    num_workers = min(num_workers, num_records)
    return num_workers if num_workers > 1 else None


def tokenizer_error(
    fault: str, where: str, tokenizer: PreTrainedTokenizerBase
) -> ModelError | None:
    """The error to raise if the tokenizer itself lacks what all records of this kind need."""
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if fault == NO_TEMPLATE:
        return ModelError(
            f"The tokenizer {name!r} has no chat template, and {where} is a conversation. "
            "Give one with --data.chat_template FILE_OR_NAME, or train on plain text."
        )
    if fault == NO_EOS:
        return ModelError(
            f"The tokenizer {name!r} has no end-of-text token, which the completion of {where} "
            "(plain text) must end with. Set its eos_token and save it again."
        )
    return None


def _check_faults(records: Dataset, tokenized: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DataError or ModelError if some record could not be tokenized."""
    faults = tokenized.data.column("fault")
    if faults.null_count == len(faults):
        return
    rows = np.flatnonzero(faults.is_valid().to_numpy())
    where, first = location(records, int(rows[0])), faults[int(rows[0])].as_py()
    name = tokenizer.name_or_path or type(tokenizer).__name__
    error = tokenizer_error(first, where, tokenizer)
    if error is not None:
        raise error
    shown = [
        f"  {location(records, int(row))}: {faults[int(row)].as_py()}" for row in rows[:_NUM_SHOWN]
    ]
    more = [f"  … and {len(rows) - _NUM_SHOWN} more"] if len(rows) > _NUM_SHOWN else []
    raise DataError(
        f"{len(rows)} of {len(records)} records cannot be turned into tokens by the tokenizer "
        f"{name!r} and {template_name(tokenizer)}:\n"
        + "\n".join([*shown, *more])
        + "\nFix or remove these records, or give another template with "
        "--data.chat_template FILE_OR_NAME."
    )


def template_limit_error(where: str, what: str, tokenizer: PreTrainedTokenizerBase) -> DataError:
    """The error to raise if the chat template exceeds its limits; `what` it does, see there."""
    return DataError(
        f"{where}: {template_name(tokenizer)} {what}, and was stopped. Give another one with "
        "--data.chat_template FILE_OR_NAME."
    )


def _lost_prompt_end(
    records: Dataset, tokenized: Dataset, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """The end of the first prompt that is no prefix of its text; see `TokenizationCounts`."""
    num_lost = tokenized.data.column("num_lost").to_numpy()
    if not num_lost.any():
        return None
    row = int(np.flatnonzero(num_lost)[0])
    (found,) = token_ids_of_records([records[row]["record"]], tokenizer)
    return str(tokenizer.decode(found.prompt_ids[-int(num_lost[row]) :]))
