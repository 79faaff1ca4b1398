"""Which of Lightning's strategies can run what is done here, and what is said of the others."""

from typing import Any

from kto_lightning.errors import ConfigError
from kto_lightning.strategies.fsdp2 import FSDP2
from kto_lightning.strategies.fsdp2 import NAME as FSDP2_NAME

_SHARD = f"Use --trainer.strategy {FSDP2_NAME}."
_DEEPSPEED = (
    f"is not offered: FSDP2 shards what ZeRO stages 1 to 3 shard, within PyTorch. {_SHARD} "
    "docs/coming_from_deepspeed.md has the settings."
)
_REFUSED = {
    # Beginning of a name: why, and what to do.
    "ddp_spawn": "trains in processes of its own, which end with the weights. Use ddp.",
    "ddp_fork": "trains in processes of its own, which end with the weights. Use ddp.",
    "ddp_notebook": "trains in processes of its own, which end with the weights. Use ddp.",
    "fsdp2": "",
    "fsdp": f"is FSDP1, whose flattened weights cannot be exported here. {_SHARD}",
    "FSDPStrategy": f"is FSDP1, whose flattened weights cannot be exported here. {_SHARD}",
    "ModelParallelStrategy": "does not add up gradients over the ranks of one machine unless its "
    f"sizes are set, and numbers optimizer states in an order of its own. {_SHARD}",
    "DeepSpeedStrategy": _DEEPSPEED,
    "deepspeed": _DEEPSPEED,
}
_UNSHARDED_OPTIMIZERS = ("adafactor", "adamw_8bit")


def strategy_name(strategy: Any) -> str:
    """The name of a strategy in a parsed config: a registered name, or a class by its path."""
    path = strategy if isinstance(strategy, str) else strategy.class_path
    return path.rpartition(".")[2]


def check_strategy(strategy: Any, model: Any) -> None:
    """Refuse what cannot train here, before any process is started.

    Args:
        strategy: `trainer.strategy` of the parsed config.
        model: the settings under `model`.

    Raises:
        ConfigError: with what to use instead.
    """
    name = strategy_name(strategy)
    reason = next((why for start, why in _REFUSED.items() if name.startswith(start)), "")
    if reason:
        raise ConfigError(f"--trainer.strategy {name} {reason}")
    if name in (FSDP2_NAME, FSDP2.__name__):
        _check_sharded(model)


def _check_sharded(model: Any) -> None:
    """What works on shards of the weights, and what needs them whole."""
    if model.quantization is not None:
        raise ConfigError(
            f"--model.quantization {model.quantization} has not been tried with {FSDP2_NAME}. Use "
            "--trainer.strategy ddp, or leave it out."
        )
    if model.optimizer in _UNSHARDED_OPTIMIZERS:
        raise ConfigError(
            f"--model.optimizer {model.optimizer} has not been tried on sharded weights. Use "
            "adamw, whose state is sharded too, or --trainer.strategy ddp."
        )
    if model.offload_reference:
        raise ConfigError(
            f"--model.offload_reference is for a whole model, and {FSDP2_NAME} leaves every rank "
            "with a part of the reference alone. Leave it out."
        )
