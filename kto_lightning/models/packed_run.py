"""Packed runs: sequences end to end in one row, and the prompts' keys and values between two runs.

Two kinds of run (arXiv:2410.20305 shares prefixes between DPO's two answers in a similar way):

- a matched run `[x1 y1 | x2 y2 | …]`: each token attends causally inside its segment. The run may
  save every layer's keys and values of the prompts in a `PromptStore`;
- a mismatched run `[y'1 | y'2 | …]` on top of that store: y'_i attends to x_i and, causally, to
  itself. The prompts are not computed a second time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor


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
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Layer index to keys and values, `[1, kv_heads, num_rows, head_size]` each."""

    def add(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store one layer's keys and values of the run."""
        key, value = key.detach(), value.detach()
        if self.rows is not None:
            key, value = key.index_select(2, self.rows), value.index_select(2, self.rows)
        self.layers[layer] = (key, value)


def interleaved_ranges(*starts_and_lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Row indices of the first range of each list, then of the second of each, and so on; int64.

    Args:
        starts_and_lengths: starts and lengths of the first list's ranges, of the second's, …, all
            lists equally long.

    Example:
        >>> interleaved_ranges([0, 10], [2, 1])
        array([ 0,  1, 10])
    """
    starts = np.stack(starts_and_lengths[0::2], axis=1).reshape(-1).astype(np.int64)
    lengths = np.stack(starts_and_lengths[1::2], axis=1).reshape(-1).astype(np.int64)
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(lengths.sum())


@dataclass(slots=True, eq=False)
class PackedRun:
    """The segments of one packed run, passed to every layer.

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
    num_attention_calls: int = 0
    """Layers that have called `packed_attention`; lower than the number of layers in models with
    other layers that mix tokens."""
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
            kv_rows=torch.from_numpy(kv_rows).to(device, non_blocking=True),
        )

    @property
    def kv_lengths(self) -> list[int]:
        """Key tokens of each segment: its prompt's and its own."""
        if self.prefix_lengths is None:
            return self.lengths
        return [p + n for p, n in zip(self.prefix_lengths, self.lengths, strict=True)]

    def keys_and_values(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values to attend to, `[1, kv_heads, kv_tokens, head_size]` each.

        A matched run saves them to its store; a mismatched run puts the prompts' before its own.
        """
        if self.prefix_lengths is None:
            if self.store is not None and self.store.is_recording:
                self.store.add(layer, key, value)
            return key, value
        assert self.store is not None
        assert self.kv_rows is not None
        prompt_key, prompt_value = self.store.layers[layer]
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
            distance = torch.arange(kv_length - q_length, kv_length, device=like.device)[:, None]
            distance = distance - torch.arange(kv_length, device=like.device)
            hidden = distance < 0
            if window:
                hidden |= distance >= window
            mask = torch.zeros(q_length, kv_length, dtype=like.dtype, device=like.device)
            self._masks[key] = mask.masked_fill_(hidden, float("-inf"))
        return self._masks[key]

    def boundaries(self, of: str, device: torch.device) -> Tensor:
        """Cumulative segment lengths `[0, n1, n1 + n2, …]` of the `queries` or `keys`, int32."""
        if of not in self._boundaries:
            lengths = self.lengths if of == "queries" else self.kv_lengths
            boundaries = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
            self._boundaries[of] = boundaries.to(device, non_blocking=True)
        return self._boundaries[of]
