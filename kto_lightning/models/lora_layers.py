"""Adding a new adapter to the layers of a model that it can be added to."""

import copy
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import peft.tuners.tuners_utils
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kto_lightning.errors import ConfigError, ModelError
from kto_lightning.models.loading_errors import first_line
from kto_lightning.models.lora import ADAPTER, ALL_LINEAR, LoRA

_QUANTIZERS = ("bitsandbytes.", "transformers.integrations.")
"""Modules whose linear layers peft adapts without their own forward being a plain product."""
_IGNORED = (
    *("no module was matched", "no parameter was matched", "no modules were excluded"),
    *("were ignored", "will be ignored"),
)
"""Of warnings in which peft says that a setting has no effect."""


def add_adapter(
    model: PreTrainedModel, lora: LoRA, *, unreached: Collection[str] = ()
) -> nn.Module:
    """Add a new adapter to a model, in training mode.

    Args:
        model: changed in place.
        lora: the adapter's settings.
        unreached: modules that get no gradient, which are left out.

    Raises:
        ModelError: if the model has no such modules, or an update cannot be added to what they
            give.
        ConfigError: if settings contradict each other, or have no effect on this model.
    """
    _check_names(model, lora)
    try:
        config = _config(lora, model, set(unreached))
    except (ValueError, TypeError, re.error) as error:
        raise ConfigError(f"--model.lora: {first_line(error)}") from error
    try:
        with warnings.catch_warnings():
            for said in _IGNORED:
                warnings.filterwarnings("error", message=f"(?s).*{said}")
            with expected_warnings_ignored():
                adapted = get_peft_model(model, config)
    except (ValueError, NotImplementedError, re.error) as error:
        raise ModelError(
            f"--model.lora.target_modules {lora.target_modules}: {first_line(error)}"
        ) from error
    except (UserWarning, RuntimeWarning) as error:
        raise ConfigError(f"--model.lora: {first_line(error)}") from error
    return adapted.train()


def _config(lora: LoRA, model: PreTrainedModel, unreached: set[str]) -> LoraConfig:
    settings = lora.settings()
    layers, layers_pattern = (
        settings.pop(f"layers_{name}", None) for name in ("to_transform", "pattern")
    )
    config = LoraConfig(
        lora_alpha=settings.pop("alpha"),
        lora_dropout=settings.pop("dropout"),
        task_type="CAUSAL_LM",
        target_modules=_names(settings.pop("target_modules")),
        exclude_modules=_names(settings.pop("exclude_modules", None)),
        **settings,
    )
    obstacles = {n: why for n, why in _obstacles(model, config).items() if n not in unreached}
    if config.target_modules == ALL_LINEAR:
        skipped = obstacles.keys() | (_linear_layers(model) & unreached)
    else:
        skipped = {name for name in unreached if check_target_module_exists(config, name)}
        for name, obstacle in obstacles.items():
            if check_target_module_exists(config, name):
                raise ModelError(
                    f"--model.lora.target_modules {lora.target_modules}: {name} {obstacle}."
                )
    config.exclude_modules = _either(config.exclude_modules, sorted(skipped))
    if layers is not None:
        if config.target_modules == ALL_LINEAR:  # peft takes no layers beside a text
            config.target_modules = sorted({n.rpartition(".")[2] for n in _linear_layers(model)})
        elif isinstance(config.target_modules, str):
            raise ConfigError(
                "--model.lora.layers_to_transform is for names in --model.lora.target_modules, "
                f"not for a pattern such as {config.target_modules}. Put the layers into it."
            )
        config.layers_to_transform, config.layers_pattern = layers, layers_pattern
    elif layers_pattern is not None:
        raise ConfigError("--model.lora.layers_pattern needs --model.lora.layers_to_transform.")
    return config


def _check_names(model: PreTrainedModel, lora: LoRA) -> None:
    """Refuse what peft would leave out without a word."""
    names = [name for name, _ in model.named_modules()]
    for saved in lora.modules_to_save or ():
        if not any(name == saved or name.endswith(f".{saved}") for name in names):
            raise ModelError(
                f"--model.lora.modules_to_save: {type(model).__name__} has no module {saved}."
            )
    if lora.modules_to_save and {p.dtype for p in model.parameters()} != {torch.float32}:
        raise ConfigError(
            "--model.lora.modules_to_save trains weights of the base, and in a base that is not "
            "float32 small updates of them are rounded away. Remove --model.dtype or "
            "--model.quantization, or modules_to_save."
        )
    parameters = [name for name, _ in model.named_parameters()]
    for target in lora.target_parameters or ():
        if not any(name == target or name.endswith(f".{target}") for name in parameters):
            raise ModelError(
                f"--model.lora.target_parameters: {type(model).__name__} has no parameter {target}."
            )
    layers = lora.layers_to_transform
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)  # BLT has several
    for layer in [layers] if isinstance(layers, int) else layers or ():
        if count is not None and not 0 <= layer < count:
            raise ConfigError(
                f"--model.lora.layers_to_transform {layer}: {type(model).__name__} has the layers "
                f"0 to {count - 1}."
            )


def _linear_layers(model: PreTrainedModel) -> set[str]:
    """The names of all linear layers but the head."""
    head = model.get_output_embeddings()
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def _either(given: str | list[str] | set[str] | None, names: list[str]) -> str | list[str] | None:
    """What peft takes for a pattern or names, and these names too."""
    if isinstance(given, str):
        return "|".join([f"(?:{given})", *map(re.escape, names)])
    return [*(given or ()), *names] or None


def left_out(model: nn.Module, unused: Sequence[str] = ()) -> list[str]:
    """The last names of the linear layers that a new adapter leaves out because peft cannot adapt
    them; sorted.

    Args:
        model: the model with the adapter.
        unused: modules within which they do not count.
    """
    if not isinstance(model, PeftModel):
        return []
    config: Any = model.peft_config[ADAPTER]
    excluded = getattr(config, "exclude_modules", None)
    if not excluded or isinstance(excluded, str):
        return []
    base: Any = model.get_base_model()
    within = tuple(f"{name}." for name in unused)
    names = [n for n in _obstacles(base, config) if n in excluded and not n.startswith(within)]
    return sorted({name.rpartition(".")[2] for name in names})


def _names(names: str | list[str] | None) -> str | list[str] | None:
    """One module's name as a list: peft reads a string as a pattern that the whole path must match,
    which a bare name does for a top-level module only."""
    if isinstance(names, str) and names.isidentifier():
        return [names]
    return names


def _obstacles(model: PreTrainedModel, config: LoraConfig) -> dict[str, str]:
    """Why linear layers cannot be adapted, by their names."""
    obstacles = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        kind = type(module).__name__
        if _is_forbidden(config, model, name.rpartition(".")[2]):
            obstacles[name] = "is read by its mixer without being called, so that peft forbids it"
        elif not computes_linear(module):
            obstacles[name] = f"is a {kind}, which gives more than a product with its weight"
    return obstacles


def _is_forbidden(config: LoraConfig, model: PreTrainedModel, name: str) -> bool:
    check = getattr(peft.tuners.tuners_utils, "_check_lora_target_modules_mamba", None)
    if check is None:
        return False
    try:
        check(config, model, name)
    except ValueError:
        return True
    return False


def computes_linear(layer: nn.Linear, *, even_quantized: bool = False) -> bool:
    """Whether a layer gives what `nn.Linear` gives, to which an update can be added: a subclass may
    give a tuple (routers of Llama 4 and PhiMoE) or multiply by groups (DeepSeek-V4).

    Args:
        layer: of any class.
        even_quantized: ask it of a quantizer's layers too, which take an update beside theirs.
    """
    if type(layer).forward is nn.Linear.forward:
        return True
    if type(layer).__module__.startswith(_QUANTIZERS) and not even_quantized:
        return True
    if layer.weight.is_meta or isinstance(layer.weight, DTensor):
        layer = _with_some_values(layer)
    weight = layer.weight
    inputs = torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)[None]
    try:
        with torch.no_grad():
            found = layer(inputs)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    expected = linear(inputs, weight, layer.bias)
    return isinstance(found, Tensor) and torch.equal(found, expected)


def _with_some_values(layer: nn.Linear) -> nn.Linear:
    """A copy on the CPU of a layer without values of its own, or with a shard of them."""
    values: dict[int, Any] = {}
    for parameter in layer.parameters():
        value = torch.linspace(-1, 1, parameter.numel(), dtype=parameter.dtype)
        values[id(parameter)] = nn.Parameter(value.view(parameter.shape), requires_grad=False)
    return copy.deepcopy(layer, values)


@contextmanager
def expected_warnings_ignored() -> Iterator[None]:
    """Suppress peft's warnings about what is taken care of: adapters on tied weights, which are
    untied before they are merged, updates that cannot be merged, missing weights, which are an
    error, and settings that peft chooses itself by the kind of layer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        # Of each bias of an update, it says that a shard of a weight is saved.
        warnings.filterwarnings("ignore", message=r"(?s)Adapter .* invalid shape: .*lora_B\.bias")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings=True")
        warnings.filterwarnings("ignore", message=".*merging LoRA weights won.t be possible")
        warnings.filterwarnings("ignore", message=r".*_pattern keys .*\.gate_up_proj")
        yield
