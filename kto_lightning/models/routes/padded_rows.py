"""Padded rows, one sequence each: where a packed row's tokens are in them, and back."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from kto_lightning.models.routes.runner import router_logits
from kto_lightning.models.row_indices import to_device


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedRows:
    """Where the tokens of a packed row are in padded rows, one sequence a row."""

    tokens: Int64[np.ndarray, "rows width"]
    """The packed row's token at each place; 0 for padding, as any token can be the padding."""
    places: Int64[np.ndarray, "rows width"]
    """Each token's place in its own sequence; for padding, the nearest token's."""
    is_real: Bool[np.ndarray, "rows width"]
    """False for padding."""

    @classmethod
    def of(
        cls,
        starts: Int64[np.ndarray, " rows"],
        lengths: Int64[np.ndarray, " rows"],
        *,
        width: int,
        left: bool,
    ) -> "PaddedRows":
        """Rows for these sequences.

        Args:
            starts: the packed row's first token of each sequence.
            lengths: tokens of each sequence.
            width: at least the longest.
            left: whether the padding is on the left.
        """
        lengths = lengths[:, None]
        places = np.arange(width) - (width - lengths if left else 0)
        is_real = (places >= 0) & (places < lengths)
        return cls(
            tokens=np.where(is_real, starts[:, None] + places, 0),
            places=places.clip(0, np.maximum(lengths - 1, 0)),
            is_real=is_real,
        )


class PaddedOutputs:
    """Hidden states and router logits of calls with padded rows, one after the other."""

    def __init__(self) -> None:
        self._hidden: list[Float[Tensor, "positions width"]] = []
        self._router_logits: list[list[Tensor]] = []
        self._num_positions = 0

    def add(self, outputs: Any) -> Int64[np.ndarray, " rows"]:
        """Add a call's output; gives where each of its rows begins."""
        hidden = outputs.last_hidden_state
        rows, width = hidden.shape[:2]
        starts = self._num_positions + width * np.arange(rows)
        self._num_positions += rows * width
        self._hidden.append(hidden.flatten(0, 1))
        self._router_logits.append(router_logits(outputs, None))
        return starts

    def take(
        self, positions: Int64[np.ndarray, " tokens"]
    ) -> tuple[Float[Tensor, "tokens width"], list[Float[Tensor, "tokens experts"]]]:
        """The hidden states, and each layer's router logits, at some of the positions."""
        hidden = torch.cat(self._hidden)
        rows = to_device(positions, hidden.device)
        layers = zip(*self._router_logits, strict=True)
        logits = [torch.cat(calls).index_select(0, rows) for calls in layers]
        return hidden.index_select(0, rows), logits
