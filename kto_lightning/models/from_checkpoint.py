"""The policy of a checkpoint, to be exported without holding the whole model.

Where the checkpoint has all that is exported, the policy is built without values. Its base is
loaded only for what the checkpoint lacks: frozen weights, such as those of a vision tower or those
that an adapter is merged into.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from kto_lightning.errors import ConfigError, ModelError
from kto_lightning.models.adapters import check_adapter
from kto_lightning.models.architecture import language_model
from kto_lightning.models.loading import load_adapter, load_causal_lm, load_model
from kto_lightning.models.lora import ADAPTER, LoRA
from kto_lightning.models.lora_layers import add_adapter
from kto_lightning.models.merging import adapted_layers
from kto_lightning.models.model_files import adapter_base as base_of
from kto_lightning.models.model_files import explain_missing_base, is_adapter
from kto_lightning.models.policy import Policy
from kto_lightning.models.settings import DTYPES
from kto_lightning.models.weights import check_weights_fit
from kto_lightning.sharded_checkpoint import ShardedHeader, read_tensors

_PREFIX = "policy."
"""What the names of the policy's tensors in a checkpoint begin with."""


def load_policy_from_checkpoint(
    checkpoint: dict[str, Any],
    *,
    trust_remote_code: bool,
    adapter_base: str | None = None,
    merges: bool = False,
) -> Policy:
    """Build the policy as before training. `read_values` gives the values of its tensors.

    Args:
        checkpoint: its `state_dict`, and its `kto` as `policy_origin` makes it.
        trust_remote_code: run code that comes with the model. What the checkpoint says of this
            does not count: a file must not decide what code runs.
        adapter_base: of a policy that was an adapter; None: the base it was trained on.
        merges: whether an adapter will be merged into its base, which is loaded then.

    Raises:
        ConfigError: if the checkpoint does not hold the weights of its policy.
        ModelError: if that policy cannot be loaded.
    """
    origin = checkpoint["kto"]
    options: dict[str, Any] = {
        "dtype": DTYPES[origin["dtype"] or "float32"],
        "trust_remote_code": trust_remote_code,
        "given_base": adapter_base or origin.get("adapter_base"),
    }
    lora = LoRA(**origin["lora"]) if origin["lora"] else None
    policy = None if merges else _without_values(checkpoint, lora, **options)
    if policy is None:
        loaded = load_model(origin["policy"], lora=lora, **options)
        policy = Policy(loaded.model, route="padded")
    check_weights_fit(checkpoint, nn.ModuleDict({"policy": policy}))
    return policy


def read_values(checkpoint: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The values of a policy's tensors: the checkpoint's, or their own where it has none.

    Args:
        checkpoint: one that is whole, or the header of a sharded one.
        tensors: by their names in the state dict of the policy, which give the types.
    """
    saved, values = checkpoint["state_dict"], {}
    for name, tensor in tensors.items():
        value = saved.get(_PREFIX + name, tensor).detach()
        values[name] = torch.empty_like(value, device="cpu") if value.is_meta else value.cpu()
    if isinstance(checkpoint, ShardedHeader):
        found = {name: value for name, value in values.items() if _PREFIX + name in saved}
        read_tensors(
            checkpoint.path, {f"state_dict.{_PREFIX}{name}": v for name, v in found.items()}
        )
    return {name: value.to(tensors[name].dtype) for name, value in values.items()}


def _without_values(
    checkpoint: dict[str, Any],
    lora: LoRA | None,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool,
    given_base: str | None,
) -> Policy | None:
    """The policy on the device `meta`; None: the checkpoint lacks some of what is exported."""
    name, saved = checkpoint["kto"]["policy"], checkpoint["state_dict"]
    load = partial(load_causal_lm, dtype=dtype, trust_remote_code=trust_remote_code, on_meta=True)
    if is_adapter(name):
        base = base_of(name, given_base)
        check_adapter(name)
        with explain_missing_base(name, base):
            model: nn.Module | None = load_adapter(load(base), name, base)
    elif lora is not None:
        model = _adapted(partial(load, name), lora, saved)
    else:
        model = load(name)
    if model is None:
        return None
    policy = Policy(model, route="padded")
    exported = policy.state_dict()
    if hasattr(model, "peft_config"):
        exported = [name for name in exported if ADAPTER in name.split(".")]
    return policy if all(_PREFIX + name in saved for name in exported) else None


def _adapted(
    load: Callable[[], PreTrainedModel], lora: LoRA, saved: dict[str, Any]
) -> nn.Module | None:
    """A model without values that has the adapters of a checkpoint; None: some of its language
    model have no gradient, and are not in the checkpoint.

    A new adapter leaves out what text does not reach, such as a vision tower, which only a model
    with values can tell. So adapters are first added wherever the settings allow, and then only
    where the checkpoint has them.
    """
    try:
        model = add_adapter(load(), lora)
        absent = _absent_adapters(model, saved)
        if not absent:
            return model
        base = load()
        texts = set(language_model(base).modules())
        within = {name for name, module in base.named_modules() if module in texts}
        return None if absent & within else add_adapter(base, lora, unreached=absent)
    except (ConfigError, ModelError):  # a layer that cannot be adapted, and text does not reach it
        return None


def _absent_adapters(model: nn.Module, saved: dict[str, Any]) -> set[str]:
    """The names of the layers of a `PeftModel`'s base whose adapter a checkpoint does not have."""
    assert isinstance(model, PeftModel)
    base: Any = model.get_base_model()
    prefix = f"{_PREFIX}model.base_model.model."
    adapted = {name for name in saved if ADAPTER in name.split(".")}
    return {
        name
        for name in adapted_layers(base)
        if not any(other.startswith(f"{prefix}{name}.") for other in adapted)
    }
