"""Checks of `--trainer.strategy` before any process is started."""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from kto_lightning.errors import ConfigError
from kto_lightning.strategies.fsdp2 import (
    FSDP2,
    HYBRID_NAME,
    HYBRID_OFFLOAD_NAME,
    OFFLOAD_NAME,
)
from kto_lightning.strategies.fsdp2 import NAME as FSDP2_NAME
from kto_lightning.strategies.replicas import check_replicas

_SHARD = f"Use --trainer.strategy {FSDP2_NAME}."
_DEEPSPEED = (
    "is not offered: FSDP2 shards what ZeRO stages 1 to 3 shard, within PyTorch. Use "
    "--trainer.strategy {}. docs/coming_from_deepspeed.md has the settings."
)
_REFUSED = {
    # prefix of a strategy's name: the reason, and what to use. The first match counts.
    "ddp_spawn": "trains in child processes, whose weights are lost when they end. Use ddp.",
    "ddp_fork": "trains in child processes, whose weights are lost when they end. Use ddp.",
    "ddp_notebook": "trains in child processes, whose weights are lost when they end. Use ddp.",
    "fsdp2": "",
    "fsdp": f"is FSDP1, whose flattened weights cannot be exported. {_SHARD}",
    "FSDPStrategy": f"is FSDP1, whose flattened weights cannot be exported. {_SHARD}",
    "ModelParallelStrategy": "does not reduce gradients over the ranks of one machine by default, "
    f"and orders optimizer states differently in checkpoints. {_SHARD}",
    "DeepSpeedStrategy": _DEEPSPEED.format(FSDP2_NAME),
    **dict.fromkeys(
        ("deepspeed_stage_2_offload", "deepspeed_stage_3_offload"), _DEEPSPEED.format(OFFLOAD_NAME)
    ),
    "deepspeed": _DEEPSPEED.format(FSDP2_NAME),
}
_UNSHARDED_OPTIMIZERS = ("adafactor", "adamw_8bit")
_HYBRID = (HYBRID_NAME, HYBRID_OFFLOAD_NAME)
_SHARDING = (FSDP2_NAME, OFFLOAD_NAME, *_HYBRID, FSDP2.__name__)


def strategy_name(strategy: Any) -> str:
    """The name of a strategy in a parsed config: a registered name, or a class by its path."""
    path = strategy if isinstance(strategy, str) else strategy.class_path
    return path.rpartition(".")[2]


def strategy_problem(strategy: Any) -> str | None:
    """Why a strategy is not offered, and what to use; None: it may be."""
    name = strategy_name(strategy)
    reason = next((why for start, why in _REFUSED.items() if name.startswith(start)), "")
    return f"--trainer.strategy {name} {reason}" if reason else None


def is_sharding(strategy: Any) -> bool:
    """Whether a strategy of a parsed config shards the model."""
    return strategy_name(strategy) in _SHARDING


def check_strategy(strategy: Any, model: Any, *, num_nodes: int, devices: Any) -> None:
    """Refuse strategies that cannot train here, and settings that a strategy cannot run.

    Args:
        strategy: `trainer.strategy` of the parsed config.
        model: the settings under `model`.
        num_nodes: `trainer.num_nodes`.
        devices: `trainer.devices`.

    Raises:
        ConfigError: with the strategy or setting to use instead.
    """
    problem = strategy_problem(strategy)
    if problem is not None:
        raise ConfigError(problem)
    if is_sharding(strategy):
        _check_sharded(model)
        num_ranks = num_nodes * int(devices) if str(devices).isdecimal() else None
        check_replicas(_replicas(strategy), num_nodes=num_nodes, num_ranks=num_ranks)


def _replicas(strategy: Any) -> int | None:
    """The argument `replicas` of a sharding strategy of a parsed config."""
    if isinstance(strategy, str):
        return None if strategy in _HYBRID else 1
    return strategy.get("init_args", {}).get("replicas", 1)


def check_objects(roles: Iterable[str], strategy: Strategy) -> None:
    """Refuse strategies that cannot train models in memory.

    Args:
        roles: of the models that are in memory, such as `policy`.

    Raises:
        ConfigError: with what to use instead.
    """
    given = " and ".join(sorted(roles))
    if getattr(strategy, "shard", None) is not None:
        raise ConfigError(
            f"the {given} cannot be sharded by {type(strategy).__name__}: every rank would hold "
            "the whole model first, which sharding is to avoid. Give a directory or hub id, or use "
            "strategy='ddp'."
        )
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise ConfigError(
            f"the {given} would be trained in child processes, and the model in memory here would "
            "stay as it is. Use strategy='ddp', which runs the script once per rank, or torchrun."
        )


def _check_sharded(model: Any) -> None:
    """Refuse settings that need whole weights or were not tried on shards."""
    if model.quantization is not None:
        raise ConfigError(
            f"--model.quantization {model.quantization} has not been tried with {FSDP2_NAME}. Use "
            "--trainer.strategy ddp, or remove --model.quantization."
        )
    if model.optimizer in _UNSHARDED_OPTIMIZERS:
        raise ConfigError(
            f"--model.optimizer {model.optimizer} has not been tried on sharded weights. Use "
            "adamw, whose state is sharded too, or --trainer.strategy ddp."
        )
    if model.offload_reference:
        raise ConfigError(
            f"--model.offload_reference moves a whole model, and under {FSDP2_NAME} every rank "
            "holds only its shard of the reference. Remove it, or use "
            f"--trainer.strategy {OFFLOAD_NAME}."
        )
