"""Which of Lightning's strategies can run what is done here, and what is said of the others."""

import importlib.util
from typing import Any

from kto_lightning.errors import ConfigError
from kto_lightning.sharding import FSDP2
from kto_lightning.sharding import NAME as FSDP2_NAME
from kto_lightning.zero import NAMES as ZERO_NAMES
from kto_lightning.zero import ZeRO

_SHARD = f"Use --trainer.strategy {FSDP2_NAME}."
_DEEPSPEED = f"cannot be set up as training here needs it. Use one of {', '.join(ZERO_NAMES)}."
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
    "deepspeed_stage_3_offload_nvme": _DEEPSPEED,
    **dict.fromkeys(ZERO_NAMES, ""),
    "deepspeed": _DEEPSPEED,
}
_UNSHARDED_OPTIMIZERS = ("adafactor", "adamw_8bit")


def strategy_name(strategy: Any) -> str:
    """The name of a strategy in a parsed config: a text, or the class of a YAML `class_path`."""
    if isinstance(strategy, str):
        return strategy
    return str(strategy.class_path).rpartition(".")[2]


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
        _check_sharded(FSDP2_NAME, model)
        _check_whole_model(FSDP2_NAME, model)
    elif name in (*ZERO_NAMES, ZeRO.__name__):
        _check_deepspeed(strategy, name, model)


def _check_deepspeed(strategy: Any, name: str, model: Any) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"--trainer.strategy {name} needs DeepSpeed, which is not installed. "
            f"`pip install 'kto-lightning[deepspeed]'`. {_SHARD}"
        )
    _check_sharded(name, model)
    stage = strategy.init_args.stage if name == ZeRO.__name__ else ZERO_NAMES[name]["stage"]
    if stage < 3:
        return
    _check_whole_model(name, model)
    if model.follow is not None:
        raise ConfigError(
            f"--model.follow mixes whole weights, which {name} leaves to no rank. Use "
            f"deepspeed_stage_2 or {FSDP2_NAME}."
        )
    if model.dtype == "bfloat16":
        raise ConfigError(
            f"--model.dtype bfloat16 keeps a frozen base beside an adapter in float32, and {name} "
            f"keeps all weights alike. Leave it out, or use deepspeed_stage_2 or {FSDP2_NAME}."
        )
    if model.activation_offloading:
        raise ConfigError(
            f"--model.activation_offloading tells weights by their shapes, and {name} leaves none "
            f"to a rank. Use --model.activation_checkpointing true, or {FSDP2_NAME}."
        )


def _check_sharded(name: str, model: Any) -> None:
    """What works on parts of weights, whichever they are."""
    if model.quantization is not None:
        raise ConfigError(
            f"--model.quantization {model.quantization} has not been tried with {name}. Use "
            "--trainer.strategy ddp, or leave it out."
        )
    if model.optimizer in _UNSHARDED_OPTIMIZERS:
        raise ConfigError(
            f"--model.optimizer {model.optimizer} has not been tried on sharded weights. Use "
            f"adamw, whose state is sharded too, or another --trainer.strategy than {name}."
        )


def _check_whole_model(name: str, model: Any) -> None:
    if model.offload_reference:
        raise ConfigError(
            f"--model.offload_reference is for a whole model, and {name} leaves every rank "
            "with a part of the reference alone. Leave it out."
        )
