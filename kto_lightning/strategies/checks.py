"""Checks of `--trainer.strategy` before any process is started."""

from typing import Any

from kto_lightning.errors import ConfigError
from kto_lightning.strategies.fsdp2 import FSDP2, OFFLOAD_NAME
from kto_lightning.strategies.fsdp2 import NAME as FSDP2_NAME

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


def strategy_name(strategy: Any) -> str:
    """The name of a strategy in a parsed config: a registered name, or a class by its path."""
    path = strategy if isinstance(strategy, str) else strategy.class_path
    return path.rpartition(".")[2]


def strategy_problem(strategy: Any) -> str | None:
    """Why a strategy is not offered, and what to use; None: it may be."""
    name = strategy_name(strategy)
    reason = next((why for start, why in _REFUSED.items() if name.startswith(start)), "")
    return f"--trainer.strategy {name} {reason}" if reason else None


def check_strategy(strategy: Any, model: Any) -> None:
    """Refuse strategies that cannot train here, and settings that a strategy cannot run.

    Args:
        strategy: `trainer.strategy` of the parsed config.
        model: the settings under `model`.

    Raises:
        ConfigError: with the strategy or setting to use instead.
    """
    problem = strategy_problem(strategy)
    if problem is not None:
        raise ConfigError(problem)
    name = strategy_name(strategy)
    if name in (FSDP2_NAME, OFFLOAD_NAME, FSDP2.__name__):
        _check_sharded(model)


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
