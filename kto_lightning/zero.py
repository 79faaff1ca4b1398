"""DeepSpeed ZeRO (`--trainer.strategy deepspeed_stage_1|2|3`): optimizer state, gradients and, in
stage 3, weights in parts, one a rank.

An engine is made of the policy alone, and every call of the policy is led through it
(`Policy.through`). DeepSpeed computes a gradient's norm within its step; here it is asked for it
before, so that a step which is not finite can be left out.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from kto_lightning.errors import ConfigError
from kto_lightning.policy import Policy
from kto_lightning.types import Logps, PackedBatch
from kto_lightning.zero_states import Groups, gathered, restore_state, whole_state

NAMES: dict[str, dict[str, Any]] = {
    "deepspeed_stage_1": {"stage": 1},
    "deepspeed_stage_2": {"stage": 2},
    "deepspeed_stage_2_offload": {"stage": 2, "offload_optimizer": True},
    "deepspeed_stage_3": {"stage": 3},
    "deepspeed_stage_3_offload": {
        "stage": 3,
        "offload_optimizer": True,
        "offload_parameters": True,
    },
}
"""Lightning's names, and what they set here."""
_BUCKET_SIZE = 200_000_000
"""Gradients that are reduced at once, as many as Lightning sets: a buffer of 0.8 GB."""


class ZeRO(DDPStrategy):
    """DeepSpeed's engine around the policy; process group, precision and checkpoints as under DDP.

    Lightning's own DeepSpeedStrategy wraps the whole module, takes no norm before a step, and
    writes checkpoints that nothing else reads. Here a checkpoint is one file with whole weights and
    the optimizer's own state: a run can go on with another strategy and another number of ranks.

    Args:
        stage: 1 spreads the optimizer's state, 2 gradients too, 3 weights too.
        offload_optimizer: keep the optimizer's state, and step, in the host's memory.
        offload_parameters: keep weights of stage 3 there while nothing is computed with them.
        options: more of DeepSpeed's `zero_optimization`, or others than are set here.
        timeout: after which a rank that waits for another gives up.

    Raises:
        ConfigError: for another stage, or weights to offload that are not spread.
    """

    def __init__(
        self,
        stage: int = 2,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        options: dict[str, Any] | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        super().__init__(timeout=timeout)
        if stage not in (1, 2, 3):
            raise ConfigError(f"--trainer.strategy.stage must be 1, 2 or 3, got {stage}.")
        if offload_parameters and stage < 3:
            raise ConfigError(
                f"--trainer.strategy.offload_parameters is for stage 3; stage {stage} keeps all "
                "weights on every device. Leave it out."
            )
        self.stage = stage
        zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": _BUCKET_SIZE}
        if offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu"}
        if offload_parameters:
            zero["offload_param"] = {"device": "cpu"}
        self._config = {
            "train_micro_batch_size_per_gpu": 1,  # for statistics of DeepSpeed's own
            "gradient_accumulation_steps": 1,  # a step's end is told by `block_backward_sync`
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero | (options or {}),
        }
        self._engine: Any = None
        self._groups: Groups = []
        self._measure_norm: Callable[[], Tensor] | None = None
        self._norm: Tensor | None = None

    @property
    def shard(self) -> Callable[[Policy], None] | None:
        """Spreads a policy that was just loaded; None: every rank keeps the whole."""
        return self._shard if self.stage == 3 else None

    def setup_distributed(self) -> None:
        if self.root_device.index not in (None, self.local_rank):
            raise ConfigError(
                f"DeepSpeed takes a process's device to be cuda:{self.local_rank}, and "
                f"--trainer.devices gives it {self.root_device}. Choose devices by the environment "
                f"variable CUDA_VISIBLE_DEVICES, and give --trainer.devices {self.num_processes}."
            )
        super().setup_distributed()
        assert self.cluster_environment is not None
        os.environ |= {
            "MASTER_ADDR": self.cluster_environment.main_address,
            "MASTER_PORT": str(self.cluster_environment.main_port),
            "RANK": str(self.global_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            # Which kind of device it uses is settled when it is imported.
            "DS_ACCELERATOR": self.root_device.type,
        }
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        import deepspeed

        if self.root_device.type == "cpu":
            # Compiled for a minute, for inference alone.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    def _shard(self, policy: Policy) -> None:
        import deepspeed

        deepspeed.zero.Init(module=policy, config_dict_or_path=self._config)
        if not any(parameter.requires_grad for parameter in policy.parameters()):
            self._start(policy, None)  # a reference; of the policy `setup` makes an engine

    def _start(self, policy: Policy, optimizer: Optimizer | None) -> Any:
        """Make an engine of a policy, and lead its calls through that."""
        import deepspeed

        trained: Any = [p for p in policy.parameters() if p.requires_grad and optimizer is not None]
        engine, *_ = deepspeed.initialize(
            model=_Traced(policy, self._autocast),
            optimizer=optimizer,
            model_parameters=trained,
            config=self._config,
            dist_init_required=False,
        )

        def through(batch: PackedBatch, **which: bool) -> Logps:
            # On a GPU an engine turns autocast off, with a warning; within, it is on again.
            with torch.autocast(self.root_device.type, enabled=False):
                matched, mismatched, auxiliary_loss = engine(batch=batch, **which)
            return Logps(matched=matched, mismatched=mismatched, auxiliary_loss=auxiliary_loss)

        policy.through = through
        return engine

    def _autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision as under DDP; only, in stage 3 no rounded weights are kept for later."""
        half = self.precision_plugin.precision == "bf16-mixed"
        return torch.autocast(
            self.root_device.type,
            dtype=torch.bfloat16 if half else None,
            enabled=half,
            cache_enabled=self.stage < 3,
        )

    def setup(self, trainer: Any) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.model_to_device()
        module: Any = self.lightning_module
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
            (optimizer,) = self.optimizers
            self._groups = [list(group["params"]) for group in optimizer.param_groups]
            self._config["gradient_clipping"] = module.optimization.gradient_clip_norm or 0.0
            self._engine = self._start(module.policy, optimizer)
            self._ask_for_norm_before_step()
        elif self.stage == 3 and self._engine is None:
            self._engine = self._start(module.policy, None)
        self.setup_precision_plugin()

    def _ask_for_norm_before_step(self) -> None:
        """Let a step clip by the norm that was asked for before it, without computing it anew."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        zero = self._engine.optimizer
        if self.stage == 3:
            by_group, zero._get_norm_groups = zero._get_norm_groups, lambda: [self._norm]
            self._measure_norm = lambda: combine_grad_norm_groups(by_group())
        else:
            self._measure_norm, zero.scaled_global_norm = (
                zero.scaled_global_norm,
                lambda: self._norm,
            )

    def gradient_norm(self) -> Tensor:
        """The global L2 norm of the gradients before clipping; infinite if one is not finite."""
        assert self._measure_norm is not None
        self._norm = norm = self._measure_norm()
        return norm

    def drop_gradients(self) -> None:
        """Let the step that comes leave everything as it is."""
        assert self._norm is not None
        self._norm = torch.full_like(self._norm, torch.inf)  # with which DeepSpeed takes none

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Around every micro-batch of a step but the last."""
        self._engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self._engine.set_gradient_accumulation_boundary(True)

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._engine.backward(closure_loss, scale_wrt_gas=False)

    def optimizer_step(self, optimizer: Any, closure: Any, *args: Any, **kwargs: Any) -> Any:
        result = closure()
        self._engine.step()
        optimizer._opt_called = True  # to a schedule a step that was left out is one too
        return result

    def teardown(self) -> None:
        """Without moving the model, of which an engine holds views."""
        assert self.accelerator is not None
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is trained, whole, on the first rank; nothing on the others."""
        assert self.lightning_module is not None
        state = {}
        for name, value in self.lightning_module.state_dict(keep_vars=True).items():
            if isinstance(value, nn.Parameter) and not value.requires_grad:
                continue
            with gathered(value):
                if self.is_global_zero:
                    state[name] = value.detach().cpu().clone()
        return state

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Before there is an engine of the policy, which begins with the weights that it finds."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, value in checkpoint["state_dict"].items():
                with gathered(own[name], changed=True):
                    own[name].copy_(value)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's own state with whole tensors, on the first rank; nothing on others."""
        return whole_state(self._engine, optimizer, self._groups, keep=self.is_global_zero)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        (optimizer,), (saved,) = self.optimizers, checkpoint["optimizer_states"]
        restore_state(self._engine, optimizer, self._groups, saved)


class _Traced(nn.Module):
    """What an engine is made of: a policy with outputs that an engine looks into.

    Args:
        policy: called past its own hooks, in which its outputs are not understood.
        autocast: mixed precision.
    """

    def __init__(self, policy: Policy, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.policy, self.autocast = policy, autocast

    def forward(self, batch: PackedBatch, **which: bool) -> tuple[Tensor | None, ...]:
        with self.autocast():
            logps = self.policy.forward(batch, **which)
        return logps.matched, logps.mismatched, logps.auxiliary_loss


def _is_news(record: logging.LogRecord) -> bool:
    """Whether DeepSpeed does not say it, on stdout, of every run without a GPU or with another
    optimizer than its own; also where it is only imported, by transformers to save a model."""
    message = str(record.msg)
    return "Setting accelerator to CPU" not in message and "untested optimizer" not in message


logging.getLogger("DeepSpeed").addFilter(_is_news)
for _name, _settings in NAMES.items():
    StrategyRegistry.register(
        _name, ZeRO, description="DeepSpeed ZeRO around the policy", override=True, **_settings
    )
