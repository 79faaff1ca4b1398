"""Models that a Python program has in memory already: names, checks and a hash of their content."""

import json
import os
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from kto_lightning.errors import ConfigError
from kto_lightning.models.lora import ADAPTER, REFERENCE_ADAPTER
from kto_lightning.models.model_files import VOLATILE

_VOLATILE = VOLATILE | {"architectures", "dtype", "torch_dtype", "use_cache"}
"""Entries of a config that differ between a model made from its config and one that was loaded."""
_WRAPPERS = {"_orig_mod": "torch.compile", "module": "a strategy"}
"""Attributes in which wrappers keep the model, and who makes them."""


def name_models(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `KTOModule` with models in memory as `objects`, and their names instead.

    Args:
        settings: `policy` and `reference` are names, paths or models; a policy in memory decides
            `dtype`.

    Raises:
        ConfigError: if a model cannot be trained or compared with, or another setting contradicts
            it.
    """
    named = {
        role: os.fspath(settings[role])
        for role in ("policy", "reference")
        if isinstance(settings[role], str | os.PathLike)
    }
    objects = {
        role: settings[role]
        for role in ("policy", "reference")
        if role not in named and (settings[role] is not None or role == "policy")
    }
    for role, model in objects.items():
        if role == "policy" or not _is_its_base(model, objects.get("policy")):
            _check_kind(role, model)
            _check_state(role, model)
        named[role] = object_name(model)
    dtype = settings["dtype"]
    if "policy" in objects:
        _check_loading_settings(settings, named["policy"])
        dtype = _check_policy(
            objects["policy"], named["policy"], trains_all=settings["lora"] is None
        )
    if "reference" in objects:
        _check_reference(objects, named, dtype, settings)
    if (named.get("reference") is None and "policy" in objects) or "reference" in objects:
        _check_cache(settings, named.get("reference") or named["policy"])
    return {**settings, **named, "dtype": dtype, "objects": objects}


def causal_lm_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model, without peft's wrapper."""
    found: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return found


def object_name(model: nn.Module) -> str:
    """A model's class and, where it is known, what it was loaded from."""
    causal_lm = causal_lm_of(model)
    adapted = " with an adapter" if isinstance(model, PeftModel) else ""
    source = f" (loaded from {causal_lm.name_or_path})" if causal_lm.name_or_path else ""
    return f"{type(causal_lm).__name__} in memory{adapted}{source}"


def object_identity(model: nn.Module) -> str:
    """A hash of a model's weights and configs, to be taken before its training.

    Equal for models with the same weights, wherever they are; not comparable with `model_identity`.

    Returns:
        64 hexadecimal digits.
    """
    configs: dict[str, dict[str, Any]] = {"config": causal_lm_of(model).config.to_dict()}
    if isinstance(model, PeftModel):
        configs |= {name: config.to_dict() for name, config in sorted(model.peft_config.items())}
    digest = sha256()
    for name, config in configs.items():
        kept = {key: value for key, value in config.items() if key not in _VOLATILE}
        digest.update(f"{name} {json.dumps(kept, sort_keys=True, default=_plain)}\n".encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _check_kind(role: str, model: Any) -> None:
    """Refuse what is neither a causal language model of transformers nor an adapter on one."""
    kind = type(model).__name__
    wrapper = next((name for name in _WRAPPERS if hasattr(model, name)), None)
    if not isinstance(model, PreTrainedModel | PeftModel):
        if wrapper is not None:
            raise ConfigError(
                f"the {role} is of the class {kind}, which {_WRAPPERS[wrapper]} has made of a "
                f"model. Give the model itself (its attribute {wrapper})."
            )
        raise ConfigError(
            f"the {role} must be a directory, a hub id, a transformers.PreTrainedModel or a "
            f"peft.PeftModel, got {kind}."
        )
    adapters = model.peft_config.values() if isinstance(model, PeftModel) else ()
    if any(adapter.is_prompt_learning for adapter in adapters):
        raise ConfigError(
            f"the {role} has a prompt-learning adapter (virtual tokens), which cannot be trained "
            "here. Give one that changes weights, such as LoRA."
        )
    causal_lm = causal_lm_of(model)
    reads_both_ways = causal_lm.config.is_encoder_decoder or not causal_lm.can_generate()
    if reads_both_ways or causal_lm.get_output_embeddings() is None:
        raise ConfigError(
            f"the {role} is a {type(causal_lm).__name__}, which is no causal language model. Load "
            "it with AutoModelForCausalLM."
        )
    layers = any(isinstance(module, BaseTunerLayer) for module in causal_lm.modules())
    if layers and not isinstance(model, PeftModel):
        raise ConfigError(
            f"the {role} has layers of an adapter, but is not the peft.PeftModel that they belong "
            "to. Give that one, or take them out: PeftModel.unload() gives the model without them."
        )


def _check_state(role: str, model: nn.Module) -> None:
    """Refuse a model whose weights cannot be read, moved or computed with here."""
    causal_lm: Any = causal_lm_of(model)
    modules, parameters = list(model.modules()), list(model.parameters())
    problems = [
        (
            getattr(causal_lm, "hf_quantizer", None) is not None
            or not all(parameter.is_floating_point() for parameter in parameters),
            "is quantized. Give its directory or hub id, with lora=LoRA() and quantization='4bit'",
        ),
        (
            any(isinstance(module, FSDPModule) for module in modules)
            or any(isinstance(parameter, DTensor) for parameter in parameters),
            "is sharded. Give the model as from_pretrained returns it",
        ),
        (
            len({parameter.device for parameter in parameters}) > 1
            or any(parameter.is_meta for parameter in parameters)
            or any(hasattr(module, "_hf_hook") for module in modules),
            "has weights on several devices, or on the device meta. Load it without device_map: "
            "the trainer moves it to its device",
        ),
        (
            any(module._compiled_call_impl is not None for module in modules),
            "is compiled. Give it as it was before model.compile()",
        ),
        (
            any(parameter.is_inference() for parameter in parameters),
            "was made within torch.inference_mode(). Make it outside",
        ),
        (
            any(module.merged for module in modules if isinstance(module, BaseTunerLayer)),
            "has a merged adapter. Call unmerge_adapter(), or give what merge_and_unload() returns",
        ),
        (
            not {parameter.dtype for parameter in parameters} <= {torch.float32, torch.bfloat16},
            "has weights that are neither float32 nor bfloat16. Load it with dtype=torch.float32",
        ),
    ]
    for is_so, problem in problems:
        if is_so:
            raise ConfigError(f"the {role}, a {object_name(model)}, {problem}.")


def _check_loading_settings(settings: Mapping[str, Any], name: str) -> None:
    for option in ("dtype", "quantization"):
        if settings[option] is not None:
            raise ConfigError(
                f"{option}={settings[option]!r} is for a policy that is loaded by its name, and "
                f"this one is a {name}. Remove it, or give the policy's directory or hub id."
            )


def _check_policy(model: nn.Module, name: str, *, trains_all: bool) -> str | None:
    """Refuse a policy that cannot be trained as it is.

    Returns:
        the dtype of its frozen base as a setting: None for float32.
    """
    if isinstance(model, PeftModel):
        if not trains_all:
            raise ConfigError(
                "lora adds an adapter, but the policy has one already. Remove lora to train that "
                "adapter, or merge it first: merge_and_unload() returns the merged model."
            )
        _check_adapter(model)
    elif trains_all and _dtype(model.parameters()) is not None:
        raise ConfigError(
            f"the policy, a {name}, has bfloat16 weights, in which updates of a small learning "
            "rate are rounded away. Load it with dtype=torch.float32, or call model.float(), and "
            "compute in bfloat16 with Trainer(precision='bf16-mixed'); or add lora=LoRA()."
        )
    elif trains_all and not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            f"the policy, a {name}, has no weight that requires a gradient. Call "
            "model.requires_grad_(True), or add lora=LoRA()."
        )
    return _dtype(causal_lm_of(model).parameters())


def _dtype(parameters: Iterable[Tensor]) -> str | None:
    return "bfloat16" if any(p.dtype == torch.bfloat16 for p in parameters) else None


def _check_adapter(model: PeftModel) -> None:
    """Refuse an adapter that cannot be trained, exported or copied as the reference."""
    if model.active_adapters != [ADAPTER] or REFERENCE_ADAPTER in model.peft_config:
        raise ConfigError(
            f"the policy has the adapters {', '.join(model.peft_config)}, of which "
            f"{', '.join(model.active_adapters)} is active. Activate the one to train, by the name "
            f"of '{ADAPTER}', and leave the name '{REFERENCE_ADAPTER}' to its frozen copy "
            f"(delete_adapter('{REFERENCE_ADAPTER}'))."
        )
    if getattr(model.peft_config[ADAPTER], "alora_invocation_tokens", None) is not None:
        raise ConfigError(
            "the policy's adapter is an activated LoRA (alora_invocation_tokens), which cannot be "
            "merged into its base. Give a plain LoRA adapter."
        )
    weights = {name: p for name, p in model.named_parameters() if ADAPTER in name.split(".")}
    if not all(p.requires_grad for p in weights.values()):
        raise ConfigError(
            "the policy's adapter does not require a gradient. Load it with "
            "PeftModel.from_pretrained(…, is_trainable=True)."
        )
    if _dtype(weights.values()) is not None:
        raise ConfigError(
            "the policy's adapter has bfloat16 weights, in which updates of a small learning rate "
            "are rounded away. Load it with autocast_adapter_dtype=True."
        )
    others = [n for n, p in model.named_parameters() if p.requires_grad and n not in weights]
    if others:
        raise ConfigError(
            f"{len(others)} weights of the policy outside its adapter require a gradient, for "
            f"example {others[0]}: the base is the reference, and must stay as it is. Call "
            "requires_grad_(False) on them."
        )


def _check_reference(
    objects: Mapping[str, nn.Module],
    named: Mapping[str, str],
    dtype: str | None,
    settings: Mapping[str, Any],
) -> None:
    """Refuse a reference that training would change, or that computes in another dtype."""
    reference, policy = objects["reference"], objects.get("policy")
    if settings["quantization"] is not None:
        raise ConfigError(
            "quantization is for models that are loaded by their names, and the reference is a "
            f"{named['reference']}. Remove it, or give the reference's directory or hub id."
        )
    own = _dtype(reference.parameters())
    if own != (None if dtype == "float32" else dtype):
        raise ConfigError(
            f"the reference, a {named['reference']}, has {own or 'float32'} weights and the policy "
            f"{dtype or 'float32'} ones, so that rewards would show the rounding. Load both in the "
            "same dtype."
        )
    if _is_its_base(reference, policy) or (reference is policy and settings["lora"] is not None):
        return
    if policy is None:
        return
    weights = {id(parameter) for parameter in policy.parameters()}
    if any(id(parameter) in weights for parameter in reference.parameters()):
        raise ConfigError(
            "the reference shares weights with the policy, and would change with it. Remove "
            "reference: without it, the reference is the policy as it is before training."
        )


def _is_its_base(reference: Any, policy: Any) -> bool:
    """Whether a reference is the very model that the policy's adapter adapts."""
    return isinstance(policy, PeftModel) and reference is policy.get_base_model()


def _check_cache(settings: Mapping[str, Any], name: str) -> None:
    if settings["reference_cache"] is not None:
        raise ConfigError(
            f"reference_cache keeps log-probs by the files of the reference, and that is a {name}. "
            "Remove it, or give the reference's directory or hub id."
        )
