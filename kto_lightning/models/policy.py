"""The policy: a packed batch in, the log-probabilities of its completions out.

`Policy.forward` holds everything a strategy has to see: the matched run, the mismatched run and the
language model head, so that DDP and FSDP2 wrap one module.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from typing import Any, cast

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from kto_kernels import linear_logps
from kto_lightning.batches.types import Logps, PackedBatch, Sequences
from kto_lightning.models.architecture import (
    auxiliary_coefficient,
    effective_head,
    logit_scale,
    num_experts,
)
from kto_lightning.models.attention import (
    PACKED,
    PackedRun,
    PromptStore,
    UnsupportedAttentionError,
    interleaved_ranges,
)
from kto_lightning.models.offloading import OffloadedActivations


class Policy(nn.Module):
    """A causal language model that scores completions.

    Args:
        model: a transformers model, or the `PeftModel` around one.
        packed: run without padding and share prompts (`attention.py`). False is the padded path:
            the model's own attention on right-padded rows, whole sequences for both completions.
    """

    def __init__(self, model: nn.Module, *, packed: bool = True) -> None:
        super().__init__()
        self.model = model
        self.own_attention: str = self.causal_lm.config._attn_implementation or "eager"
        self.packed = packed
        self.offloads_activations = False
        """Whether what backward needs waits in the host's memory (`offloading.py`)."""
        if packed:
            self.causal_lm.set_attn_implementation(PACKED)
        config = self.causal_lm.config.get_text_config()
        self.logit_scale = logit_scale(config)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.auxiliary_coefficient = auxiliary_coefficient(config)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, adapter layers injected, without peft's wrapper."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def forward(
        self, batch: PackedBatch, *, matched: bool = True, mismatched: bool = True
    ) -> Logps:
        """Score the completions asked for.

        Gradients flow through the matched log-probs only; the mismatched run never has any.

        Args:
            batch: one micro-batch. With `batch.shares_prompts` a mismatched pass alone runs the
                prompts once and the mismatched completions on top of them.
            matched: score y; also gives the auxiliary loss of a Mixture of Experts.
            mismatched: score y', if the batch has them.
        """
        logps = Logps()
        mismatched = mismatched and batch.mismatched is not None
        hidden = store = None
        if matched:
            store = self._store_of_matched(batch) if mismatched and batch.shares_prompts else None
            with self._kept_for_backward():
                hidden, logps.auxiliary_loss = self._run(batch.matched, store)
                logps.matched = self._score(hidden, batch.matched, batch.matched.scored.rows)
        if mismatched:
            with torch.no_grad():
                logps.mismatched = self._score_mismatched(batch, hidden, store)
        return logps

    def _kept_for_backward(self) -> AbstractContextManager[Any]:
        if self.offloads_activations and torch.is_grad_enabled():
            return OffloadedActivations(self.parameters())
        return nullcontext()

    def _score_mismatched(
        self, batch: PackedBatch, hidden: Tensor | None, store: PromptStore | None
    ) -> Float32[Tensor, " batch"]:
        sequences = batch.mismatched
        assert sequences is not None
        rows = sequences.scored.rows
        if not batch.shares_prompts:
            return self._score(self._run(sequences, None)[0], sequences, rows)
        if hidden is None or store is None:
            hidden, store = self._run_prompts(batch)
            rows = _rows_after_prompts(batch, rows)
        run = PackedRun.continuing(store, batch.prompt_lengths, sequences.lengths, rows.device)
        continued, _ = self._decode(sequences.input_ids, sequences.position_ids, run)
        store.layers.clear()
        return self._score(torch.cat([hidden, continued]), sequences, rows)

    def _store_of_matched(self, batch: PackedBatch) -> PromptStore:
        """Where autograd holds all keys and values anyway, keep them as they are; without a
        gradient, with checkpointing or offloading nothing else does: copy the prompts' rows."""
        elsewhere = self.offloads_activations or self._checkpoints_activations()
        if torch.is_grad_enabled() and not elsewhere:
            return PromptStore(
                starts=_starts(batch.matched.lengths), num_rows=len(batch.matched.input_ids)
            )
        return PromptStore(
            starts=_starts(batch.prompt_lengths),
            num_rows=sum(batch.prompt_lengths),
            rows=_prompt_rows(batch),
        )

    def _checkpoints_activations(self) -> bool:
        # transformers renames its own property for this between the versions we support.
        return any(getattr(m, "gradient_checkpointing", False) for m in self.causal_lm.modules())

    def _run_prompts(self, batch: PackedBatch) -> tuple[Float[Tensor, "rows width"], PromptStore]:
        """The packed run `[x1 | x2 | …]`, kept for what continues it."""
        lengths = batch.prompt_lengths
        rows = _prompt_rows(batch)
        kept = None if sum(lengths) else rows  # of a run of no token, nothing
        store = PromptStore(starts=_starts(lengths), num_rows=sum(lengths), rows=kept)
        run = PackedRun(lengths=lengths, store=store)
        matched = batch.matched
        hidden, _ = self._decode(matched.input_ids[rows], matched.position_ids[rows], run)
        return hidden, store

    def _run(
        self, sequences: Sequences, store: PromptStore | None
    ) -> tuple[Float[Tensor, "tokens width"], Float[Tensor, ""] | None]:
        """The last hidden state of every token, and the routers' auxiliary loss if there is one."""
        if not self.packed:
            return self._run_padded(sequences)
        run = PackedRun(lengths=sequences.lengths, store=store)
        hidden, outputs = self._decode(sequences.input_ids, sequences.position_ids, run)
        return hidden, self._auxiliary_loss(outputs, None)

    def _run_padded(
        self, sequences: Sequences
    ) -> tuple[Float[Tensor, "tokens width"], Float[Tensor, ""] | None]:
        """The same on right-padded rows, a sequence a row, with the model's own attention."""
        # Any token will do behind a sequence's end: nothing that is scored sees it.
        ids = pad_sequence(list(sequences.input_ids.split(sequences.lengths)), batch_first=True)
        if not ids.shape[1]:
            ids = ids.new_zeros(len(ids), 1)
        positions = torch.arange(ids.shape[1], device=ids.device)
        real = positions < sequences.boundaries.diff()[:, None]
        outputs = self.causal_lm.base_model(
            input_ids=ids, attention_mask=real.long(), **self._decoder_options()
        )
        row_starts = range(0, ids.numel(), ids.shape[1])
        rows = _on(ids, interleaved_ranges(row_starts, sequences.lengths))
        hidden = outputs.last_hidden_state.flatten(0, 1).index_select(0, rows)
        return hidden, self._auxiliary_loss(outputs, real.long())

    def _decode(
        self, input_ids: Tensor, position_ids: Tensor, run: PackedRun
    ) -> tuple[Float[Tensor, "tokens width"], Any]:
        """The last hidden state of every token, and what else the decoder returns.

        A run of no token (completions that are all empty) is made of one that nobody reads: under
        FSDP every rank has to run, and some models cannot run on nothing.
        """
        num_tokens = len(input_ids)
        if not num_tokens:
            input_ids = position_ids = input_ids.new_zeros(1)
            run = PackedRun(lengths=[1], store=run.store if run.prefix_lengths is None else None)
        outputs = self.causal_lm.base_model(
            input_ids=input_ids[None],
            position_ids=position_ids[None],
            packed_run=run,
            **self._decoder_options(),
        )
        num_layers = self.causal_lm.config.get_text_config().num_hidden_layers
        if run.num_calls < num_layers:
            raise UnsupportedAttentionError(
                f"only {run.num_calls} of its {num_layers} layers attend through transformers' "
                "attention interface"
            )
        return outputs.last_hidden_state[0, :num_tokens], outputs

    def _decoder_options(self) -> dict[str, bool]:
        options = {"use_cache": False}
        if self.auxiliary_coefficient:
            options["output_router_logits"] = True
        return options

    def _auxiliary_loss(self, outputs: Any, mask: Tensor | None) -> Float[Tensor, ""] | None:
        """The load-balancing loss over a run's real tokens (Switch, arXiv:2101.03961, eqs. 4-6)."""
        if not self.auxiliary_coefficient:
            return None
        config = self.causal_lm.config.get_text_config()
        loss = load_balancing_loss_func(
            outputs.router_logits, num_experts(config), config.num_experts_per_tok, mask
        )
        return cast(Tensor, loss)

    def _score(
        self,
        hidden: Float[Tensor, "tokens width"],
        sequences: Sequences,
        rows: Int[Tensor, " scored"],
    ) -> Float32[Tensor, " batch"]:
        """Sequence log-probs, nats: the head over `rows`, summed per example."""
        weight, bias = effective_head(self.causal_lm.get_output_embeddings())
        token_logps = linear_logps(
            # A bfloat16 head with a float32 adapter is a float32 head.
            hidden.index_select(0, rows).to(weight.dtype),
            weight,
            sequences.scored.targets,
            bias=bias,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
        )
        return sum_per_owner(token_logps, sequences.scored.owners, sequences.lengths)

    def run_padded(self) -> None:
        """Take the padded path from now on."""
        self.packed = False
        self.causal_lm.set_attn_implementation(self.own_attention)

    @contextmanager
    def own_attention_restored(self) -> Iterator[PreTrainedModel]:
        """The model as it generates: with its own attention, in eval mode."""
        model, training = self.causal_lm, self.training
        model.set_attn_implementation(self.own_attention)
        self.eval()
        try:
            yield model
        finally:
            self.train(training)
            if self.packed:
                model.set_attn_implementation(PACKED)


def sum_per_owner(
    token_logps: Float32[Tensor, " scored"], owners: Int[Tensor, " scored"], lengths: list[int]
) -> Float32[Tensor, " batch"]:
    """Sum the tokens of each sequence. `owners` ascend; `lengths` bound the tokens of each.

    Through a `[batch, longest]` table, whose row sums are pairwise and the same in every run, where
    an `index_add_` of floats would depend on the order in which the device gets to it.
    """
    counts = torch.zeros(len(lengths), dtype=torch.int64, device=owners.device)
    counts.index_add_(0, owners, torch.ones_like(owners))
    first = counts.cumsum(0) - counts
    columns = torch.arange(len(owners), device=owners.device) - first[owners]
    table = token_logps.new_zeros(len(lengths), max(lengths, default=0))
    return table.index_put((owners, columns), token_logps).sum(dim=1)


def _starts(lengths: list[int]) -> list[int]:
    return [0, *accumulate(lengths)][:-1]


def _prompt_rows(batch: PackedBatch) -> Int[Tensor, " rows"]:
    starts = _starts(batch.matched.lengths)
    return _on(batch.matched.input_ids, interleaved_ranges(starts, batch.prompt_lengths))


def _rows_after_prompts(batch: PackedBatch, rows: Int[Tensor, " scored"]) -> Tensor:
    """Rows of `[matched run | mismatched run]` as rows of `[prompts | mismatched run]`."""
    num_matched, num_prompt_rows = len(batch.matched.input_ids), sum(batch.prompt_lengths)
    places = torch.zeros(num_matched, dtype=torch.int64, device=rows.device)
    places[_prompt_rows(batch)] = torch.arange(num_prompt_rows, device=rows.device)
    return torch.where(
        rows < num_matched,
        places[rows.clamp(max=num_matched - 1)],
        rows - num_matched + num_prompt_rows,
    )


def _on(like: Tensor, rows: Any) -> Tensor:
    return torch.from_numpy(rows).to(like.device, non_blocking=True)
