"""Inputs of the benchmarks: records (given or generated), and a tokenizer and model for them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

PAD_TOKEN, EOS_TOKEN = "<|endoftext|>", "<|im_end|>"
SPECIAL_TOKENS = [PAD_TOKEN, EOS_TOKEN, "<|im_start|>"]
CHAT_TEMPLATE = "qwen2_5"
WORDS = 3000
"""Different words in generated records; the frequent ones become tokens."""
TOKENIZER_VOCABULARY = 8192
"""At most: larger ones make every word of a few hundred records a token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The dimensions of a Qwen2 model."""

    hidden_size: int = 256
    intermediate_size: int = 768
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    vocabulary: int = 8192
    tied: bool = True
    """Whether the head and the embedding share their weight."""


SHAPES = {
    "small": Shape(),
    "smollm2-135m": Shape(
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        vocabulary=49152,
    ),
    "qwen2.5-0.5b": Shape(
        hidden_size=896,
        intermediate_size=4864,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        vocabulary=151936,
    ),
    "qwen2.5-1.5b": Shape(
        hidden_size=1536,
        intermediate_size=8960,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        vocabulary=151936,
    ),
    "qwen2.5-7b": Shape(
        hidden_size=3584,
        intermediate_size=18944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        vocabulary=152064,
        tied=False,
    ),
}
"""Shapes of published models, from their configs, and a small one for a CPU."""


def read_jsonl(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The first `limit` records of a file, or all."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for _, line in zip(range(limit or 2**62), file, strict=False)]


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    """Write one record per line; returns the path."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def made_records(
    num_records: int, *, words: int, prompt_share: float, seed: int = 0
) -> list[dict[str, Any]]:
    """Generated plain records of `words` words on average, with exponential lengths."""
    random = Random(seed)
    vocabulary = ["".join(random.choices("abcdefghij", k=6)) for _ in range(WORDS)]

    def text(mean: float) -> str:
        count = 2 + int(random.expovariate(1 / mean))
        # Squared, so that a word's frequency falls with its rank, as in natural text.
        return " ".join(vocabulary[int(random.random() ** 2 * WORDS)] for _ in range(count))

    return [
        {
            "prompt": text(words * prompt_share) + "\n",
            "completion": text(words * (1 - prompt_share)),
            "label": random.random() < 0.6,
        }
        for _ in range(num_records)
    ]


def texts(value: Any) -> Iterator[str]:
    """All strings in a record, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)


def make_config(shape: Shape, **settings: Any) -> PreTrainedConfig:
    """The config of a shape; `settings` are added."""
    return AutoConfig.for_model(
        "qwen2",
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        **settings,
    )


def make_model(
    shape: Shape, device: str = "cpu", *, dtype: torch.dtype = torch.float32, **settings: Any
) -> PreTrainedModel:
    """A model with random weights; `settings` are added to its config."""
    config = make_config(shape, **settings)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def save_model(
    directory: Path,
    records: list[dict[str, Any]],
    shape: Shape,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    adapter: Path | None = None,
) -> Path:
    """Save a model with random weights and a tokenizer trained on `records`; returns the directory.

    Args:
        dtype: of the saved weights.
        device: where the weights are drawn; billions take minutes on a CPU.
        adapter: a directory for a LoRA adapter of rank 16 on every linear layer; None: no adapter.
    """
    tokens = save_tokenizer(directory, records, shape.vocabulary)
    model = make_model(shape, device, dtype=dtype, **tokens)
    model.save_pretrained(directory)
    if adapter is not None:
        settings = LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model.name_or_path = str(directory)  # saved in the adapter's config
        get_peft_model(model, settings).save_pretrained(str(adapter))
    return directory


def save_tokenizer(
    directory: Path, records: list[dict[str, Any]], vocabulary: int
) -> dict[str, Any]:
    """Save a tokenizer trained on `records`; returns its tokens that a model's config names."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, TOKENIZER_VOCABULARY),
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts(records), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD_TOKEN, eos_token=EOS_TOKEN
    )
    template = files("trl") / "chat_templates" / f"{CHAT_TEMPLATE}.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    tokenizer.save_pretrained(directory)
    return {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
