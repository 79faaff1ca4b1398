"""`ExampleSet`: tokenized records, truncated to a length, for the sampler and the collator.

Lengths, labels and prompt keys are NumPy arrays in memory; the tokens stay in the cache file, which
is memory-mapped, so that a million records take megabytes and loader processes share them.
"""

import copy
from dataclasses import dataclass, replace
from typing import Literal
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from jaxtyping import Bool, Float32, Int32, Int64
from transformers import PreTrainedTokenizerBase

from kto_lightning.data.lost import LostPart, OtherEnd
from kto_lightning.errors import DataError

Truncation = Literal["keep_start", "keep_end"]

_NUM_SHOWN = 5


@dataclass(kw_only=True, slots=True)
class Example:
    """One example, ready to be collated. The arrays are read-only views into the cache file."""

    index: int
    """Its position in the `ExampleSet`."""
    prompt_ids: Int32[np.ndarray, " prompt"]
    """Truncated at its start under `keep_end`, else whole."""
    completion_ids: Int32[np.ndarray, " completion"]
    """Never truncated: as a mismatched completion it follows another prompt, which may leave more
    room. The collator truncates."""
    desirable: bool
    weight: float
    """The record's own weight, without the class weight."""


@dataclass(kw_only=True, slots=True)
class TokenizationCounts:
    """Counts of kept, dropped and truncated records, for the log and the data report."""

    records: int
    dropped_desirable: int
    """Desirable records whose prompt alone fills `max_length` under `keep_start`."""
    dropped_undesirable: int
    dropped: list[str]
    """The first few dropped records, as `file:line`."""
    truncated_desirable: int
    """Desirable examples that are kept, but longer than `max_length`."""
    truncated_undesirable: int
    prompts_not_prefix: int
    """Records whose tokenized prompt is not a prefix of their tokenized text."""
    lost_prompt_end: str | None
    """The end of the first such prompt, which the model is not trained on."""
    desirable: int
    undesirable: int
    prompt_tokens: int
    """Of the examples kept, after truncation."""
    completion_tokens: int


class ExampleSet:
    """The examples kept, by position; token ids are read from disk on access.

    Attributes:
        prompt_lengths: tokens of each prompt after truncation.
        completion_lengths: tokens of each completion, untruncated.
        desirable: the labels; True where a record has none, as `predict` allows.
        weights: each record's own weight.
        prompt_keys: equal where the untruncated prompts are equal, token by token (64 bits of
            BLAKE2b: among a million prompts two that differ share a key once in 10^7 data sets,
            and then merely do not become partners). Untruncated, so that two questions with the
            same last tokens still differ and another `max_length` keeps partners.
        rows: the record that each example was made from, as a row of `records`.
        max_length: the limit that `prompt_lengths` and `counts` were computed for.
        counts: of kept, dropped and truncated records.
    """

    prompt_lengths: Int64[np.ndarray, " examples"]
    completion_lengths: Int64[np.ndarray, " examples"]
    desirable: Bool[np.ndarray, " examples"]
    weights: Float32[np.ndarray, " examples"]
    prompt_keys: Int64[np.ndarray, " examples"]
    rows: Int64[np.ndarray, " examples"]

    def __init__(
        self,
        records: Dataset,
        tokenized: Dataset,
        *,
        max_length: int | None,
        truncation: Truncation,
        lost_prompt_end: str | None = None,
    ) -> None:
        self._records, self._tokenized = records, tokenized
        self._open_columns()
        table = tokenized.data
        full_prompts, completions = self._prompts.lengths(), self._completions.lengths()
        prompts, dropped = truncate_prompts(full_prompts, completions, max_length, truncation)
        given = records.select_columns(["desirable", "weight"]).with_format("arrow")[:]
        desirable = given["desirable"].fill_null(True).to_numpy()

        self.max_length = max_length
        self.rows = np.flatnonzero(~dropped)
        self.prompt_lengths = prompts[self.rows]
        self.completion_lengths = completions[self.rows]
        self.desirable = desirable[self.rows]
        self.weights = given["weight"].to_numpy()[self.rows]
        self.prompt_keys = table.column("prompt_key").to_numpy()[self.rows]
        if not len(self.rows):
            raise _no_examples_error(full_prompts, max_length)
        num_lost = table.column("num_lost").to_numpy()
        first_dropped = np.flatnonzero(dropped)[:_NUM_SHOWN]
        self.counts = TokenizationCounts(
            records=len(records),
            dropped_desirable=int((dropped & desirable).sum()),
            dropped_undesirable=int((dropped & ~desirable).sum()),
            dropped=[location(records, int(row)) for row in first_dropped],
            prompts_not_prefix=int((num_lost > 0).sum()),
            lost_prompt_end=lost_prompt_end,
            **self._counts_of_kept(),
        )

    def _counts_of_kept(self) -> dict[str, int]:
        full_lengths = self._prompts.lengths() + self._completions.lengths()
        longer = full_lengths[self.rows] > _limit(self.max_length)
        return {
            "truncated_desirable": int((longer & self.desirable).sum()),
            "truncated_undesirable": int((longer & ~self.desirable).sum()),
            "desirable": int(self.desirable.sum()),
            "undesirable": int((~self.desirable).sum()),
            "prompt_tokens": int(self.prompt_lengths.sum()),
            "completion_tokens": int(np.minimum(self.completion_lengths, self._room()).sum()),
        }

    def select(self, positions: Int64[np.ndarray, " chosen"]) -> "ExampleSet":
        """The examples at `positions` as a new set; `counts` still includes the dropped records."""
        chosen = copy.copy(self)
        for name in (
            "prompt_lengths",
            "completion_lengths",
            "desirable",
            "weights",
            "prompt_keys",
            "rows",
        ):
            setattr(chosen, name, getattr(self, name)[positions])
        chosen.counts = replace(self.counts, **chosen._counts_of_kept())
        return chosen

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = int(self.rows[index])
        prompt_ids = self._prompts[row]
        return Example(
            index=index,
            prompt_ids=prompt_ids[len(prompt_ids) - int(self.prompt_lengths[index]) :],
            completion_ids=self._completions[row],
            desirable=bool(self.desirable[index]),
            weight=float(self.weights[index]),
        )

    @property
    def records(self) -> Dataset:
        """All records as they were read, dropped ones included; `rows` indexes it."""
        return self._records

    @property
    def tokenized(self) -> Dataset:
        """The token ids of all records, by the rows of `records`."""
        return self._tokenized

    def location(self, index: int) -> str:
        """Where an example was written, as `file:line`."""
        return location(self._records, int(self.rows[index]))

    def lost_parts(self) -> list[LostPart]:
        """The parts of the examples' records that their tokens lack, most frequent first."""
        found: dict[str, LostPart] = {}
        column = self._tokenized.data.column("lost_parts")
        lengths = pc.list_value_length(column).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
        for row in self.rows[lengths[self.rows] > 0].tolist():
            for name in column[row].as_py():
                part = found.setdefault(name, LostPart(name=name, count=0, first=""))
                part.first = part.first or location(self._records, row)
                part.count += 1
        return sorted(found.values(), key=lambda part: -part.count)

    def other_end(self, end_ids: set[int], tokenizer: PreTrainedTokenizerBase) -> OtherEnd | None:
        """The completions that end with none of the tokens `end_ids`; None: all end with one."""
        ends = self._tokenized.data.column("end_id").to_numpy()[self.rows]
        other = ~np.isin(ends, list(end_ids))
        if not other.any():
            return None
        tokens, counts = np.unique(ends[other], return_counts=True)
        commonest = int(tokens[counts.argmax()])
        return OtherEnd(
            token=decode_token(commonest, tokenizer),
            end_tokens=[decode_token(token, tokenizer) for token in sorted(end_ids)],
            count=int(other.sum()),
            first=self.location(int(other.argmax())),
        )

    def largest_id(self) -> tuple[int, str]:
        """The largest token id in these examples, and where it occurs, as `file:line`."""
        ids = self._tokenized.data.column("max_id").to_numpy()[self.rows]
        return int(ids.max()), self.location(int(ids.argmax()))

    def longest(self, *, mismatched: bool) -> int:
        """An upper bound on the tokens of a sequence.

        Args:
            mismatched: whether any completion may follow any prompt.
        """
        if mismatched:
            length = int(self.prompt_lengths.max() + self.completion_lengths.max())
        else:
            length = int((self.prompt_lengths + self.completion_lengths).max())
        return min(length, _limit(self.max_length))

    def checksum(self) -> int:
        """CRC-32 of labels and completion lengths, by which checkpoints of before `record_digests`
        identify the records and their order."""
        return crc32(self.completion_lengths.tobytes(), crc32(self.desirable.tobytes()))

    def _room(self) -> Int64[np.ndarray, " examples"]:
        """Tokens that `max_length` leaves for the completion after each prompt."""
        return _limit(self.max_length) - self.prompt_lengths

    def _open_columns(self) -> None:
        self._prompts = _TokenLists(self._tokenized.data.column("prompt_ids"))
        self._completions = _TokenLists(self._tokenized.data.column("completion_ids"))

    def __getstate__(self) -> dict[str, object]:
        # A spawned loader process maps the file again; pickling the views would copy the tokens.
        return {k: v for k, v in vars(self).items() if k not in ("_prompts", "_completions")}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._open_columns()


class _TokenLists:
    """The rows of an Arrow list column as NumPy views, without conversion to Python lists."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._starts = np.cumsum([0, *(len(chunk) for chunk in column.chunks)])
        self._chunks = [(c.offsets.to_numpy(), c.values.to_numpy()) for c in column.chunks]

    def __getitem__(self, row: int) -> Int32[np.ndarray, " tokens"]:
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        offsets, values = self._chunks[chunk]
        start = row - int(self._starts[chunk])
        return values[offsets[start] : offsets[start + 1]]

    def lengths(self) -> Int64[np.ndarray, " records"]:
        return np.concatenate([np.diff(offsets) for offsets, _ in self._chunks]).astype(np.int64)


def location(records: Dataset, row: int) -> str:
    """Where a record was written, as `file:line`."""
    record = records[row]
    return f"{record['file']}:{record['line']}"


def decode_token(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a token; a space for the -1 of a completion of white space."""
    return str(tokenizer.decode([token])) if token >= 0 else " "


def _limit(max_length: int | None) -> int:
    return np.iinfo(np.int64).max if max_length is None else max_length


def truncate_prompts(
    prompts: Int64[np.ndarray, " records"],
    completions: Int64[np.ndarray, " records"],
    max_length: int | None,
    truncation: Truncation,
) -> tuple[Int64[np.ndarray, " records"], Bool[np.ndarray, " records"]]:
    """Prompt lengths after truncation, and a mask of the examples without room for a completion."""
    if truncation == "keep_start":
        return prompts, prompts >= _limit(max_length)
    room = np.maximum(_limit(max_length) - completions, 1)
    return np.minimum(prompts, room), np.zeros(len(prompts), dtype=bool)


def _no_examples_error(prompts: Int64[np.ndarray, " records"], max_length: int | None) -> DataError:
    return DataError(
        f"No example is left of {len(prompts)} records: with --data.max_length {max_length} every "
        f"prompt alone fills the sequence (the shortest has {prompts.min()} tokens). "
        "Raise --data.max_length, or set --data.truncation keep_end."
    )
