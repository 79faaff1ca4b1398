"""RoPE whose frequencies depend on the length of the sequence.

transformers takes that length from the largest position of the whole call, and `dynamic` RoPE keeps
the longest one for later calls. With several sequences in a call, a long one would change how the
others are rotated. Here each is rotated as in a forward of its own in a fresh model:

- `longrope` (arXiv:2402.13753; Phi-3, Phi-4) has two sets of frequencies, for sequences up to
  `original_max_position_embeddings` and for longer ones; PhiMoE also scales by such a limit;
- `dynamic` NTK scaling has frequencies of its own for each length above `max_position_embeddings`.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from kto_lightning.batches.types import PackedBatch
from kto_lightning.models.ambient import Ambient
from kto_lightning.models.packed_run import UnsupportedAttentionError
from kto_lightning.models.row_indices import to_device


@dataclass(frozen=True, slots=True)
class RopeLimits:
    """The lengths at which a model's frequencies change."""

    steps: frozenset[int] = frozenset()
    """A sequence longer than one of these has other frequencies than one that is not."""
    grows_above: frozenset[int] = frozenset()
    """Above the lowest of these each length has its own."""

    @property
    def all(self) -> list[int]:
        """All of them, ascending."""
        return sorted(self.steps | self.grows_above)

    def __bool__(self) -> bool:
        return bool(self.all)

    def __or__(self, other: "RopeLimits") -> "RopeLimits":
        return RopeLimits(self.steps | other.steps, self.grows_above | other.grows_above)

    def representatives(
        self, lengths: Int64[np.ndarray, " sequences"]
    ) -> Int64[np.ndarray, " sequences"]:
        """For each length the shortest that has the same frequencies, in tokens."""
        limits = np.array(self.all, dtype=np.int64)
        shortest = np.concatenate([[0], limits + 1])[np.searchsorted(limits, lengths)]
        if not self.grows_above:
            return shortest
        return np.where(lengths > min(self.grows_above), lengths, shortest)

    def lets_share(self, batch: PackedBatch) -> bool:
        """Whether each prompt of a batch that shares them has the same frequencies before y as
        before y'."""
        assert batch.mismatched is not None
        if not self:
            return True
        prompts = np.array(batch.prompt_lengths, dtype=np.int64)
        matched = self.representatives(np.array(batch.matched.lengths, dtype=np.int64))
        mismatched = self.representatives(prompts + np.array(batch.mismatched.lengths))
        return bool((matched == mismatched).all())


@dataclass(slots=True, eq=False)
class SequenceLengths:
    """Which sequence each position of a forward belongs to, and how long that is."""

    whole: list[int]
    """Tokens of each sequence, prompt and completion, also of those that this forward lacks."""
    segments: list[int] | None = None
    """Packed: how many tokens of each sequence follow each other in the single row. None: each
    sequence is a row."""

    def lengths(self, device: torch.device) -> Int[Tensor, "rows tokens_or_1"]:
        """The length of the sequence of each position."""
        return self._spread(np.array(self.whole, dtype=np.int64), device)

    def groups(
        self, limits: RopeLimits, device: torch.device
    ) -> list[tuple[int, Bool[Tensor, "rows tokens_or_1"]]]:
        """Each set of sequences that share frequencies: the shortest length with these, and
        whether each position is of the set."""
        found = limits.representatives(np.array(self.whole, dtype=np.int64))
        return [
            (length, self._spread(found == length, device)) for length in np.unique(found).tolist()
        ]

    def _spread(self, values: np.ndarray, device: torch.device) -> Tensor:
        if self.segments is not None:
            values = np.repeat(values, self.segments)[None]
        else:
            values = values[:, None]
        return to_device(values, device)


_current: Ambient[SequenceLengths] = Ambient("sequence_lengths")


def rotating(sequences: SequenceLengths) -> AbstractContextManager[None]:
    """A context whose forwards rotate each sequence by its own length."""
    return _current.active(sequences)


def limits_of(model: nn.Module) -> RopeLimits:
    """All lengths at which the frequencies of one of a model's RoPE modules change."""
    limits = RopeLimits()
    for module in model.modules():
        for layer_type in _layer_types(module):
            limits |= _limits(module, layer_type)
    return limits


def rotate_each_sequence(model: nn.Module) -> None:
    """Make a model's RoPE follow `rotating`, which changes nothing outside of its blocks; once is
    enough. Models with a RoPE of constant frequencies stay as they are."""
    rotate_as_transformers(model)
    for module in model.modules():
        if any(_limits(module, layer_type) for layer_type in _layer_types(module)):
            module.register_forward_hook(_rotate_again, with_kwargs=True)


def rotate_as_transformers(model: nn.Module) -> None:
    """Undo `rotate_each_sequence`."""
    for module in model.modules():
        for number, hook in list(module._forward_hooks.items()):
            if hook is _rotate_again:
                del module._forward_hooks[number]
                del module._forward_hooks_with_kwargs[number]


def _layer_types(module: nn.Module) -> list[str | None]:
    """The layer types that a RoPE module has frequencies for, `[None]` where they are for all;
    empty for another module."""
    rope_type: Any = getattr(module, "rope_type", None)
    if getattr(getattr(module, "config", None), "rope_parameters", None) is None:
        return []
    if isinstance(rope_type, dict):
        return list(rope_type)
    return [None] if isinstance(rope_type, str) else []


def _limits(module: Any, layer_type: str | None) -> RopeLimits:
    rope_type, parameters = module.rope_type, module.config.rope_parameters
    if layer_type is not None:
        rope_type, parameters = rope_type[layer_type], parameters.get(layer_type, {})
    limits = RopeLimits()
    if "dynamic" in rope_type:
        limits |= RopeLimits(grows_above=frozenset({module.original_max_seq_len}))
    if rope_type == "longrope" or (rope_type != "default" and "long_mscale" in parameters):
        limit = parameters["original_max_position_embeddings"]
        limits |= RopeLimits(steps=frozenset({limit}))
    return limits


def _rotate_again(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook: the output for each sequence by its length, not the call's."""
    sequences = _current.get()
    if sequences is None:
        return None
    found = _rotate(module, sequences, *args, **kwargs)
    return found if isinstance(output, tuple) else found[0]


def _rotate(
    module: Any,
    sequences: SequenceLengths,
    x: Tensor,
    position_ids: Int[Tensor, "*axes rows_or_1 tokens"],
    layer_type: str | None = None,
) -> tuple[Float[Tensor, "*axes rows tokens angles"], ...]:
    device, options = position_ids.device, {}
    if layer_type is not None:
        options["layer_type"] = layer_type
    lengths = sequences.lengths(device)
    if lengths.shape[1] not in (1, position_ids.shape[-1]):
        raise UnsupportedAttentionError("its RoPE is not of the tokens of the sequences")
    # Padding has positions beyond its sequence.
    position_ids = torch.where(position_ids < lengths, position_ids, 0)
    found: tuple[Tensor, ...] = ()
    for length, is_own in sequences.groups(_limits(module, layer_type), device):
        own = torch.where(is_own, position_ids, 0)
        last = own.new_full((*own.shape[:-1], 1), max(length - 1, 0))
        _forget_lengths(module, layer_type)
        rotated = module.forward(x, torch.cat([own, last], dim=-1), **options)
        rotated = rotated if isinstance(rotated, tuple) else (rotated,)
        rotated = tuple(part[..., :-1, :] for part in rotated)
        found = found or rotated
        pairs = zip(rotated, found, strict=True)
        found = tuple(torch.where(is_own[..., None], *pair) for pair in pairs)
    _forget_lengths(module, layer_type)
    return found


def _forget_lengths(module: Any, layer_type: str | None) -> None:
    """Undo what `dynamic` RoPE keeps of earlier calls."""
    prefix, rope_type = "", module.rope_type
    if layer_type is not None:
        prefix, rope_type = f"{layer_type}_", rope_type[layer_type]
    if "dynamic" in rope_type:
        frequencies = getattr(module, f"{prefix}original_inv_freq")
        setattr(
            module, f"{prefix}inv_freq", frequencies.to(getattr(module, f"{prefix}inv_freq").device)
        )
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
