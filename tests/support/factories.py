"""Tiny tokenizers, models and records, generated: no test needs a network or a file.

The models are small but not degenerate: weights are drawn with a standard deviation of 0.2, so that
attention is far from uniform and distributions are peaked, and biases and norm weights, which every
library initialises to 0 or 1, are perturbed too, so that a test finds code that forgets one.
"""

import json
import re
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from tests.support.families import FAMILIES

PAD_TOKEN, EOS_TOKEN, BOS_TOKEN = "<|pad|>", "<|endoftext|>", "<|begin|>"
PAD_ID, EOS_ID, BOS_ID = 0, 1, 2
"""Ids of these tokens in every tokenizer and every model's configuration."""

_CONTROL_TOKEN = re.compile(r"<[|\uff5c][^<>|\uff5c\s{}]+[|\uff5c]>|<(?:start|end)_of_turn>")
"""Control tokens in a template, which are never split (DeepSeek's have full-width bars, U+FF5C)."""

_WORDS = """
the a my your this that every some small large quiet green early heavy river garden winter letter
bridge teacher engine island question answer reason market kitchen window mountain was is makes
finds breaks carries follows forgets explains measures writes 12 7 3.5 2024 slowly again today
because although, however, without between under over and or not né ß 你好
""".split()  # noqa: SIM905 - sixty quoted words would fill the page

_LAYERS = 2
_GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "output_router_logits": True}
# Shorter than the tests' sequences: a window of 4096, the usual default, would test nothing.
_WINDOW: dict[str, Any] = {"sliding_window": 16}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2": _COMMON | _GROUPED | {"tie_word_embeddings": True},
    "qwen3": _COMMON | _GROUPED | {"head_dim": 16, "tie_word_embeddings": True},
    "llama": _COMMON | _GROUPED,
    "mistral": _COMMON | _GROUPED | _WINDOW,
    "gpt2": {
        "n_embd": 32,
        "n_layer": _LAYERS,
        "n_head": 4,
        "n_positions": 2048,
        "initializer_range": 0.2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "gpt_neox": _COMMON,
    "phi3": _COMMON | _GROUPED | {"original_max_position_embeddings": 2048},
    "olmo2": _COMMON | _GROUPED,
    "granite": _COMMON
    | _GROUPED
    | {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.25,
        "tie_word_embeddings": True,
    },
    "smollm3": _COMMON | _GROUPED | {"no_rope_layer_interval": 2},
    "gemma2": _COMMON
    | _GROUPED
    | _WINDOW
    | {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        # Low enough to bend what these small models produce.
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": _COMMON
    | _GROUPED
    | _WINDOW
    | {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen2_moe": _COMMON
    | _GROUPED
    | _EXPERTS
    | {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32},
    "cohere": _COMMON | _GROUPED | {"logit_scale": 0.25},
    "bloom": {"hidden_size": 32, "n_layer": _LAYERS, "n_head": 4, "initializer_range": 0.2},
    "mamba": {
        "hidden_size": 32,
        "num_hidden_layers": _LAYERS,
        "state_size": 8,
        "initializer_range": 0.2,
    },
    "falcon": {
        "hidden_size": 32,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
        "alibi": True,
    },
    "gpt_oss": _COMMON | _GROUPED | _EXPERTS | _WINDOW | {"head_dim": 8, "num_local_experts": 4},
}
"""Configurations that `make_model` can build. Dropout is 0; a test of dropout overrides it."""


def trl_chat_template(name: str) -> str:
    """A real chat template that the trl package carries: qwen2_5, qwen3, llama3, gemma, phi3, …"""
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def make_tokenizer(
    texts: list[str] | None = None,
    *,
    vocab_size: int = 512,
    chat_template: str | None = None,
    bos: bool = False,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with padding and end-of-text tokens.

    Args:
        texts: what its merges are learned from; built-in records where None.
        vocab_size: the most ids it has, all special tokens included; bytes take 256 of them.
        chat_template: the name of a template in the trl package, or a template itself. The control
            tokens it writes become tokens that are never split.
        bos: whether `tokenizer(text)` begins with a begin-of-text token.
    """
    template = _template_text(chat_template)
    control = sorted(set(_CONTROL_TOKEN.findall(template or "")))
    special = list(dict.fromkeys([PAD_TOKEN, EOS_TOKEN, BOS_TOKEN, *control]))
    if texts is None:
        texts = [record["prompt"] + record["completion"] for record in plain_records(200)]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    named = {"pad_token": PAD_TOKEN, "eos_token": EOS_TOKEN}
    if bos:
        named["bos_token"] = BOS_TOKEN
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS_TOKEN} $A", special_tokens=[(BOS_TOKEN, BOS_ID)]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.chat_template = template
    return tokenizer


def make_model(
    architecture: str, *, vocab_size: int, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """A float32 model of two layers in evaluation mode, the same for the same arguments.

    Args:
        architecture: a key of `ARCHITECTURES` or `FAMILIES`, which is transformers' `model_type`.
        vocab_size: at least the tokenizer's size.
        seed: decides every weight, without touching the caller's random state.
        overrides: fields of the configuration.
    """
    settings = (ARCHITECTURES | FAMILIES)[architecture] | {
        "vocab_size": vocab_size,
        "pad_token_id": PAD_ID,
        "eos_token_id": EOS_ID,
        "bos_token_id": BOS_ID,
    }
    config = AutoConfig.for_model(architecture, **(settings | overrides))
    return random_model(AutoModelForCausalLM, config, seed)


def random_model(auto_class: Any, config: Any, seed: int) -> Any:
    """A float32 model in eval mode; biases and norms are drawn too, which start at 0 or 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto_class.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def save_model(
    directory: Path | str,
    architecture: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """A Hugging Face directory with model and tokenizer, for `from_pretrained` of either."""
    model = make_model(architecture, vocab_size=len(tokenizer), seed=seed, **overrides)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)


def add_adapter(model: Any, **settings: Any) -> Any:
    """A LoRA adapter far from zero, the same for the same settings.

    Args:
        model: takes the adapter in place.
        settings: fields of `LoraConfig`.
    """
    config = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return get_peft_model(model, LoraConfig(init_lora_weights=False, **(config | settings)))


def save_adapter(directory: Path, model_dir: Path) -> Path:
    """Save a LoRA adapter far from zero, so that its base alone is another model."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        init_lora_weights=False,
        fan_in_fan_out=model.config.model_type == "gpt2",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        get_peft_model(model, config).save_pretrained(str(directory))
    return directory


def plain_records(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """`n` records of plain text; about one prompt in eight repeats an earlier one."""
    random = Random(seed)
    prompts: list[str] = []
    records = []
    for _ in range(n):
        prompts.append(_repeat_or_new(prompts, random, lambda: f"Question: {_sentence(random)}\n"))
        records.append(
            {
                "prompt": prompts[-1],
                "completion": f"Answer: {_sentence(random)}",
                "label": random.random() < 0.6,
            }
        )
    return records


def chat_records(n: int, seed: int = 0, *, system: bool = False) -> list[dict[str, Any]]:
    """`n` conversations of one or two user turns, the answer as completion; some prompts repeat.

    Args:
        n: how many.
        seed: decides everything in them.
        system: whether they open with a system message, which not every template takes.
    """
    random = Random(seed)
    prompts: list[list[dict[str, Any]]] = []

    def new_prompt() -> list[dict[str, Any]]:
        turns = [_message("system", random)] if system else []
        if random.random() < 0.4:
            turns += [_message("user", random), _message("assistant", random)]
        return [*turns, _message("user", random)]

    records = []
    for _ in range(n):
        prompts.append(_repeat_or_new(prompts, random, new_prompt))
        records.append(
            {
                "prompt": prompts[-1],
                "completion": [_message("assistant", random)],
                "label": random.random() < 0.5,
            }
        )
    return records


def tool_records(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """`n` conversations with a `tools` column; every other completion is a call without content."""
    random = Random(seed)
    tools = [_tool("search", "query", "string"), _tool("measure", "length", "number")]
    records = []
    for i in range(n):
        name, argument = random.choice([("search", "query"), ("measure", "length")])
        value = _sentence(random) if argument == "query" else random.random()
        call = {"type": "function", "function": {"name": name, "arguments": {argument: value}}}
        prompt = [_message("user", random)]
        if i % 3 == 2:
            prompt += [
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "name": name, "content": _sentence(random)},
            ]
        answer = _message("assistant", random)
        if i % 2 == 0:
            answer = {"role": "assistant", "content": None, "tool_calls": [call]}
        records.append(
            {
                "prompt": prompt,
                "completion": [answer],
                "label": random.random() < 0.5,
                "tools": tools,
            }
        )
    return records


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    """Write one record per line, in UTF-8; returns the path."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _template_text(name_or_text: str | None) -> str | None:
    if name_or_text is None or "{" in name_or_text:
        return name_or_text
    return trl_chat_template(name_or_text)


def _sentence(random: Random) -> str:
    # Skewed lengths, as in real feedback: most are short, a few are many times longer.
    num_words = 2 + int(random.expovariate(1 / 10))
    return " ".join(random.choices(_WORDS, k=min(num_words, 60)))


def _message(role: str, random: Random) -> dict[str, Any]:
    return {"role": role, "content": _sentence(random)}


def _repeat_or_new(seen: list, random: Random, new: Any) -> Any:
    return random.choice(seen) if seen and random.random() < 1 / 8 else new()


def _tool(name: str, argument: str, kind: str) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name} something",
            "parameters": {
                "type": "object",
                "properties": {argument: {"type": kind, "description": "what to use"}},
                "required": [argument],
            },
        },
    }
