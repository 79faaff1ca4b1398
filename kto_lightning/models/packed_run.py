"""Packed runs: sequences end to end in one row, and the prompts' keys and values between two runs.

Two kinds of run (arXiv:2410.20305 shares prefixes between DPO's two answers in a similar way):

- a matched run `[x1 y1 | x2 y2 | …]`: each token attends causally inside its segment. The run may
  save every layer's keys and values of the prompts in a `PromptStore`;
- a mismatched run `[y'1 | y'2 | …]` on top of that store: y'_i attends to x_i and, causally, to
  itself. The prompts are not computed a second time.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kto_lightning.models.ambient import Ambient, contexts_of_checkpoint
from kto_lightning.models.row_indices import interleaved_ranges, to_device


class UnsupportedAttentionError(Exception):
    """A layer needs something that packed attention does not implement; another route does."""


@dataclass(kw_only=True, slots=True, eq=False)
class PromptStore:
    """The prompts' keys and values of every layer, for a mismatched run.

    They are detached: z0 has no gradient, so the mismatched run needs none. Attached, they would
    also keep the autograd graph of the matched run alive for as long as the store.
    """

    starts: Sequence[int]
    """The first row of each prompt among the stored rows."""
    num_rows: int
    """How many rows are stored."""
    rows: Tensor | None = None
    """The rows of the run to copy. None: store all rows without a copy, which takes no memory while
    autograd holds the same tensors for backward."""
    is_recording: bool = True
    """False after the run. Activation checkpointing runs the layers a second time in backward, and
    these calls must not store anything."""
    layers: dict[tuple[nn.Module, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """A layer and the number of its call in the run to keys and values, `[1, kv_heads, num_rows,
    head_size]` each. DiffLlama's layers attend twice, HRM's run in cycles."""

    def add(self, call: tuple[nn.Module, int], key: Tensor, value: Tensor) -> None:
        """Store the keys and values of one call of a layer."""
        key, value = key.detach(), value.detach()
        if self.rows is not None:
            key, value = key.index_select(2, self.rows), value.index_select(2, self.rows)
        self.layers[call] = (key, value)


@dataclass(slots=True, eq=False)
class PackedRun:
    """The segments of one packed run, which every layer reads while the run is `active`.

    One object per run, so that the index tensors and masks below are made once and not per layer.
    """

    lengths: list[int]
    """Query tokens of each segment."""
    store: PromptStore | None = None
    """Matched run: where to save the prompts' keys and values. Mismatched: where to read them."""
    prefix_lengths: list[int] | None = None
    """Mismatched run: prompt tokens of each segment."""
    kv_rows: Tensor | None = None
    """Mismatched run: arranges `[stored rows | rows of this run]` as `[x1 y'1 | x2 y'2 | …]`."""
    block_masks: dict[int | None, Any] = field(default_factory=dict)
    """A window to the mask of `flex_attention.py`."""
    _calls: Counter[nn.Module] = field(default_factory=Counter)
    _masks: dict[tuple, Tensor] = field(default_factory=dict)
    _boundaries: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def after_prompts(
        cls, store: PromptStore, prompt_lengths: list[int], lengths: list[int], device: torch.device
    ) -> "PackedRun":
        """The mismatched run `[y'1 | y'2 | …]` on top of the prompts in `store`.

        Ends the recording of `store`.
        """
        store.is_recording = False
        own_starts = np.cumsum([store.num_rows, *lengths[:-1]])
        kv_rows = interleaved_ranges(store.starts, prompt_lengths, own_starts, lengths)
        return cls(
            lengths=lengths,
            store=store,
            prefix_lengths=prompt_lengths,
            kv_rows=to_device(kv_rows, device),
        )

    def active(self) -> AbstractContextManager[None]:
        """A context in which layers attend in this run; of this thread only."""
        return _current.active(self)

    @property
    def num_attention_calls(self) -> int:
        """Calls of `packed_attention`; fewer than the number of layers in models with other layers
        that mix tokens."""
        return self._calls.total()

    @property
    def kv_lengths(self) -> list[int]:
        """Key tokens of each segment: its prompt's and its own."""
        if self.prefix_lengths is None:
            return self.lengths
        return [p + n for p, n in zip(self.prefix_lengths, self.lengths, strict=True)]

    def keys_and_values(
        self, layer: nn.Module, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The keys and values that a layer attends to in its next call, `[1, kv_heads, kv_tokens,
        head_size]` each.

        A matched run saves them to its store; a mismatched run puts the prompts' before its own.

        Raises:
            UnsupportedAttentionError: if the matched run had no such call.
        """
        call = layer, self._calls[layer]
        self._calls[layer] += 1
        if self.prefix_lengths is None:
            if self.store is not None and self.store.is_recording:
                self.store.add(call, key, value)
            return key, value
        assert self.store is not None
        assert self.kv_rows is not None
        if call not in self.store.layers:
            raise UnsupportedAttentionError("its layers attend more often for y' than for y")
        prompt_key, prompt_value = self.store.layers[call]
        return (
            torch.cat([prompt_key.to(key.dtype), key], dim=2).index_select(2, self.kv_rows),
            torch.cat([prompt_value.to(value.dtype), value], dim=2).index_select(2, self.kv_rows),
        )

    def mask(self, q_length: int, kv_length: int, window: int | None, like: Tensor) -> Tensor:
        """An additive causal mask, `[q_length, kv_length]`: 0 where visible, −inf where not.

        The last query is aligned with the last key. `window`: how many keys up to its own a query
        sees; None: all.
        """
        key = (q_length, kv_length, window, like.dtype)
        if key not in self._masks:
            queries = torch.arange(kv_length - q_length, kv_length, device=like.device)[:, None]
            keys = torch.arange(kv_length, device=like.device)
            hidden = keys > queries
            if window:
                hidden |= keys <= queries - window
            mask = torch.zeros(q_length, kv_length, dtype=like.dtype, device=like.device)
            self._masks[key] = mask.masked_fill_(hidden, float("-inf"))
        return self._masks[key]

    def visible_keys(self, window: int | None) -> tuple[np.ndarray, np.ndarray]:
        """The first and the last key that each query sees, `[queries]` each, int64; see `mask`."""
        lengths, kv_lengths = np.array(self.lengths), np.array(self.kv_lengths)
        ends = np.cumsum(kv_lengths)
        first = np.repeat(ends - kv_lengths, lengths)
        last = interleaved_ranges(ends - lengths, lengths)
        return first if window is None else np.maximum(first, last - window + 1), last

    def boundaries(self, of: str, device: torch.device) -> Tensor:
        """Cumulative segment lengths `[0, n1, n1 + n2, …]` of the `queries` or `keys`, int32."""
        if of not in self._boundaries:
            lengths = self.lengths if of == "queries" else self.kv_lengths
            boundaries = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
            self._boundaries[of] = boundaries.to(device, non_blocking=True)
        return self._boundaries[of]


_current: Ambient[PackedRun] = Ambient("packed_run")


def current_run() -> PackedRun | None:
    """The run that is active in this thread; None: none is."""
    return _current.get()


CHECKPOINTING: dict[str, Any] = {"use_reentrant": False, "context_fn": contexts_of_checkpoint}
"""What to give a model's `gradient_checkpointing_enable`, so that its layers can run packed."""
