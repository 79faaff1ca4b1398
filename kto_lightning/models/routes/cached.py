"""The cached route: prompts once as left-padded rows, completions as rows on top of their cache."""

import inspect
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from kto_lightning.batches.types import PackedBatch, Sequences
from kto_lightning.models.architecture import decoder
from kto_lightning.models.rope import SequenceLengths
from kto_lightning.models.routes.padded import PaddedRunner
from kto_lightning.models.routes.padded_rows import PaddedOutputs, PaddedRows
from kto_lightning.models.routes.prompt_cache import (
    PromptCache,
    RecordedPrompts,
    UnsupportedCacheError,
)
from kto_lightning.models.routes.row_groups import row_groups
from kto_lightning.models.routes.runner import (
    MatchedRun,
    call_decoder,
    positions_for,
    rows_after_prompts,
)
from kto_lightning.models.row_indices import interleaved_ranges, starts_of, to_device

_CACHE_NAMES = "past_key_values", "cache_params", "cache"
"""Of the cache in a model's forward; the last one in all from transformers 5.24 on."""
_MIN_WIDTH = 2
"""Tokens of a row. A call with one token is a step of decoding to transformers: mixers update their
state in place, with kernels that have no gradient, and ignore padding."""


class CachedRunner:
    """See `Runner`. The model runs with its original attention, and its own kernels.

    Args:
        model: a model without peft's wrapper.
        single_group: run prompts, y and y' in one call each, whatever the padding: where every rank
            must call the model equally often (FSDP2).

    Raises:
        UnsupportedCacheError: if the model does not take a cache, or one of its own.
    """

    shares_prompts = True

    def __init__(self, model: PreTrainedModel, *, single_group: bool = False) -> None:
        self._model, self._single_group = model, single_group
        self.offloads_activations = False
        parameters = inspect.signature(decoder(model).forward).parameters
        names = [name for name in _CACHE_NAMES if name in parameters]
        if not names:
            raise UnsupportedCacheError("its forward takes no cache")
        self._cache_name = names[0]
        self._empty_cache = PromptCache(model.config)
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                # Else transformers runs it without the cache. Recomputed, it finds the same one.
                module._can_checkpoint_with_cache = True

    def run_matched(self, batch: PackedBatch, *, keeps_prompts: bool) -> MatchedRun:
        run = self._run_matched(batch)
        if not keeps_prompts:
            run.prompts = None
        return run

    def run_mismatched(
        self, batch: PackedBatch, matched: MatchedRun | None
    ) -> tuple[Float[Tensor, "rows width"], Int[Tensor, " scored"]]:
        sequences = batch.mismatched
        assert sequences is not None
        scored = sequences.scored.rows
        if not batch.shares_prompts:
            # In one call, as y' on top of the prompts, so that sharded ranks stay in step.
            padded = PaddedRunner(self._model, single_group=self._single_group)
            return padded.run_mismatched(batch, None)
        outputs = PaddedOutputs()
        if matched is None or matched.prompts is None:
            whole = np.add(batch.prompt_lengths, sequences.lengths)
            prompts, starts = self._run_prompts(batch, whole, outputs)
            hidden, _ = outputs.take(interleaved_ranges(starts, batch.prompt_lengths))
            scored = rows_after_prompts(batch, scored)
            outputs = PaddedOutputs()
        else:
            hidden, prompts = matched.hidden, matched.prompts
        lengths = np.array(sequences.lengths)
        starts = np.array(starts_of(sequences.lengths))
        starts = self._run_completions(batch, prompts, sequences, starts, lengths, outputs)
        if lengths.any():
            continued, _ = outputs.take(interleaved_ranges(starts, lengths))
            hidden = torch.cat([hidden, continued])
        return hidden, scored

    def _run_matched(self, batch: PackedBatch) -> MatchedRun:
        """Run the prompts, and the completions on top of these."""
        sequences, outputs = batch.matched, PaddedOutputs()
        prompts, prompt_starts = self._run_prompts(batch, np.array(sequences.lengths), outputs)
        prompt_lengths, lengths = np.array(batch.prompt_lengths), np.array(sequences.lengths)
        starts = np.array(starts_of(sequences.lengths)) + prompt_lengths
        lengths -= prompt_lengths
        starts = self._run_completions(batch, prompts, sequences, starts, lengths, outputs)
        hidden, logits = outputs.take(
            interleaved_ranges(prompt_starts, prompt_lengths, starts, lengths)
        )
        return MatchedRun(hidden=hidden, router_logits=logits, prompts=prompts)

    def _run_prompts(
        self, batch: PackedBatch, whole: Int64[np.ndarray, " batch"], outputs: PaddedOutputs
    ) -> tuple[RecordedPrompts, Int64[np.ndarray, " batch"]]:
        """Run the prompts; also gives where each begins among the outputs' positions.

        Args:
            whole: tokens of each sequence, prompt and completion.
        """
        sequences = batch.matched
        input_ids, lengths = sequences.input_ids, np.array(batch.prompt_lengths)
        starts, found = np.array(starts_of(sequences.lengths)), np.zeros_like(lengths)
        prompts = RecordedPrompts(self._empty_cache)
        # Empty prompts too: each row of completions needs a state, and each parameter a gradient.
        for group in self._groups(np.arange(len(lengths)), lengths):
            width = max(_MIN_WIDTH, int(lengths[group].max()))
            rows = PaddedRows.of(starts[group], lengths[group], width=width, left=True)
            is_real = to_device(rows.is_real, input_ids.device)
            cache = self._empty_cache.empty_copy()
            cache.start_recording(is_real)
            found[group] = outputs.add(
                self._call(input_ids, rows.tokens, is_real, rows.places, whole[group], cache)
            )
            found[group] += width - lengths[group]
            prompts.add(group.tolist(), cache.take_recorded())
        return prompts, found

    def _run_completions(
        self,
        batch: PackedBatch,
        prompts: RecordedPrompts,
        sequences: Sequences,
        starts: Int64[np.ndarray, " batch"],
        lengths: Int64[np.ndarray, " batch"],
        outputs: PaddedOutputs,
    ) -> Int64[np.ndarray, " batch"]:
        """Run completions on top of their prompts; gives where each begins, as `_run_prompts`.

        Args:
            sequences: a packed row that has the completions.
            starts: the first token of each in it.
            lengths: of each.
        """
        prompt_lengths, found = np.array(batch.prompt_lengths), np.zeros_like(lengths)
        chosen = np.arange(len(lengths)) if self._single_group else np.flatnonzero(lengths)
        for group in self._groups(chosen, lengths):
            group = prompts.in_order(group.tolist())
            before = prompt_lengths[group]
            num_before = max(1, int(before.max()))
            width = max(_MIN_WIDTH, int(lengths[group].max()))
            rows = PaddedRows.of(starts[group], lengths[group], width=width, left=False)
            prefix = PaddedRows.of(before, before, width=num_before, left=True)
            # What follows a completion is causally hidden, and nothing reads the states after it.
            mask = np.concatenate([prefix.is_real, np.ones_like(rows.is_real)], axis=1)
            found[group] = outputs.add(
                self._call(
                    sequences.input_ids,
                    rows.tokens,
                    to_device(mask, sequences.input_ids.device),
                    rows.places + before[:, None],
                    before + lengths[group],
                    prompts.cache_of(group, num_before),
                )
            )
        return found

    def _groups(
        self, rows: Int64[np.ndarray, " rows"], lengths: Int64[np.ndarray, " batch"]
    ) -> list[Int64[np.ndarray, " group"]]:
        if self._single_group:
            return [rows]
        return [rows[group] for group in row_groups(lengths[rows])]

    def _call(
        self,
        packed_ids: Int[Tensor, " tokens"],
        tokens: Int64[np.ndarray, "rows width"],
        is_real: Bool[Tensor, "rows keys"],
        positions: Int64[np.ndarray, "rows width"],
        whole: Int64[np.ndarray, " rows"],
        cache: PromptCache,
    ) -> Any:  # each model class has its own output class
        places = to_device(tokens, packed_ids.device)
        inputs: dict[str, Any] = {
            "input_ids": packed_ids[places] if len(packed_ids) else places,
            "attention_mask": is_real.long(),
            self._cache_name: cache,
        }
        inputs |= positions_for(self._model, positions, packed_ids.device)
        return call_decoder(self._model, SequenceLengths(whole.tolist()), **inputs)
