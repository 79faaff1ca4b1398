"""A tiny half-trained language model: half of its demonstrations are right, half are wrong.

Plain next-token training on fresh examples each step, loss on completions only.
"""

import random
from collections.abc import Callable

import torch
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kto_lightning.demo.task import Problem, demonstrate, draw_problems

NUM_STEPS = 400
BATCH_SIZE = 128
PEAK_LEARNING_RATE = 3e-3
NUM_WARMUP_STEPS = 30
GOOD_SHARE = 0.52
"""A little above a half, as some right demonstrations are learnt with errors."""
IGNORED = -100
PAD_TOKEN, EOS_TOKEN = "<pad>", "<eos>"
PAD_ID, EOS_ID = 0, 1
"""The trainer of the tokenizer numbers special tokens first, in this order."""


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens, trained on `texts`: common words are one token, and so are
    single letters."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[PAD_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD_TOKEN, eos_token=EOS_TOKEN, padding_side="left"
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of half a million parameters with random weights (torch's global seed)."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=EOS_ID,
            pad_token_id=PAD_ID,
        )
    )


def encode(
    tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]
) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]]:
    """Token ids of prompt, completion and EOS, padded on the right, and labels, which are -100 for
    prompts and padding."""
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    completions = tokenizer([completion for _, completion in pairs])["input_ids"]
    length = max(len(x) + len(y) + 1 for x, y in zip(prompts, completions, strict=True))
    input_ids = torch.full((len(pairs), length), PAD_ID)
    labels = torch.full((len(pairs), length), IGNORED)
    for row, (x, y) in enumerate(zip(prompts, completions, strict=True)):
        end = len(x) + len(y) + 1
        input_ids[row, :end] = torch.tensor([*x, *y, EOS_ID])
        labels[row, len(x) : end] = input_ids[row, len(x) : end]
    return input_ids, labels


def learning_rate(step: int, num_steps: int = NUM_STEPS) -> float:
    """Linear warm-up and linear decay to 0; `step` counts from 0."""
    warm = min(1.0, (step + 1) / NUM_WARMUP_STEPS)
    return PEAK_LEARNING_RATE * warm * (1 - step / num_steps)


def pretrain(
    rng: random.Random,
    held_out: list[Problem],
    device: torch.device,
    report: Callable[[int, float], None],
    num_steps: int = NUM_STEPS,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train a model that gives good answers about half of the time, and its tokenizer.

    Args:
        held_out: problems whose solutions are excluded from training.
        report: called with the number of each completed step, from 1, and its loss.
    """
    exclude = frozenset(problem.solution for problem in held_out)

    def draw_pairs(count: int) -> list[tuple[str, str]]:
        problems = draw_problems(rng, count, exclude)
        return [(problem.prompt, demonstrate(problem, rng, GOOD_SHARE)) for problem in problems]

    tokenizer = make_tokenizer([prompt + completion for prompt, completion in draw_pairs(2000)])
    model = make_model(tokenizer)
    torch.nn.Module.to(model, device)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    for step in range(num_steps):
        input_ids, labels = (ids.to(device) for ids in encode(tokenizer, draw_pairs(BATCH_SIZE)))
        logits = model(input_ids=input_ids[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.param_groups[0]["lr"] = learning_rate(step, num_steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        report(step + 1, loss.item())
    return model.eval(), tokenizer
