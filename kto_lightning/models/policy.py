"""The policy: from a packed batch to the log-probs of its completions.

`Policy.forward` does all that a strategy must intercept (matched run, mismatched run and language
model head), so that DDP and FSDP2 wrap one module.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from typing import Any, cast

import numpy as np
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
    logit_softcap,
    num_experts,
)
from kto_lightning.models.attention import PACKED, UnsupportedAttentionError
from kto_lightning.models.offloading import OffloadedActivations
from kto_lightning.models.packed_run import PackedRun, PromptStore, interleaved_ranges


class Policy(nn.Module):
    """A causal language model that scores completions.

    Args:
        model: a transformers model, or the `PeftModel` around one.
        packed: run without padding and share prompts (`attention.py`). False: the padded path, with
            the model's original attention on right-padded rows, each completion with its prompt.
    """

    def __init__(self, model: nn.Module, *, packed: bool = True) -> None:
        super().__init__()
        self.model = model
        self.original_attention: str = self.causal_lm.config._attn_implementation or "eager"
        self.packed = packed
        self.offloads_activations = False
        """Whether activations are in host memory between forward and backward."""
        if packed:
            self.causal_lm.set_attn_implementation(PACKED)
        config = self.causal_lm.config.get_text_config()
        self.logit_scale = logit_scale(config)
        self.softcap = logit_softcap(config)
        self.auxiliary_coefficient = auxiliary_coefficient(config)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model inside peft's wrapper, adapter layers included."""
        model: Any = self.model  # `nn.Module` to pyright, which knows no method of peft's
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def forward(
        self, batch: PackedBatch, *, matched: bool = True, mismatched: bool = True
    ) -> Logps:
        """Score the completions asked for.

        Only the matched log-probs have a gradient: z0 is a constant of the loss.

        Args:
            batch: one micro-batch. If `batch.shares_prompts`, the mismatched completions run on top
                of the prompts' keys and values: those of the matched run, or, without a matched
                run, of a run of the prompts alone.
            matched: score y; also gives the auxiliary loss of a Mixture of Experts.
            mismatched: score y', if the batch has them.

        Returns:
            log-probs in nats, `[batch]` each; None for completions that are not scored.
        """
        logps = Logps()
        mismatched = mismatched and batch.mismatched is not None
        hidden = store = None
        if matched:
            store = self._make_prompt_store(batch) if mismatched and batch.shares_prompts else None
            with self._activation_offloading():
                hidden, logps.auxiliary_loss = self._run(batch.matched, store)
                logps.matched = self._score(hidden, batch.matched, batch.matched.scored.rows)
        if mismatched:
            with torch.no_grad():
                logps.mismatched = self._score_mismatched(batch, hidden, store)
        return logps

    def _activation_offloading(self) -> AbstractContextManager[Any]:
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
            rows = _shift_to_prompt_run(batch, rows)
        run = PackedRun.after_prompts(store, batch.prompt_lengths, sequences.lengths, rows.device)
        continued, _ = self._decode(sequences.input_ids, sequences.position_ids, run)
        store.layers.clear()  # checkpointing holds `store` until backward
        return self._score(torch.cat([hidden, continued]), sequences, rows)

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
                starts=_starts(batch.matched.lengths), num_rows=len(batch.matched.input_ids)
            )
        return PromptStore(
            starts=_starts(batch.prompt_lengths),
            num_rows=sum(batch.prompt_lengths),
            rows=_prompt_rows(batch),
        )

    def _checkpoints_activations(self) -> bool:
        # transformers' property for this has different names in the versions that we support.
        return any(getattr(m, "gradient_checkpointing", False) for m in self.causal_lm.modules())

    def _run_prompts(self, batch: PackedBatch) -> tuple[Float[Tensor, "rows width"], PromptStore]:
        """The hidden states and the store of a run of the prompts alone, `[x1 | x2 | …]`."""
        lengths = batch.prompt_lengths
        rows = _prompt_rows(batch)
        # A run without tokens gets a filler token in `_decode`, of which no row may be stored.
        stored = None if sum(lengths) else rows
        store = PromptStore(starts=_starts(lengths), num_rows=sum(lengths), rows=stored)
        run = PackedRun(lengths=lengths, store=store)
        matched = batch.matched
        hidden, _ = self._decode(matched.input_ids[rows], matched.position_ids[rows], run)
        return hidden, store

    def _run(
        self, sequences: Sequences, store: PromptStore | None
    ) -> tuple[Float[Tensor, "tokens width"], Float[Tensor, ""] | None]:
        """The last hidden state of every token, and the routers' auxiliary loss or None."""
        if not self.packed:
            return self._run_padded(sequences)
        run = PackedRun(lengths=sequences.lengths, store=store)
        hidden, outputs = self._decode(sequences.input_ids, sequences.position_ids, run)
        return hidden, self._auxiliary_loss(outputs, None)

    def _run_padded(
        self, sequences: Sequences
    ) -> tuple[Float[Tensor, "tokens width"], Float[Tensor, ""] | None]:
        """`_run` on right-padded rows, one sequence each, with the model's original attention."""
        # Any id can be the padding: causal attention hides it from the tokens that are scored.
        ids = pad_sequence(list(sequences.input_ids.split(sequences.lengths)), batch_first=True)
        if not ids.shape[1]:
            ids = ids.new_zeros(len(ids), 1)
        positions = torch.arange(ids.shape[1], device=ids.device)
        real = positions < sequences.boundaries.diff()[:, None]
        outputs = self.causal_lm.base_model(
            input_ids=ids, attention_mask=real.long(), **self._decoder_options()
        )
        row_starts = range(0, ids.numel(), ids.shape[1])
        rows = _to_device(interleaved_ranges(row_starts, sequences.lengths), ids.device)
        hidden = outputs.last_hidden_state.flatten(0, 1).index_select(0, rows)
        return hidden, self._auxiliary_loss(outputs, real.long())

    def _decode(
        self, input_ids: Tensor, position_ids: Tensor, run: PackedRun
    ) -> tuple[Float[Tensor, "tokens width"], Any]:  # each model class has its own output class
        """The last hidden state of every token, and the decoder's whole output.

        A run without tokens (all completions are empty) runs on one filler token, whose result is
        dropped: under FSDP every rank has to run, and some models fail on an empty input.
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
        num_calls = run.num_attention_calls
        if num_calls < num_layers:
            raise UnsupportedAttentionError(
                f"only {num_calls} of its {num_layers} layers attend through transformers' "
                "attention interface"
            )
        return outputs.last_hidden_state[0, :num_tokens], outputs

    def _decoder_options(self) -> dict[str, bool]:
        options = {"use_cache": False}
        if self.auxiliary_coefficient:
            options["output_router_logits"] = True
        return options

    def _auxiliary_loss(self, outputs: Any, mask: Tensor | None) -> Float[Tensor, ""] | None:
        """The load-balancing loss over a run's tokens (Switch, arXiv:2101.03961, eqs. 4-6).

        `mask`: `[rows, length]`, 0 for padding; None: no padding.
        """
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
        """Sequence log-probs in nats: the head on `rows` of `hidden`, summed per example."""
        weight, bias = effective_head(self.causal_lm.get_output_embeddings())
        token_logps = linear_logps(
            # The weight of a bfloat16 head with a float32 adapter is float32.
            hidden.index_select(0, rows).to(weight.dtype),
            weight,
            sequences.scored.targets,
            bias=bias,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
        )
        return sum_per_owner(token_logps, sequences.scored.owners, sequences.lengths)

    def run_padded(self) -> None:
        """Switch to the padded path for good."""
        self.packed = False
        self.causal_lm.set_attn_implementation(self.original_attention)

    @contextmanager
    def use_original_attention(self) -> Iterator[PreTrainedModel]:
        """The transformers model in eval mode with its original attention: to generate or save."""
        model, training = self.causal_lm, self.training
        model.set_attn_implementation(self.original_attention)
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
    """Sum the scored tokens of each sequence.

    The sums are the rows' of a `[batch, longest]` table, because they are the same in every run;
    those of a floating-point `index_add_` depend on the order in which the device's threads add.

    Args:
        owners: the sequence of each token, ascending.
        lengths: at least the number of scored tokens of each sequence.
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
    """Rows of the matched run that are prompts."""
    starts = _starts(batch.matched.lengths)
    rows = interleaved_ranges(starts, batch.prompt_lengths)
    return _to_device(rows, batch.matched.input_ids.device)


def _shift_to_prompt_run(
    batch: PackedBatch, rows: Int[Tensor, " scored"]
) -> Int[Tensor, " scored"]:
    """Map rows of `[matched run | mismatched run]` to rows of `[prompt run | mismatched run]`."""
    num_matched, num_prompt_rows = len(batch.matched.input_ids), sum(batch.prompt_lengths)
    prompt_run_rows = torch.zeros(num_matched, dtype=torch.int64, device=rows.device)
    prompt_run_rows[_prompt_rows(batch)] = torch.arange(num_prompt_rows, device=rows.device)
    return torch.where(
        rows < num_matched,
        prompt_run_rows[rows.clamp(max=num_matched - 1)],
        rows - num_matched + num_prompt_rows,
    )


def _to_device(rows: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(rows).to(device, non_blocking=True)
