"""Operations of a training step of a family, relative to supervised fine-tuning (SFT).

Counted as in `benchmarks/step_cost.py`: matrix products of `KTOModule`'s steps over those of a
forward and backward of cross entropy, one record at a time, whose head runs on the completions.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kto_lightning.batches.types import StepBatch
from tests.architectures.build import save_family
from tests.architectures.loading import reopened
from tests.architectures.shrink import POSITIONS

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts, no package

from inputs import made_records, write_jsonl
from operations import counter
from step_runs import Inputs, Settings, run_ours

SETTINGS = Settings(num_records=16, batch_size=8, max_length=POSITIONS, words=16)
PROMPT_SHARE = 0.5


@dataclass(kw_only=True, slots=True)
class Price:
    """Operations of our steps over those of SFT on the same sequences."""

    computed: float
    """With the reference computed in every step."""
    cached: float
    """With the reference's log-probs from a cache."""


def price(family: str, directory: Path) -> Price:
    """Train an epoch twice, the second time with the reference's log-probs in a cache."""
    records = made_records(SETTINGS.num_records, words=SETTINGS.words, prompt_share=PROMPT_SHARE)
    inputs = Inputs(
        model=save_family(directory / "model", family),
        train=write_jsonl(directory / "train.jsonl", records),
    )
    whole = SETTINGS.batch_size * SETTINGS.max_length
    computed, cached = (
        run_ours(inputs, SETTINGS, max_tokens=whole, cache=directory / "cache") for _ in range(2)
    )
    sft = _sft(reopened(inputs.model), computed.steps)
    return Price(computed=sum(computed.costs) / sft, cached=sum(cached.costs) / sft)


def _sft(model: PreTrainedModel, steps: list[StepBatch]) -> int:
    """Operations of forward and backward, without those of the head on prompts."""
    head: Any = model.get_output_embeddings()
    total = 0
    for batch in (micro_batch for step in steps for micro_batch in step.micro_batches):
        matched = batch.matched
        for ids in matched.input_ids.split(matched.lengths):
            with counter() as counted:
                model(input_ids=ids[None], labels=ids[None]).loss.backward()
            total += counted.get_total_flops()
        unscored = len(matched.input_ids) - len(matched.scored.rows)
        total -= 3 * 2 * head.weight.numel() * unscored
    return total
