"""`KTOModule`: one optimizer step of KTO, from a packed batch to updated weights."""

import os
import warnings
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn

from kto_lightning.batches.objective import LossName, Objective
from kto_lightning.batches.types import Prediction, StepBatch
from kto_lightning.distributed import fill_missing_gradients, reaching_all
from kto_lightning.errors import ConfigError, pick_settings
from kto_lightning.models.architecture import check_positions
from kto_lightning.models.build import build_models
from kto_lightning.models.following import (
    Follow,
    FollowingReference,
    restore_reference,
)
from kto_lightning.models.in_memory import name_models
from kto_lightning.models.lora import LoRA
from kto_lightning.models.model_files import resolve_name
from kto_lightning.models.policy import Policy
from kto_lightning.models.reference import FrozenReference, Reference, recorded_reference
from kto_lightning.models.reference_cache import CachedReference
from kto_lightning.models.routes.choose import RouteSetting
from kto_lightning.models.routes.runner import RouteName
from kto_lightning.models.settings import ModelSettings, check_device
from kto_lightning.models.weights import check_weights_fit
from kto_lightning.strategies.checks import check_objects
from kto_lightning.strategies.protocol import TrainingStrategy, training_strategy
from kto_lightning.training.averaging import drop_frozen_averages, restore_averages
from kto_lightning.training.checkpoints import add_policy_state, check_epochs_left, policy_origin
from kto_lightning.training.evaluation import ValidationSums, predict_batch, validate_batch
from kto_lightning.training.guards import NonFiniteGuard, explain_out_of_memory
from kto_lightning.training.metrics import (
    BatchSums,
    StepClock,
    read_step,
)
from kto_lightning.training.optimizers import (
    Optimization,
    check_precision,
    count_steps,
    use_settings,
)
from kto_lightning.training.publishing import PublishedMetrics
from kto_lightning.training.resuming import Resumption, run_settings
from kto_lightning.training.scoring import BatchScorer


class KTOModule(LightningModule):
    """KTO (arXiv:2402.01306) on packed batches.

    The loader's item is one optimizer step (`StepBatch`), so z0 is one number per step over the
    whole batch, however it is cut into micro-batches and over ranks.

    A Python program may also give `policy` and `reference` as a `transformers.PreTrainedModel` or
    `peft.PeftModel`, which is then trained, or frozen, in place.

    Args:
        policy: the model to train: a Hugging Face directory, a hub id or an adapter directory.
        reference: the model that rewards are measured against; null: the policy before training.
        beta: how strongly deviations from the reference are penalized.
        loss: kto, or apo_zero_unpaired (arXiv:2408.06266), which has no reference point.
        desirable_weight: λ_D; auto balances the classes.
        undesirable_weight: λ_U; auto balances the classes.
        learning_rate: the highest learning rate of the schedule.
        weight_decay: on matrices; never on biases and norms.
        warmup_ratio: share of all steps over which the learning rate rises from 0.
        lr_schedule: constant, linear, cosine, or another schedule of transformers.get_scheduler;
            warmup_stable_decay decays over the last tenth of all steps, cosine_with_min_lr ends at
            a tenth of the learning rate.
        optimizer: adamw (betas 0.9 and 0.999, eps 1e-8), sgd, adafactor (fixed learning rate), or
            adamw_8bit (needs bitsandbytes and a CUDA device).
        gradient_clip_norm: largest global L2 norm of the gradient; null: no clipping.
        non_finite: on a loss or gradient that is not finite, before its step is taken: stop the run
            or skip the step.
        dtype: of a frozen base's weights: float32 or bfloat16; null: float32.
        quantization: 4bit loads a frozen base in NormalFloat4 (QLoRA, arXiv:2305.14314; needs
            bitsandbytes), its other weights in dtype, by default then bfloat16; null: none.
        lora: train a new low-rank adapter on the frozen policy instead of all its weights.
        route: how the models run: packed (sequences end to end, prompts shared by both
            completions), cached (prompts once, completions on top of the model's own cache), padded
            (each completion with its prompt, in rows), or auto: the first of these that is exact.
        dropout: train with all that is random in the model: dropout, router noise, skipped layers.
        activation_checkpointing: recompute activations in backward instead of keeping them.
        activation_offloading: keep activations in host memory until backward.
        reference_cache: a directory that keeps the reference's log-probs from run to run.
        follow: let the reference follow the policy (TR-DPO, arXiv:2404.09656); full fine-tuning
            only; null: it stays frozen.
        offload_reference: keep a second model in host memory except while it scores.
        trust_remote_code: allow code that comes with a model to run.
        adapter_base: the base model of adapter directories that are the policy or reference; null:
            the one that adapter_config.json names.

    Raises:
        ConfigError: if a setting is outside what it may be, or two contradict each other.
    """

    def __init__(
        self,
        policy: str | os.PathLike[str] | nn.Module,
        reference: str | os.PathLike[str] | nn.Module | None = None,
        beta: float = 0.1,
        loss: LossName = "kto",
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
        route: RouteSetting = "auto",
        dropout: bool = False,
        activation_checkpointing: bool = False,
        activation_offloading: bool = False,
        reference_cache: str | None = None,
        follow: Follow | None = None,
        offload_reference: bool = False,
        trust_remote_code: bool = False,
        adapter_base: str | None = None,
    ) -> None:
        settings = name_models(locals())
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # a checkpoint under LoRA has no frozen weights
        # Each setting has one owner, which checks it: the models, the objective, the optimizer.
        self.model_settings = pick_settings(ModelSettings, settings)
        self.objective = pick_settings(Objective, settings)
        self.optimization = pick_settings(Optimization, settings)
        self.policy: Policy | None = None
        """Loaded by `configure_model`, after the records have been read."""
        self.reference: Reference | None = None
        self.route_obstacles: dict[RouteName, str] = {}
        """Why the policy does not take each route that is faster than its own."""
        self.unused_modules: list[str] = []
        """The policy's modules that text does not reach, such as a vision tower; frozen."""
        self.published = PublishedMetrics()
        self.validated_step = -1
        self.resumption = Resumption()
        """The models that the run started from, and the settings that changed since."""
        self._validation = ValidationSums(torch.device("cpu"))
        self._clock = StepClock()
        self._guard = NonFiniteGuard(non_finite)

    def setup(self, stage: str) -> None:
        """Refuse what a plain `Trainer` accepts and this module cannot run, before any loading."""
        check_precision(self.trainer.precision)
        if self.model_settings.objects:
            check_objects(self.model_settings.objects, self.trainer.strategy)
            self._set_attention(original=False)
        if stage == "fit":
            self._check_data()

    def configure_model(self) -> None:
        """Load the policy and its reference. Lightning calls this once the data is set up."""
        if self.policy is not None:
            return
        strategy = self._strategy
        settings = replace(
            self.model_settings, shard=strategy.shard, rounds_weights=strategy.rounds_weights
        )
        data = self._data
        for model in settings.objects.values():
            model.to(self._compute_device)
        if self.trainer.state.fn == "fit" or self.trainer.world_size > 1:
            self.resumption.identify_objects(settings)
        if self.trainer.state.fn == "fit":
            check_device(settings, self.trainer.strategy.root_device)
        elif settings.reference is None:
            settings = replace(settings, reference=recorded_reference(settings.policy))
        # A data module of another kind has none, as `facts` below.
        longest = getattr(data, "longest_sequence", lambda: 0)()
        models = build_models(
            settings,
            precision=str(self.trainer.precision),
            longest=longest,
            device=self._compute_device,
            reference_keys=lambda: data.reference_keys(),
        )
        self.policy, self.reference = models.policy, models.reference
        if self.trainer.state.fn == "fit":
            self.resumption.identify(settings)
        self.route_obstacles, self.unused_modules = models.obstacles, models.unused
        check_positions(models.policy.causal_lm, settings.policy, longest)

    def teardown(self, stage: str) -> None:
        """Give models in memory back with the attention that they came with."""
        if self.model_settings.objects:
            self._set_attention(original=True)

    def _set_attention(self, *, original: bool) -> None:
        if self.policy is not None:
            self.policy.set_attention(original=original)
        if isinstance(self.reference, FrozenReference):
            self.reference.policy.set_attention(original=original)

    @property
    def _strategy(self) -> TrainingStrategy:
        return training_strategy(self.trainer.strategy)

    @property
    def _compute_device(self) -> torch.device:
        """Where this rank computes; offloaded weights, and so `self.device`, may be elsewhere."""
        return self.trainer.strategy.root_device

    @property
    def _data(self) -> Any:
        # Lightning sets this attribute without declaring it.
        return self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def _callbacks(self) -> list[Any]:
        # Likewise.
        return self.trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]

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
            beta=self.objective.beta,
            loss_name=self.objective.loss,
            sum_over_ranks=self._sum_over_ranks,
        )

    def on_train_epoch_start(self) -> None:
        if isinstance(self.reference, CachedReference):
            self.reference.refresh()

    def configure_optimizers(self) -> Any:
        assert self.policy is not None
        configured = self.optimization.configure(
            self.policy.named_parameters(), num_steps=self.num_training_steps()
        )
        groups = configured["optimizer"].param_groups
        self._weight_decays = [group["weight_decay"] for group in groups]
        return configured

    def num_training_steps(self) -> int | None:
        """Optimizer steps of the whole run, over which a schedule stretches; None: unknown.

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
        # Lightning's advice on modules in eval mode: the policy leaves those there that would only
        # add noise.
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")

    def on_train_start(self) -> None:
        self.resumption.begin()
        if self.trainer.global_step:  # the restored optimizer has the settings of then
            optimizer, scheduler = self.trainer.optimizers[0], self.lr_schedulers()
            use_settings(self.optimization, optimizer, scheduler, self._weight_decays)
        self._clock.start()

    def on_train_batch_end(self, *args: Any) -> None:
        self._clock.start()

    def on_validation_start(self) -> None:
        self._place_reference()

    def on_validation_end(self) -> None:
        self._clock.start()

    def _place_reference(self) -> None:
        assert self.reference is not None
        self.reference.to(self._compute_device)

    def on_validation_epoch_start(self) -> None:
        self._validation = ValidationSums(self._compute_device)

    def validation_step(self, batch: StepBatch, batch_idx: int) -> None:
        scorer = self._scorer()
        with explain_out_of_memory(scorer, self.trainer):
            validate_batch(scorer, batch, self._validation)

    def on_validation_epoch_end(self) -> None:
        self.validated_step = self.trainer.global_step
        self.published.publish(self.trainer, "val", self._validation.metrics(self._sum_over_ranks))
        known = {k: v for k, v in self.published.latest.items() if k.startswith("val/")}
        self.log_dict(known, logger=False)  # for callbacks that watch a metric: EarlyStopping

    def on_predict_start(self) -> None:
        self._place_reference()

    def predict_step(self, batch: StepBatch, batch_idx: int) -> list[Prediction]:
        scorer = self._scorer()
        with explain_out_of_memory(scorer, self.trainer):
            return predict_batch(scorer, batch)

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """One optimizer step: z0 over the whole batch, then micro-batch by micro-batch."""
        scorer, strategy, micro_batches = self._scorer(), self._strategy, batch.micro_batches
        with explain_out_of_memory(scorer, self.trainer):
            scored = scorer.score_for_reference_point(micro_batches)
            sums = BatchSums.zero(self._compute_device)
            z0_raw, z0 = scorer.reference_point(batch, scored, sums)
            auxiliary = torch.zeros((), device=self._compute_device)
            for index, micro_batch in enumerate(micro_batches):
                last = index == len(micro_batches) - 1
                with strategy.synchronize_gradients(last=last):
                    logps = scored[index] = scorer.score_matched(micro_batch, scored[index])
                    losses = scorer.compute_losses(micro_batch, logps, z0, sums)
                    balance = scorer.auxiliary_loss(micro_batch, logps.policy, batch.num_tokens)
                    loss = losses.sum() / batch.num_examples + balance
                    loss = reaching_all(loss, scorer.policy.parameters())
                    # DDP and FSDP2 average gradients over ranks, and `num_examples` counts the
                    # examples of all ranks: times the world size, the average is the sum.
                    self.manual_backward(loss * self.trainer.world_size)
                    auxiliary += balance.detach()
                    # A graph keeps activations alive even after its backward. Without these two
                    # lines they would still be there during the next micro-batch's forward.
                    logps.detach_()
                    del losses, balance, loss
        fill_missing_gradients(scorer.policy.parameters())
        norm = self._gradient_norm()
        scalars = torch.stack([z0_raw, z0, norm.to(z0)])
        metrics, peaks = read_step(
            batch,
            sums,
            auxiliary,
            scalars,
            rank=self.global_rank,
            num_ranks=self.trainer.world_size,
            sum_over_ranks=self._sum_over_ranks,
        )
        if not self._guard.allows(self.trainer, metrics, batch, scored):
            strategy.drop_gradients(self)
        metrics["lr"] = self._update()
        measured = self._clock.measure(batch.num_tokens, peaks)
        self.published.publish(self.trainer, "train", metrics | measured)

    def _gradient_norm(self) -> Tensor:
        assert self.policy is not None
        return self._strategy.gradient_norm(
            self.policy.parameters(), self.optimization.gradient_clip_norm
        )

    def _update(self) -> float:
        """Step the optimizer, its schedule and a following reference; the learning rate used."""
        assert self.policy is not None
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        learning_rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        self.zero_grad()
        scheduler: Any = self.lr_schedulers()
        scheduler.step()
        if isinstance(self.reference, FollowingReference):
            self.reference.after_step(self.trainer.global_step, self.policy)
        return learning_rate

    def on_train_end(self) -> None:
        self._guard.warn_of_skipped(self.trainer)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        # Declared by Lightning as a tensor or whatever it was given.
        return self.trainer.strategy.reduce(values, reduce_op="sum")  # pyright: ignore[reportReturnType]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the trained weights only: under LoRA the frozen base is loaded from its origin."""
        add_policy_state(checkpoint, self, self.reference, self.origin())
        drop_frozen_averages(checkpoint, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse other models' weights, and settings with which the run cannot be resumed."""
        trains = self.trainer.state.fn == "fit"
        same_reference = False
        if trains:
            same_reference = self.resumption.compare(checkpoint, self.origin())
            check_epochs_left(checkpoint, self.trainer.max_epochs)
        check_weights_fit(checkpoint, self)
        if trains:
            averages = any(isinstance(one, WeightAveraging) for one in self._callbacks)
            restore_averages(checkpoint, self, averages=averages)
        name = None if same_reference else self.model_settings.reference
        requested = None if name is None else resolve_name(name)
        restore_reference(checkpoint, self.reference, requested=requested, resuming=trains)

    def origin(self) -> dict[str, Any]:
        """The policy's origin in plain values, see `policy_origin`."""
        facts = getattr(self._data, "facts", dict)()  # a data module of another kind has none
        owners = self.model_settings, self.objective, self.optimization
        origin = policy_origin(
            *owners,
            step=self.trainer.global_step,
            results=self.published.latest,
            data=facts,
            settings=run_settings(*owners, trainer=self.trainer, data=facts),
            identities=self.resumption.identities,
            changes=self.resumption.changes,
        )
        return self.resumption.effective(origin)
