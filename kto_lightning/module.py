"""`KTOModule`: one optimizer step of KTO, from a packed batch to updated weights."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor

from kto_lightning.batches.class_weights import resolve_weights
from kto_lightning.batches.types import Prediction, StepBatch
from kto_lightning.distributed import by_rank
from kto_lightning.errors import ConfigError, check_number, check_one_of
from kto_lightning.models.architecture import check_positions
from kto_lightning.models.build import Recipe, assemble, check_device
from kto_lightning.models.following import (
    Follow,
    FollowingReference,
    reference_state,
    restore_reference,
)
from kto_lightning.models.loading import LoRA, whole_name
from kto_lightning.models.policy import Policy
from kto_lightning.models.reference import Reference, remembered_reference
from kto_lightning.models.reference_cache import CachedReference
from kto_lightning.models.weights import check_weights_fit, without_frozen
from kto_lightning.training.checkpoints import check_epochs_left
from kto_lightning.training.evaluation import ValidationSums, predict_batch, validate_batch
from kto_lightning.training.guards import NonFiniteGuard, explain_out_of_memory
from kto_lightning.training.metrics import (
    MEASURED,
    BatchSums,
    StepClock,
    batch_metrics,
    peak_memory_mib,
)
from kto_lightning.training.metrics_csv import MetricsFile
from kto_lightning.training.optimizers import (
    Optimization,
    check_precision,
    check_same_optimizer,
    count_steps,
    gradient_norm,
)
from kto_lightning.training.scoring import BatchScorer


class KTOModule(LightningModule):
    """KTO (arXiv:2402.01306) on packed batches.

    The loader's item is one optimizer step (`StepBatch`), so z0 is one number per step over the
    whole batch, however it is cut into micro-batches and over ranks.

    Args:
        policy: the model to train: a Hugging Face directory, a hub id or an adapter directory.
        reference: the model that rewards are measured against; null: the policy as it was.
        beta: how strongly the policy is held to the reference.
        loss: kto, or apo_zero_unpaired (arXiv:2408.06266), which has no reference point.
        desirable_weight: λ_D; auto makes both classes weigh the same.
        undesirable_weight: λ_U; auto makes both classes weigh the same.
        learning_rate: the highest learning rate of the schedule.
        weight_decay: on matrices; never on biases and norms.
        warmup_ratio: share of all steps over which the learning rate rises from 0.
        lr_schedule: constant, linear, cosine, or another schedule of transformers.get_scheduler;
            warmup_stable_decay decays over the last tenth of all steps, cosine_with_min_lr ends at
            a tenth of the learning rate.
        optimizer: adamw (betas 0.9 and 0.999, eps 1e-8), sgd, adafactor (fixed learning rate), or
            adamw_8bit (needs bitsandbytes and a CUDA device).
        gradient_clip_norm: largest global L2 norm of the gradient; null: no clipping.
        non_finite: what a loss or gradient that is not finite does before its step is taken: stop
            the run, or skip the step.
        dtype: of a frozen base's weights: float32 or bfloat16; null: float32.
        quantization: 4bit loads a frozen base in NormalFloat4 (QLoRA, arXiv:2305.14314; needs
            bitsandbytes) and what is left of it in dtype, by default then bfloat16; null: none.
        lora: train a new low-rank adapter on the frozen policy instead of all its weights.
        dropout: keep the model's dropout on in training.
        activation_checkpointing: compute activations again in backward instead of keeping them.
        activation_offloading: keep what backward needs of them in the host's memory until then.
        reference_cache: a directory that keeps the reference's log-probs from run to run.
        follow: let the reference follow the policy (TR-DPO, arXiv:2404.09656); full fine-tuning
            only; null: it stays what it is.
        offload_reference: keep a second model in the host's memory while it is not asked.
        trust_remote_code: run code that comes with a model from a hub.

    Raises:
        ConfigError: if a setting is outside what it may be, or two contradict each other.
    """

    def __init__(
        self,
        policy: str,
        reference: str | None = None,
        beta: float = 0.1,
        loss: Literal["kto", "apo_zero_unpaired"] = "kto",
        desirable_weight: Literal["auto"] | float = "auto",
        undesirable_weight: Literal["auto"] | float = "auto",
        learning_rate: float = 1e-6,
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.0,
        lr_schedule: str = "constant",
        optimizer: str = "adamw",
        gradient_clip_norm: float | None = None,
        non_finite: Literal["stop", "skip"] = "stop",
        dtype: Literal["float32", "bfloat16"] | None = None,
        quantization: Literal["4bit"] | None = None,
        lora: LoRA | None = None,
        dropout: bool = False,
        activation_checkpointing: bool = False,
        activation_offloading: bool = False,
        reference_cache: str | None = None,
        follow: Follow | None = None,
        offload_reference: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # a checkpoint under LoRA has no frozen weights
        self.policy_name, self.reference_name = policy, reference
        self.reference_cache, self.trust_remote_code = reference_cache, trust_remote_code
        self.beta, self.loss = beta, loss
        self.desirable_weight: Literal["auto"] | float = desirable_weight
        self.undesirable_weight: Literal["auto"] | float = undesirable_weight
        self.optimization = Optimization(
            optimizer=optimizer,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup_ratio=warmup_ratio,
            lr_schedule=lr_schedule,
            gradient_clip_norm=gradient_clip_norm,
        )
        self.recipe = Recipe(
            policy=policy,
            reference=reference,
            dtype=dtype,
            quantization=quantization,
            lora=lora,
            dropout=dropout,
            activation_checkpointing=activation_checkpointing,
            activation_offloading=activation_offloading,
            reference_cache=reference_cache,
            follow=follow,
            offload_reference=offload_reference,
            trust_remote_code=trust_remote_code,
        )
        self.policy: Policy | None = None
        """Loaded by `configure_model`, after the records have been read."""
        self.reference: Reference | None = None
        self.packing_obstacle: str | None = None
        """Why the model runs padded; None: it runs packed."""
        self.latest_metrics: dict[str, float] = {}
        """The latest of each metric that the batch decides."""
        self.last_row: dict[str, float] = {}
        """What was published last, without what its batch could not give."""
        self.validated_step = -1
        self._validation = ValidationSums(torch.device("cpu"))
        self._clock = StepClock()
        self._guard = NonFiniteGuard(non_finite)
        self._check_settings()

    def _check_settings(self) -> None:
        check_number("beta", self.beta, above=0.0)
        check_one_of("loss", self.loss, ("kto", "apo_zero_unpaired"))
        resolve_weights(1, 1, desirable=self.desirable_weight, undesirable=self.undesirable_weight)

    def setup(self, stage: str) -> None:
        """Refuse what no plain `Trainer` knows to refuse, before any weight is loaded."""
        check_precision(self.trainer.precision)
        if stage == "fit":
            self._check_data()

    def configure_model(self) -> None:
        """Load the policy and its reference. Lightning calls this once the data is set up."""
        if self.policy is not None:
            return
        shard = getattr(self.trainer.strategy, "shard", None)
        rounds_weights = getattr(self.trainer.strategy, "rounds_weights", False)
        recipe = replace(self.recipe, shard=shard, rounds_weights=rounds_weights)
        data = self._data
        if self.trainer.state.fn == "fit":
            check_device(recipe, self.trainer.strategy.root_device)
        elif recipe.reference is None:
            recipe = replace(recipe, reference=remembered_reference(self.policy_name))
        models = assemble(
            recipe,
            precision=str(self.trainer.precision),
            reference_keys=lambda: data.reference_keys(),
        )
        self.policy, self.reference = models.policy, models.reference
        self.packing_obstacle = models.packing_obstacle
        longest = getattr(data, "longest_sequence", None)  # as `facts` below
        if longest is not None:
            check_positions(models.policy.causal_lm, self.policy_name, longest())

    @property
    def _data(self) -> Any:
        return self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]

    def _check_data(self) -> None:
        if self._data is None:
            raise ConfigError(
                "KTOModule takes its steps from a KTODataModule. Give the trainer one: "
                "trainer.fit(module, datamodule=KTODataModule(train=…))."
            )

    def _scorer(self) -> BatchScorer:
        assert self.policy is not None
        assert self.reference is not None
        return BatchScorer(
            self.policy,
            self.reference,
            beta=self.beta,
            loss_name=self.loss,
            sum_over_ranks=self._sum_over_ranks,
        )

    def on_train_epoch_start(self) -> None:
        if isinstance(self.reference, CachedReference):
            self.reference.refresh()

    def configure_optimizers(self) -> Any:
        assert self.policy is not None
        return self.optimization.configure(
            self.policy.named_parameters(), num_steps=self.num_training_steps()
        )

    def num_training_steps(self) -> int | None:
        """Optimizer steps of the whole run, over which a schedule stretches; None: not known.

        Counted here because `trainer.estimated_stepping_batches` builds the loaders too early for a
        resumed run.
        """
        trainer = self.trainer
        return count_steps(
            steps_per_epoch=self._data.num_steps_per_epoch,
            limit_train_batches=trainer.limit_train_batches,
            max_steps=trainer.max_steps,
            max_epochs=trainer.max_epochs,
        )

    def on_fit_start(self) -> None:
        self._place_reference()
        # `from_pretrained` gives eval mode, in which activation checkpointing is silently off.
        self.train()

    def on_train_start(self) -> None:
        self._clock.start()

    def on_train_batch_end(self, *args: Any) -> None:
        self._clock.start()

    def on_validation_start(self) -> None:
        self._place_reference()

    def on_validation_end(self) -> None:
        self._clock.start()

    def _place_reference(self) -> None:
        assert self.reference is not None
        self.reference.to(self.device)

    def on_validation_epoch_start(self) -> None:
        self._validation = ValidationSums(self.device)

    def validation_step(self, batch: StepBatch, batch_idx: int) -> None:
        scorer = self._scorer()
        with explain_out_of_memory(scorer, self.trainer):
            validate_batch(scorer, batch, self._validation)

    def on_validation_epoch_end(self) -> None:
        self.validated_step = self.trainer.global_step
        self.publish("val", self._validation.metrics(self._sum_over_ranks))
        known = {k: v for k, v in self.latest_metrics.items() if k.startswith("val/")}
        self.log_dict(known, logger=False)  # for callbacks that watch a metric: EarlyStopping

    def on_predict_start(self) -> None:
        self._place_reference()

    def predict_step(self, batch: StepBatch, batch_idx: int) -> list[Prediction]:
        scorer = self._scorer()
        with explain_out_of_memory(scorer, self.trainer):
            return predict_batch(scorer, batch)

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """One optimizer step: z0 over the whole batch, then micro-batch by micro-batch."""
        scorer, micro_batches = self._scorer(), batch.micro_batches
        with explain_out_of_memory(scorer, self.trainer):
            known = scorer.logps_before_backward(micro_batches)
            sums = BatchSums.zero(self.device)
            z0_raw, z0 = scorer.reference_point(batch, known, sums)
            auxiliary = torch.zeros((), device=self.device)
            for index, micro_batch in enumerate(micro_batches):
                with self._synchronised(last=index == len(micro_batches) - 1):
                    logps = known[index] = scorer.with_matched(micro_batch, known[index])
                    losses = scorer.add_losses(micro_batch, logps, z0, sums)
                    balance = scorer.auxiliary_loss(micro_batch, logps.policy, batch.num_tokens)
                    loss = losses.sum() / batch.num_examples + balance
                    self.manual_backward(loss * self.trainer.world_size)
                    auxiliary += balance.detach()
                    logps.detach_()
                    del losses, balance, loss  # with what the graph holds even after backward
        norm = self._gradient_norm()
        scalars = torch.stack([z0_raw, z0, norm.to(z0)])
        metrics, peaks = self._read_step(batch, sums, auxiliary, scalars)
        if not self._guard.allows(self.trainer, metrics, batch, known):
            self._drop_gradients()
        metrics["lr"] = self._update()
        self.publish("train", metrics | self._clock.measures(batch.num_tokens, peaks))

    def _gradient_norm(self) -> Tensor:
        """Before clipping, which is done here or by a strategy that keeps gradients to itself."""
        own = getattr(self.trainer.strategy, "gradient_norm", None)
        if own is not None:
            return own()
        assert self.policy is not None
        return gradient_norm(self.policy.parameters(), self.optimization.gradient_clip_norm)

    def _drop_gradients(self) -> None:
        """A step without gradients changes nothing."""
        own = getattr(self.trainer.strategy, "drop_gradients", None)
        own() if own is not None else self.zero_grad(set_to_none=True)

    def _update(self) -> float:
        """Step, schedule, follow; the learning rate used."""
        assert self.policy is not None
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        learning_rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        self.zero_grad()  # not the optimizer's, in which a strategy may have put other weights
        scheduler: Any = self.lr_schedulers()
        scheduler.step()
        if isinstance(self.reference, FollowingReference):
            self.reference.after_step(self.trainer.global_step, self.policy)
        return learning_rate

    def on_train_end(self) -> None:
        self._guard.conclude(self.trainer)

    @contextmanager
    def _synchronised(self, *, last: bool) -> Iterator[None]:
        """Gradients are averaged over ranks once a step, in the last micro-batch's backward."""
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        with nullcontext() if last or block is None else block():
            yield

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(values, reduce_op="sum")  # pyright: ignore[reportReturnType]

    def _read_step(
        self, batch: StepBatch, sums: BatchSums, auxiliary: Tensor, scalars: Tensor
    ) -> tuple[dict[str, float | None], list[float]]:
        """The step's numbers over all ranks, and each rank's peak memory in MiB: the one read from
        the device that a step makes. Before its optimizer step, which depends on them and runs on
        while the next batch is prepared.
        """
        num_ranks = self.trainer.world_size
        peak = by_rank(peak_memory_mib(self.device) or 0.0, self.global_rank, num_ranks)
        parts = [peak.to(sums.values), sums.values, auxiliary[None].to(sums.values)]
        over_ranks = self._sum_over_ranks(torch.cat(parts))
        together = torch.cat([over_ranks, scalars.to(over_ranks)]).tolist()
        peaks, numbers = together[:num_ranks], together[num_ranks:]
        *totals, auxiliary_total, z0_raw, z0, norm = numbers
        metrics = batch_metrics(totals)
        if metrics["loss"] is not None:
            metrics["loss"] += auxiliary_total
        metrics |= {"z0": z0, "z0_raw": z0_raw, "grad_norm": norm}
        metrics["tokens"] = batch.num_tokens
        return metrics, peaks

    def publish(self, stage: str, metrics: dict[str, float | None]) -> None:
        """Send metrics to every logger; what a batch cannot give is left out."""
        known = {f"{stage}/{name}": value for name, value in metrics.items() if value is not None}
        measured = {f"{stage}/{name}" for name in MEASURED}
        self.latest_metrics |= {k: v for k, v in known.items() if k not in measured}
        self.last_row = known
        step = self.trainer.global_step
        every: int = self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        due = stage != "train" or (every > 0 and step % every == 0)
        for logger in self.loggers:
            if due or isinstance(logger, MetricsFile):  # the file has a row for every step
                logger.log_metrics(known, step=step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained: under LoRA the frozen base stays where it came from."""
        checkpoint["state_dict"] = without_frozen(checkpoint["state_dict"], self)
        checkpoint |= reference_state(self.reference)
        checkpoint["kto"] = self.origin()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another model's weights, and settings that a restored optimizer would override."""
        check_weights_fit(checkpoint, self)
        trains = self.trainer.state.fn == "fit"
        if trains:
            check_epochs_left(checkpoint, self.trainer.max_epochs)
            check_same_optimizer(checkpoint.get("kto", {}), self.origin())
        named = whole_name(self.reference_name) if self.reference_name is not None else None
        restore_reference(checkpoint, self.reference, named=named, trains=trains)

    def origin(self) -> dict[str, Any]:
        """Where this policy came from, in plain values: what `export` needs to build it again."""
        facts = getattr(self._data, "facts", dict)  # ours tells; any other will do in `fit`
        return {
            "policy": whole_name(self.policy_name),
            "reference": whole_name(self.reference_name or self.policy_name),
            "beta": self.beta,
            "loss": self.loss,
            "dtype": self.recipe.dtype,
            "quantization": self.recipe.quantization,
            "lora": asdict(self.recipe.lora) if self.recipe.lora is not None else None,
            "follow": asdict(self.recipe.follow) if self.recipe.follow is not None else None,
            "trust_remote_code": self.trust_remote_code,
            **asdict(self.optimization),
            "step": self.trainer.global_step,
            "results": dict(self.latest_metrics),
            "data": facts(),
        }
