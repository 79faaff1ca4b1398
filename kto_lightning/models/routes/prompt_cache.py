"""The prompts' keys, values and recurrent states: transformers' cache, written once and then read.

transformers grows a cache call after call. Here one cache records the prompts' run, and each run of
completions reads from a new one, which its layers do not change, because

- y and y' continue the same prompts, y with gradient;
- activation checkpointing runs a layer a second time in backward, when it must find the cache as
  the first time;
- a state that is overwritten in place cannot be differentiated.
"""

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedConfig, cache_utils
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

States = dict[str, Tensor]
"""What a layer keeps of its prompts, by name; one row a prompt."""

_ALONG_THE_PROMPT = {"keys", "values", "indexer_keys"}
"""States of every token, `[rows, …, tokens, size]`; the others are of the prompt's end."""


class UnsupportedCacheError(Exception):
    """A model keeps something of its prompts that `PromptCache` cannot."""


class _Layer:
    """A cache layer whose `recorded` are the states of the prompts' run, or that is only read."""

    recorded: States | None = None
    is_real: Bool[Tensor, "rows width"] | None = None
    """In the prompts' run: False for padding."""

    def record(self, **states: Tensor) -> None:
        if self.recorded is not None:  # else a recomputation of activation checkpointing
            self.recorded |= states

    def load(self, states: States, num_tokens: int) -> None:
        """Continue from states of prompts that are padded on the left to a number of tokens."""


class _Attention(_Layer, DynamicLayer):
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.is_initialized:
            assert self.keys is not None
            assert self.values is not None
            return _joined(self.keys, key_states, -2), _joined(self.values, value_states, -2)
        self.record(keys=key_states, values=value_states)
        return key_states, value_states

    def load(self, states: States, num_tokens: int) -> None:
        super().load(states, num_tokens)
        self.keys, self.values = states["keys"], states["values"]
        self.is_initialized = True


class _SlidingAttention(_Attention, DynamicSlidingWindowLayer):
    def load(self, states: States, num_tokens: int) -> None:
        super().load(states, num_tokens)
        assert self.keys is not None
        assert self.values is not None
        num_hidden = max(num_tokens - self.sliding_window + 1, 0)
        self.keys, self.values = self.keys[..., num_hidden:, :], self.values[..., num_hidden:, :]
        self.cumulative_length = num_tokens


class _IndexedAttention(_Attention, DynamicIndexedLayer):
    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        if self.is_indexer_initialized:
            assert self.indexer_keys is not None
            return _joined(self.indexer_keys, indexer_key_states, -2)
        self.record(indexer_keys=indexer_key_states)
        return indexer_key_states

    def load(self, states: States, num_tokens: int) -> None:
        super().load(states, num_tokens)
        if "indexer_keys" in states:  # layers can take the choice of the layer before
            self.indexer_keys = states["indexer_keys"]
            self.is_indexer_initialized = True


class _LinearAttention(_Layer, LinearAttentionLayer):
    """Mixers with a recurrent state, and short convolutions: each with any number of states."""

    def update_conv_state(
        self,
        conv_states: Tensor,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if self.has_previous_state[state_idx]:
            previous = self.conv_states[state_idx]
            assert previous is not None
            return _joined(previous, conv_states, -1)
        if self.is_real is not None and self.is_real.shape[-1] == conv_states.shape[-1]:
            # Where a projection has a bias, padding is not 0, as what precedes a sequence is.
            conv_states = conv_states.where(self.is_real[:, None], 0.0)
        size = conv_kernel_size or conv_states.shape[-1]
        conv_states = pad(conv_states, (max(size - conv_states.shape[-1], 0), 0))
        self.record(**{f"conv_states.{state_idx}": conv_states[..., -size:]})
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        if not self.has_previous_state[state_idx]:
            self.record(**{f"recurrent_states.{state_idx}": recurrent_states})
        return recurrent_states

    def load(self, states: States, num_tokens: int) -> None:
        super().load(states, num_tokens)
        for name, state in states.items():
            kind, _, index = name.partition(".")
            if index:
                getattr(self, kind)[int(index)] = state
                self.has_previous_state[int(index)] = True


class _Hybrid(_Attention, _LinearAttention, LinearAttentionAndFullAttentionLayer):
    pass


class _SlidingHybrid(
    _SlidingAttention, _LinearAttention, LinearAttentionAndSlidingWindowAttentionLayer
):
    pass


_OWN: dict[type, type] = {
    own.__bases__[-1]: own
    for own in (
        _Attention,
        _SlidingAttention,
        _IndexedAttention,
        _LinearAttention,
        _Hybrid,
        _SlidingHybrid,
    )
}
if hasattr(cache_utils, "DummyLayer"):  # transformers before 5.23 has no entry for empty layers
    _OWN[cache_utils.DummyLayer] = cache_utils.DummyLayer


class PromptCache(DynamicCache):
    """A cache with the layers that transformers makes for a config.

    Args:
        config: the model's.

    Raises:
        UnsupportedCacheError: if the model has a cache layer of its own.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.layers = [_own_layer(layer) for layer in self.layers]
        self._num_tokens = 0

    def empty_copy(self) -> "PromptCache":
        """A cache with the same layers, empty: far cheaper than to read the config again."""
        copied = copy(self)
        copied.layers = [_own_layer(layer) for layer in self.layers]
        return copied

    def start_recording(self, is_real: Bool[Tensor, "rows width"]) -> None:
        """Record the run that follows, of prompts with padding where not `is_real`."""
        for layer in self._storing_layers():
            layer.is_real, layer.recorded = is_real, {}

    def take_recorded(self) -> list[States]:
        """The states of each layer after the prompts' run; ends the recording.

        Raises:
            UnsupportedCacheError: if a layer has not recorded any, which therefore cannot know the
                prompts in the completions' run.
        """
        recorded = []
        for layer in self._storing_layers():
            if not layer.recorded:
                raise UnsupportedCacheError("not all of its layers use transformers' cache")
            recorded.append(layer.recorded)
            layer.recorded = None
        return recorded

    def load(self, states: Sequence[States], num_tokens: int) -> None:
        """Continue from what `take_recorded` has given, padded to a number of tokens."""
        self._num_tokens = num_tokens
        for layer, of_layer in zip(self._storing_layers(), states, strict=True):
            layer.load(of_layer, num_tokens)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The prompts' tokens; for models without attention too, for which transformers fails."""
        return self._num_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if not any(isinstance(layer, _Attention) for layer in self.layers):
            return self._num_tokens + query_length, 0
        return super().get_mask_sizes(query_length, layer_idx)

    def _storing_layers(self) -> list[Any]:
        return [layer for layer in self.layers if isinstance(layer, _Layer)]


class RecordedPrompts:
    """The states of all prompts of a micro-batch, recorded in groups of rows.

    Args:
        empty: a cache of the model.
    """

    def __init__(self, empty: PromptCache) -> None:
        self._empty = empty
        self._groups: list[list[States]] = []
        self._places: dict[int, tuple[int, int]] = {}

    def add(self, rows: Sequence[int], states: list[States]) -> None:
        """Add a group's states, of these prompts of the micro-batch."""
        self._places |= {row: (len(self._groups), place) for place, row in enumerate(rows)}
        self._groups.append(states)

    def in_order(self, rows: Sequence[int]) -> list[int]:
        """The order in which `cache_of` takes these prompts."""
        return sorted(rows, key=self._places.__getitem__)

    def cache_of(self, rows: Sequence[int], num_tokens: int) -> PromptCache:
        """A cache to continue these prompts from.

        Args:
            rows: prompts of the micro-batch, `in_order`.
            num_tokens: at least the longest prompt's; the others are padded on the left.
        """
        chosen: dict[int, list[int]] = {}
        for row in rows:
            group, place = self._places[row]
            chosen.setdefault(group, []).append(place)
        device = next(iter(self._groups[0][0].values())).device
        groups = [
            (self._groups[group], torch.tensor(places).to(device, non_blocking=True))
            for group, places in chosen.items()
        ]
        cache = self._empty.empty_copy()
        cache.load(
            [
                {
                    name: torch.cat(
                        [
                            _fitted(states[layer][name].index_select(0, places), name, num_tokens)
                            for states, places in groups
                        ]
                    )
                    for name in names
                }
                for layer, names in enumerate(self._groups[0])
            ],
            num_tokens,
        )
        return cache


def _own_layer(layer: Any) -> Any:
    own: type | None = type(layer) if isinstance(layer, _Layer) else _OWN.get(type(layer))
    if own is None:
        raise UnsupportedCacheError(f"it has cache layers of its own ({type(layer).__name__})")
    return own(
        sliding_window=getattr(layer, "sliding_window", None),
        number_of_states=getattr(layer, "number_of_states", 1),
    )


def _joined(previous: Tensor, states: Tensor, dim: int) -> Tensor:
    return torch.cat([previous.to(states.dtype), states], dim)


def _fitted(state: Tensor, name: str, num_tokens: int) -> Tensor:
    """The last tokens of a state that has them, padded on the left where it has fewer."""
    if name not in _ALONG_THE_PROMPT:
        return state
    num_missing = num_tokens - state.shape[-2]
    return state[..., -num_missing:, :] if num_missing < 0 else pad(state, (0, 0, num_missing, 0))
