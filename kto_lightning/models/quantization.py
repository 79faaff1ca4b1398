"""A frozen base in four bits, for adapters on it (QLoRA, arXiv:2305.14314)."""

import importlib.util
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig

from kto_lightning.errors import ConfigError

Quantization = Literal["4bit"]


def check_quantization(quantization: Quantization | None, *, frozen_base: bool) -> None:
    """Refuse what could not be run, before any model is loaded.

    Raises:
        ConfigError: if the weights themselves are to be trained, or a package is missing.
    """
    if quantization is None:
        return
    if quantization != "4bit":
        raise ConfigError(f"--model.quantization must be 4bit or null, got {quantization}.")
    if not frozen_base:
        raise ConfigError(
            "--model.quantization 4bit is for a frozen base: weights of four bits cannot be "
            "trained. Add --model.lora, or leave --model.quantization out."
        )
    for package in ("bitsandbytes", "accelerate"):
        if not _is_installed(package):
            raise ConfigError(
                f"--model.quantization 4bit needs {package}, which is not installed. "
                "`pip install 'kto-lightning[qlora]'`, or use --model.dtype bfloat16."
            )
    # bitsandbytes 0.50 has layers for CPUs, but after one forward in evaluation mode those with
    # AVX-512 go on in a format that gives no gradient.
    if not torch.cuda.is_available():
        raise ConfigError(
            "--model.quantization 4bit needs a CUDA device, and there is none here. "
            "Use --model.dtype bfloat16."
        )


def loading_options(quantization: Quantization | None, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` takes to load in four bits: NormalFloat4, its scales quantized too.

    Embeddings, norms and head are not quantized: transformers leaves them as they are, and the
    log-prob kernel multiplies with the head's own weight.

    Args:
        dtype: of what is not quantized, and of the products with what is.
    """
    if quantization is None:
        return {}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config}


def is_quantized(model: Any) -> bool:
    """Whether a transformers model holds weights of four bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # taken out of sys.modules by a test or a shim
        return False
