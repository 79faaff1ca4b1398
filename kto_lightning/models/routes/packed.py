"""The packed route: sequences end to end in one row, with the attention of `attention.py`."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from kto_lightning.batches.types import PackedBatch, Sequences
from kto_lightning.models.architecture import num_mixing_layers
from kto_lightning.models.attention import UnsupportedAttentionError
from kto_lightning.models.checkpointing import checkpoints_activations
from kto_lightning.models.packed_run import PackedRun, PromptStore
from kto_lightning.models.rope import SequenceLengths
from kto_lightning.models.routes.runner import (
    MatchedRun,
    call_decoder,
    prompt_rows,
    router_logits,
    rows_after_prompts,
)
from kto_lightning.models.row_indices import starts_of


class PackedRunner:
    """See `Runner`. The model's attention must be `PACKED`."""

    shares_prompts = True

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.offloads_activations = False

    def run_matched(self, batch: PackedBatch, *, keeps_prompts: bool) -> MatchedRun:
        store = self._make_prompt_store(batch) if keeps_prompts else None
        run = PackedRun(lengths=batch.matched.lengths, store=store)
        hidden, outputs = self._run(batch.matched, run)
        return MatchedRun(hidden=hidden, router_logits=router_logits(outputs, None), prompts=store)

    def run_mismatched(
        self, batch: PackedBatch, matched: MatchedRun | None
    ) -> tuple[Float[Tensor, "rows width"], Int[Tensor, " scored"]]:
        sequences = batch.mismatched
        assert sequences is not None
        rows = sequences.scored.rows
        if not batch.shares_prompts:
            return self._run(sequences, PackedRun(lengths=sequences.lengths))[0], rows
        if matched is None or matched.prompts is None:
            hidden, store = self._run_prompts(batch)
            rows = rows_after_prompts(batch, rows)
        else:
            hidden, store = matched.hidden, matched.prompts
        run = PackedRun.after_prompts(store, batch.prompt_lengths, sequences.lengths, rows.device)
        continued, _ = self._run(sequences, run)
        store.layers.clear()  # checkpointing holds `store` until backward
        return torch.cat([hidden, continued]), rows

    def _make_prompt_store(self, batch: PackedBatch) -> PromptStore:
        """The store for a matched run.

        Usually autograd holds all keys and values for backward, and storing them whole takes no
        memory. Without a gradient, or with activation checkpointing or offloading, the store alone
        would keep them on the device; then it copies the prompts' rows only.
        """
        autograd_holds_them = torch.is_grad_enabled() and not (
            self.offloads_activations or self._checkpoints_activations()
        )
        if autograd_holds_them:
            return PromptStore(
                starts=starts_of(batch.matched.lengths), num_rows=len(batch.matched.input_ids)
            )
        return PromptStore(
            starts=starts_of(batch.prompt_lengths),
            num_rows=sum(batch.prompt_lengths),
            rows=prompt_rows(batch),
        )

    def _checkpoints_activations(self) -> bool:
        return checkpoints_activations(self._model)

    def _run_prompts(self, batch: PackedBatch) -> tuple[Float[Tensor, "rows width"], PromptStore]:
        """The hidden states and the store of a run of the prompts alone, `[x1 | x2 | …]`."""
        lengths = batch.prompt_lengths
        rows = prompt_rows(batch)
        # A run without tokens gets a filler token in `_decode`, of which no row may be stored.
        stored = None if sum(lengths) else rows
        store = PromptStore(starts=starts_of(lengths), num_rows=sum(lengths), rows=stored)
        run = PackedRun(lengths=lengths, store=store)
        matched = batch.matched
        assert batch.mismatched is not None
        whole = [p + n for p, n in zip(lengths, batch.mismatched.lengths, strict=True)]
        ids, positions = matched.input_ids[rows], matched.position_ids[rows]
        return self._decode(ids, positions, run, whole)[0], store

    def _run(
        self, sequences: Sequences, run: PackedRun
    ) -> tuple[Float[Tensor, "tokens width"], Any]:
        return self._decode(sequences.input_ids, sequences.position_ids, run, run.kv_lengths)

    def _decode(
        self, input_ids: Tensor, position_ids: Tensor, run: PackedRun, whole: list[int]
    ) -> tuple[Float[Tensor, "tokens width"], Any]:  # each model class has its own output class
        """The last hidden state of every token, and the decoder's whole output.

        A run without tokens (all completions are empty) runs on one filler token, whose result is
        dropped: under FSDP every rank has to run, and some models fail on an empty input.

        Args:
            whole: tokens of each whole sequence, of which the run may have a part.
        """
        num_tokens = len(input_ids)
        if not num_tokens:
            input_ids = position_ids = input_ids.new_zeros(1)
            run = PackedRun(lengths=[1], store=run.store if run.prefix_lengths is None else None)
            whole = run.lengths
        with run.active():
            outputs = call_decoder(
                self._model,
                SequenceLengths(whole, segments=run.lengths),
                input_ids=input_ids[None],
                position_ids=position_ids[None],
            )
        num_layers = num_mixing_layers(self._model.config.get_text_config())
        num_calls = run.num_attention_calls
        if num_calls < num_layers:
            raise UnsupportedAttentionError(
                f"only {num_calls} of its {num_layers} layers attend through transformers' "
                "attention interface"
            )
        return outputs.last_hidden_state[0, :num_tokens], outputs
