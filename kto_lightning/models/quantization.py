"""Four-bit quantization of a frozen base, to train an adapter on (QLoRA, arXiv:2305.14314)."""

import importlib.util
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from kto_lightning.errors import ConfigError

Quantization = Literal["4bit"]


def check_quantization(quantization: Quantization | None, *, frozen_base: bool) -> None:
    """Check, before any model is loaded, that quantization is possible in this run.

    Args:
        frozen_base: whether an adapter is trained, not the weights themselves.

    Raises:
        ConfigError: if the weights themselves are trained, or a package or CUDA is missing.
    """
    if quantization is None:
        return
    if quantization != "4bit":
        raise ConfigError(f"--model.quantization must be 4bit or null, got {quantization}.")
    if not frozen_base:
        raise ConfigError(
            "--model.quantization 4bit is for a frozen base: weights of four bits cannot be "
            "trained. Add --model.lora, or remove --model.quantization."
        )
    for package in ("bitsandbytes", "accelerate"):
        if not _is_installed(package):
            raise ConfigError(
                f"--model.quantization 4bit needs {package}, which is not installed. "
                "`pip install 'kto-lightning[qlora]'`, or use --model.dtype bfloat16."
            )
    # bitsandbytes 0.50 has layers for CPUs, but with AVX-512 one forward in eval mode converts them
    # to an inference format that has no backward.
    if not torch.cuda.is_available():
        raise ConfigError(
            "--model.quantization 4bit needs a CUDA device, and there is none here. "
            "Use --model.dtype bfloat16."
        )


def loading_options(quantization: Quantization | None, dtype: torch.dtype) -> dict[str, Any]:
    """Options of `from_pretrained` for four bits: NormalFloat4 with double quantization.

    transformers does not quantize embeddings, norms and head, and the log-prob kernel needs the
    head's weight as it is.

    Args:
        dtype: of the weights that are not quantized, and of the products with those that are.
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


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether a transformers model has four-bit weights."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # in sys.modules without a spec: a test's or a shim's replacement
        return False
