"""Sampling of answers, and the share of good ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from kto_lightning.demo.answers import Answer, P
from kto_lightning.models.tokenizer import end_token_ids


@dataclass(kw_only=True, frozen=True, slots=True)
class Sampling:
    """How answers are sampled, from the whole vocabulary."""

    max_new_tokens: int
    temperature: float = 1.0
    """0: the most probable token each time."""
    top_p: float = 1.0
    batch_size: int = 256

    @property
    def settings(self) -> dict[str, Any]:
        """For `generate`."""
        common = {"max_new_tokens": self.max_new_tokens, "top_k": 0}
        if self.temperature == 0:
            return common | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return common | {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}


@dataclass(kw_only=True, frozen=True, slots=True)
class Share:
    """The share of good answers, with its 95% interval."""

    good: int
    total: int

    @property
    def value(self) -> float:
        return self.good / self.total

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.good, self.total)

    def as_dict(self) -> dict[str, int | float | list[float]]:
        """For JSON."""
        return {
            "good": self.good,
            "total": self.total,
            "share": self.value,
            "interval_95": list(self.interval),
        }

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} (95% interval {low:.1%} to {high:.1%})"


def wilson_interval(good: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    r"""The score interval of a share $\hat p = k/n$ (Wilson 1927).

    $$\frac{1}{1 + z^2/n} \Bigl(\hat p + \frac{z^2}{2n}
    \pm z \sqrt{\frac{\hat p (1 - \hat p)}{n} + \frac{z^2}{4n^2}}\Bigr)$$

    Raises:
        ValueError: if `total` is not positive or `good` is not within it.
    """
    if not 0 <= good <= total or total == 0:
        raise ValueError(f"a share needs 0 <= good <= total and total > 0, got {good} of {total}")
    share, square = good / total, z * z / total
    half = z * math.sqrt(share * (1 - share) / total + square / (4 * total))
    centre = share + square / 2
    # Rounding may carry a bound past 0 or 1 by an ulp, where the share itself is 0 or 1.
    low, high = (centre - half) / (1 + square), (centre + half) / (1 + square)
    return max(0.0, low), min(1.0, high)


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> BatchEncoding:
    """Token ids of the prompts, padded on the left; as chats if the tokenizer has a template."""
    tokenizer.padding_side = "left"
    if tokenizer.chat_template is None:
        return tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)  # pyright: ignore[reportReturnType]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return tokenizer.apply_chat_template(  # pyright: ignore[reportReturnType]
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[P],
    sampling: Sampling,
    seed: int,
) -> list[Answer[P]]:
    """One completion per problem.

    The same model, problems, sampling, seed and device give the same answers.
    """
    torch.manual_seed(seed)
    answers: list[Answer[P]] = []
    ends = end_token_ids(tokenizer, str(model.name_or_path), generation=model.generation_config)
    for start in range(0, len(problems), sampling.batch_size):
        batch = problems[start : start + sampling.batch_size]
        inputs = encode_prompts(tokenizer, [problem.prompt for problem in batch]).to(model.device)
        tokens = model.generate(  # pyright: ignore[reportCallIssue] (nn.Module's __getattr__)
            **inputs,
            **sampling.settings,
            eos_token_id=sorted(ends),
            pad_token_id=tokenizer.pad_token_id,
        )
        completions = tokens[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        answers += [
            Answer(
                problem=problem, completion=text, is_whole=not ends.isdisjoint(completion.tolist())
            )
            for problem, text, completion in zip(batch, texts, completions, strict=True)
        ]
    return answers


def share_good(answers: list[Answer]) -> Share:
    """The share of good answers."""
    return Share(good=sum(each.is_good for each in answers), total=len(answers))
