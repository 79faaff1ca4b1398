"""Safetensors files of a model whose tensors come one after the other."""

import json
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

MAX_FILE_SIZE = 5 * 10**9
"""Bytes of a file's tensors; a single larger tensor has a file of its own."""
_PATTERN = "model{suffix}.safetensors"


class SafetensorsFiles:
    """Files as `save_pretrained` writes them. A file is written as soon as its tensors are all
    there, so that little more than one file's tensors are held at a time.

    Args:
        directory: to write to.
        expected: all tensors that will come, on any device: names, shapes and types.
        num_parameters: of the model, for the index.
    """

    def __init__(self, directory: Path, expected: dict[str, Tensor], num_parameters: int) -> None:
        self._directory = directory
        self._num_parameters = num_parameters
        self._split = split_torch_state_dict_into_shards(
            expected, filename_pattern=_PATTERN, max_shard_size=MAX_FILE_SIZE
        )
        self._missing = {
            name: set(tensors) for name, tensors in self._split.filename_to_tensors.items()
        }
        self._held: dict[str, dict[str, Tensor]] = {name: {} for name in self._missing}

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Take tensors on the CPU, each once, and write the files that are complete with them."""
        for name, tensor in tensors.items():
            file = self._split.tensor_to_filename[name]
            self._missing[file].remove(name)
            self._held[file][name] = tensor.contiguous()
        for file, missing in self._missing.items():
            if not missing and file in self._held:
                save_file(self._held.pop(file), self._directory / file, metadata={"format": "pt"})

    def close(self) -> None:
        """Write the index, if there are several files."""
        assert not self._held, f"tensors that never came: {sorted(self._held)}"
        if not self._split.is_sharded:
            return
        index = {
            "metadata": {"total_parameters": self._num_parameters, **self._split.metadata},
            "weight_map": self._split.tensor_to_filename,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self._directory / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
