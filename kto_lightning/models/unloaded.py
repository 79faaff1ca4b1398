"""Weights beside a model that its class in transformers does not load, such as Qwen3.5's layers for
predicting several tokens: an export would lose them."""

import json
import re
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from kto_lightning.errors import ModelError
from kto_lightning.models.config_checks import tensor_shapes
from kto_lightning.models.model_files import weight_directories

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def copy_unloaded(model: PreTrainedModel, target: Path) -> None:
    """Copy what the class of an image-text model leaves out of its files on purpose, unchanged.

    Args:
        model: of which `target` holds the saved weights.
        target: a directory that `save_pretrained` wrote.
    """
    origin, patterns = model.config._name_or_path, model._keys_to_ignore_on_load_unexpected
    if not origin or not patterns or model.config.get_text_config() is model.config:
        return
    try:
        (source,) = weight_directories(origin)
    except ModelError:  # of a model in memory, from a place that is no longer there
        return
    written = {path: set(tensor_shapes(path)) for path in sorted(target.glob("*.safetensors"))}
    known = set().union(*written.values())
    unloaded = {}
    for path in sorted(source.glob("*.safetensors")):
        names = [n for n in tensor_shapes(path) if any(re.search(p, n) for p in patterns)]
        with safe_open(path, "pt") as file:
            unloaded |= {name: file.get_tensor(name) for name in names if name not in known}
    if not unloaded:
        return
    if (target / _SINGLE).exists():
        names = written.pop(target / _SINGLE)
        written[(target / _SINGLE).rename(target / "model-00001-of-00002.safetensors")] = names
    rest = target / (
        "model-00002-of-00002.safetensors" if len(written) == 1 else "model-rest.safetensors"
    )
    save_file(unloaded, rest, metadata={"format": "pt"})
    written[rest] = set(unloaded)
    places = {name: path.name for path, names in written.items() for name in names}
    index = {"metadata": {}, "weight_map": dict(sorted(places.items()))}
    (target / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
