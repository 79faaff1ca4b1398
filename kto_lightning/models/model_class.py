"""The class that a model is loaded with: the one that it was saved from."""

from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from kto_lightning.errors import ModelError

_AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)


# `Any`: transformers' auto classes share a private base class.
def auto_class(name: str, config: PreTrainedConfig, *, trust_remote_code: bool) -> Any:
    """The auto class that gives the model in `config.architectures` whole.

    `AutoModelForCausalLM` knows most image-text models not at all, and of some gives the language
    model alone, so that an export would lose their other weights.

    Args:
        name: the model's, for the message.
        config: its config.
        trust_remote_code: code that comes with the model may run.

    Raises:
        ModelError: if it is an encoder with a decoder.
    """
    own_code = getattr(config, "auto_map", None) or {}
    if trust_remote_code and AutoModelForCausalLM.__name__ in own_code:
        return AutoModelForCausalLM
    saved_from = set(getattr(config, "architectures", None) or ())
    known = {auto: _class_names(auto, config) for auto in _AUTO_CLASSES}
    whole = [auto for auto, names in known.items() if names & saved_from]
    partly = [auto for auto, names in known.items() if names]
    found = next(iter(whole + partly), AutoModelForCausalLM)
    if found is not AutoModelForCausalLM and config.is_encoder_decoder:
        raise ModelError(
            f"{name} is a {', '.join(sorted(saved_from)) or type(config).__name__}, an encoder "
            "with a decoder. Give a model that continues a text."
        )
    return found


def auto_class_of(model: PreTrainedModel) -> str:
    """The name of the auto class that opens a model once it is saved."""
    name, config = type(model).__name__, model.config
    opens = (auto for auto in _AUTO_CLASSES if name in _class_names(auto, config))
    return next(opens, AutoModelForCausalLM).__name__


def _class_names(auto: Any, config: PreTrainedConfig) -> set[str]:
    """The names of the classes that an auto class has for a config."""
    classes = auto._model_mapping.get(type(config), ())
    return {cls.__name__ for cls in (classes if isinstance(classes, list | tuple) else [classes])}
