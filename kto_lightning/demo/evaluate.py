"""Sampling of answers, and the share of good ones."""

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kto_lightning.demo.task import Answer, Problem

MAX_NEW_TOKENS = 16
"""About twice the longest good answer, six letters and the EOS."""
BATCH_SIZE = 256


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


@torch.inference_mode()
def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: list[Problem], seed: int
) -> list[Answer]:
    """One completion per problem, sampled at temperature 1 from the whole vocabulary.

    The same model, problems, seed and device give the same answers.
    """
    torch.manual_seed(seed)
    answers: list[Answer] = []
    for start in range(0, len(problems), BATCH_SIZE):
        batch = problems[start : start + BATCH_SIZE]
        inputs = tokenizer(
            [problem.prompt for problem in batch],
            padding=True,
            padding_side="left",
            return_tensors="pt",
            return_token_type_ids=False,
        ).to(model.device)
        tokens = model.generate(  # pyright: ignore[reportCallIssue] (nn.Module's __getattr__)
            **inputs,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=MAX_NEW_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
        )
        completions = tokenizer.batch_decode(
            tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        answers += [
            Answer(problem=problem, completion=completion)
            for problem, completion in zip(batch, completions, strict=True)
        ]
    return answers


def share_good(answers: list[Answer]) -> Share:
    """The share of good answers."""
    return Share(good=sum(each.is_good for each in answers), total=len(answers))
