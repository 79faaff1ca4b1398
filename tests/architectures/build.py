"""Tiny models of every architecture of the installed transformers, saved as on a hub.

A family is named by its model type: `llama` is the language model, `llava@image` the image-text
model, and `llama+dynamic` a variant.
"""

import re
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tests.architectures.settings import SETTINGS
from tests.architectures.shrink import VOCABULARY, shrink
from tests.architectures.variants import VARIANTS
from tests.support.factories import make_tokenizer

IMAGE = "@image"
_MOST_PARAMETERS = 30_000_000
_STANDARD_DEVIATION = 0.2
_USUAL_DEVIATIONS = (0.1, 0.6)
_SMALL_BY_NATURE = re.compile(r"A_log|dt_bias|conv1d|conv\.")
"""Weights whose size decides how far a state reaches."""


def families() -> list[str]:
    """The names of all families."""
    image = [name + IMAGE for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]
    variants = [name for name in VARIANTS if name.partition("+")[0] in CONFIG_MAPPING]
    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *image, *variants]


def make_config(family: str) -> Any:
    """A tiny configuration."""
    model_type = family.partition("+")[0].removesuffix(IMAGE)
    settings = SETTINGS
    if family in VARIANTS:
        settings = settings | {model_type: settings.get(model_type, {}) | VARIANTS[family]}
    default = CONFIG_MAPPING[model_type]()
    config = shrink(default, settings)
    if getattr(default, "vision_config", True) is None:  # Gemma 4's: none unless it is given
        classes = vars(sys.modules[type(default).__module__])
        vision = next(c for n, c in classes.items() if n.endswith("VisionConfig"))
        fields = {"position_embedding_size": 64, "pooling_kernel_size": 1}
        config.vision_config = shrink(vision(), {vision.model_type: fields})
    return config


def make_family(family: str, *, seed: int = 0) -> PreTrainedModel:
    """A float32 model in evaluation mode.

    Raises:
        Exception: of any kind, where transformers cannot build it.
    """
    auto = AutoModelForImageTextToText if IMAGE in family else AutoModelForCausalLM
    config = make_config(family)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32)
        size = sum(parameter.numel() for parameter in model.parameters())
        if size > _MOST_PARAMETERS:
            raise ValueError(f"it has {size:,} parameters at the smallest")
        _disturb(model)
    return model.eval()


@torch.no_grad()
def _disturb(model: PreTrainedModel) -> None:
    """Weights far from 0, and no bias 0 and no norm 1, so that code that forgets one is found."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn_like(parameter)
        if parameter.ndim <= 1 or _SMALL_BY_NATURE.search(name):
            parameter += 0.1 * noise
        elif not _USUAL_DEVIATIONS[0] <= float(parameter.std()) <= _USUAL_DEVIATIONS[1]:
            parameter.copy_(_STANDARD_DEVIATION * noise)


def save_family(directory: Path, family: str, *, seed: int = 0) -> Path:
    """A model directory with a tokenizer."""
    make_family(family, seed=seed).save_pretrained(directory)
    make_tokenizer(vocab_size=VOCABULARY).save_pretrained(directory)
    return directory
