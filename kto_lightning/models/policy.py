"""The policy: from a packed batch to the log-probs of its completions.

`Policy.forward` does all that a strategy must intercept (matched run, mismatched run and language
model head), so that DDP and FSDP2 wrap one module.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from kto_kernels import linear_logps
from kto_lightning.batches.types import Logps, PackedBatch, Sequences
from kto_lightning.models.architecture import (
    attending_part,
    attention_of,
    auxiliary_coefficient,
    effective_head,
    logit_scale,
    logit_softcap,
    num_experts,
)
from kto_lightning.models.attention import PACKED
from kto_lightning.models.offloading import OffloadedActivations
from kto_lightning.models.randomness import keep_weights, train_without_randomness
from kto_lightning.models.rope import limits_of, rotate_as_transformers, rotate_each_sequence
from kto_lightning.models.routes.cached import CachedRunner
from kto_lightning.models.routes.packed import PackedRunner
from kto_lightning.models.routes.padded import PaddedRunner
from kto_lightning.models.routes.runner import MatchedRun, RouteName, Runner
from kto_lightning.models.routes.unsharing import unshare_prompts


class Policy(nn.Module):
    """A causal language model that scores completions.

    Args:
        model: a transformers model, or the `PeftModel` around one.
        route: how it runs, see `routes/runner.py`.
        random: train with all that is random in the model's own forward: dropout, router noise,
            skipped layers. False: see `train`.
        single_group: run all rows of the cached and the padded route in one call, whatever the
            padding: where every rank must call the model equally often (FSDP2).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        route: RouteName = "packed",
        random: bool = False,
        single_group: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.random, self._single_group = model, random, single_group
        self.original_attention = attention_of(attending_part(self.causal_lm).config)
        self.gives_positions = False
        """Whether padded rows come with positions. False: the model counts them itself."""
        self.route: RouteName = "padded"
        self._runner: Runner = PaddedRunner(self.causal_lm)
        self.use_route(route)
        self._rope = limits_of(self.causal_lm)
        config = self.causal_lm.config.get_text_config()
        self.logit_scale = logit_scale(config)
        self.softcap = logit_softcap(config)
        self.auxiliary_coefficient = auxiliary_coefficient(self.causal_lm)
        self.train(model.training)

    def use_route(self, route: RouteName) -> None:
        """Run by a route from now on.

        Raises:
            UnsupportedCacheError: if the model cannot be run by the cached route.
        """
        runner = self._make_runner(route)
        runner.offloads_activations = self.offloads_activations
        self.set_attention(original=True)
        self.route, self._runner = route, runner
        self.set_attention(original=False)

    def _make_runner(self, route: RouteName) -> Runner:
        if route == "packed":
            return PackedRunner(self.causal_lm)
        if route == "cached":
            return CachedRunner(self.causal_lm, single_group=self._single_group)
        return PaddedRunner(
            self.causal_lm, single_group=self._single_group, gives_positions=self.gives_positions
        )

    @property
    def shares_prompts(self) -> bool:
        """Whether the policy takes batches that share prompts."""
        return self._runner.shares_prompts

    @property
    def offloads_activations(self) -> bool:
        """Whether activations are in host memory between forward and backward."""
        return self._runner.offloads_activations

    @offloads_activations.setter
    def offloads_activations(self, offloads: bool) -> None:
        self._runner.offloads_activations = offloads

    def train(self, mode: bool = True) -> "Policy":
        """Switch to training or evaluation. Unless the policy is `random`, the model computes in
        training what it computes in evaluation, as its reference does, but for an adapter's
        dropout."""
        super().train(mode)
        keep_weights(self.causal_lm)
        if mode and not self.random:
            train_without_randomness(self.causal_lm)
        return self

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
        if matched and mismatched and batch.shares_prompts and not self._rope.lets_share(batch):
            batch = unshare_prompts(batch)
        run = None
        if matched:
            with self._activation_offloading():
                keeps_prompts = mismatched and batch.shares_prompts
                run = self._runner.run_matched(batch, keeps_prompts=keeps_prompts)
                logps.matched = self._score(run.hidden, batch.matched, batch.matched.scored.rows)
                logps.auxiliary_loss = self._auxiliary_loss(run)
        if mismatched:
            assert batch.mismatched is not None
            with torch.no_grad():
                hidden, rows = self._runner.run_mismatched(batch, run)
                logps.mismatched = self._score(hidden, batch.mismatched, rows)
        return logps

    def _activation_offloading(self) -> AbstractContextManager[Any]:
        if self.offloads_activations and torch.is_grad_enabled():
            return OffloadedActivations(self.parameters())
        return nullcontext()

    def _auxiliary_loss(self, run: MatchedRun) -> Float[Tensor, ""] | None:
        """The load-balancing loss over a run's tokens (Switch, arXiv:2101.03961, eqs. 4-6)."""
        if not self.auxiliary_coefficient or not run.router_logits:
            return None  # or a model without experts of a class that can have them
        config = self.causal_lm.config.get_text_config()
        logits: Any = tuple(run.router_logits)  # declared as a tuple of one
        loss = load_balancing_loss_func(logits, num_experts(config), config.num_experts_per_tok)
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

    def set_attention(self, *, original: bool) -> None:
        """Give the model its original attention, to be used outside of a run, or that of a run; and
        RoPE likewise."""
        if self.route == "packed":
            attention = self.original_attention if original else PACKED
            attending_part(self.causal_lm).set_attn_implementation(attention)
        if original:
            rotate_as_transformers(self.causal_lm)
        else:
            rotate_each_sequence(self.causal_lm)

    @contextmanager
    def use_original_attention(self) -> Iterator[PreTrainedModel]:
        """The transformers model in eval mode with its original attention: to generate or save."""
        training = self.training
        self.set_attention(original=True)
        self.eval()
        try:
            yield self.causal_lm
        finally:
            self.train(training)
            self.set_attention(original=False)


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
