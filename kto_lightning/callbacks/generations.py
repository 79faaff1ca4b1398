"""`OUTPUT/generations.json`: what the policy answers before and after, on a few fixed prompts."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import (
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)
from transformers import GenerationConfig

from kto_lightning.data.examples import ExampleSet
from kto_lightning.errors import ConfigError
from kto_lightning.files import write_whole

SHARDED = (FSDPStrategy, ModelParallelStrategy)


class Generations(Callback):
    """Lets the policy answer fixed prompts before the first step and after the last, for the
    report. Greedy: no random number is drawn, so that the run is the same without it.

    Args:
        generate: how many prompts, of held-out records if there are some; 0: none.
        max_new_tokens: the most tokens of an answer.

    Raises:
        ConfigError: if a number is outside what it may be.
    """

    def __init__(self, generate: int = 0, max_new_tokens: int = 64) -> None:
        for name, value, least in (
            ("generate", generate, 0),
            ("max_new_tokens", max_new_tokens, 1),
        ):
            if value < least:
                raise ConfigError(f"--report.{name} must be at least {least}, got {value}.")
        self.generate, self.max_new_tokens = generate, max_new_tokens

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.generate and stage == "fit":
            check_whole_model(trainer.strategy)
            data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
            if data.prepared.stream is not None and data.prepared.validation_set is None:
                raise ConfigError(
                    "--report.generate takes prompts from records that are kept, and with "
                    "--data.streaming true there are none. Give --data.validation FILE."
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:  # a resumed run keeps what was answered before its first step
            self._record(trainer, pl_module, "before", {})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record(trainer, pl_module, "after", _answered_before(trainer))

    def _record(
        self, trainer: Trainer, module: Any, moment: str, before: dict[str, str | None]
    ) -> None:
        """Answer all prompts and write the file anew, with what was answered `before` to each."""
        if not self.generate or not trainer.is_global_zero:
            return
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        held_out = data.prepared.validation_set is not None
        examples: ExampleSet = data.prepared.validation_set if held_out else data.prepared.train_set
        samples = []
        with _answering(module.policy) as model, trainer.precision_plugin.forward_context():
            for index in chosen(
                examples.prompt_keys, examples.prompt_lengths, self.generate
            ).tolist():
                example = examples[index]
                prompt = data.prepared.tokenizer.decode(example.prompt_ids)
                answer = self._answer(model, data.prepared.tokenizer, example.prompt_ids)
                samples.append(
                    {
                        "prompt": prompt,
                        "completion": data.prepared.tokenizer.decode(
                            example.completion_ids, skip_special_tokens=True
                        ),
                        "desirable": example.desirable,
                        "before": before.get(prompt),
                        "after": None,
                        moment: answer,
                    }
                )
        content = {
            "source": "validation" if held_out else "train",
            "max_new_tokens": self.max_new_tokens,
            "samples": samples,
        }
        write_whole(_path(trainer), json.dumps(content, indent=2) + "\n", what="the answers")

    def _answer(self, model: Any, tokenizer: Any, prompt_ids: np.ndarray) -> str:
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=sorted(
                {end for end in (*ends, tokenizer.eos_token_id) if end is not None}
            ),
            pad_token_id=tokenizer.eos_token_id,
        )
        ids = torch.tensor(prompt_ids.tolist(), device=model.device)[None]  # [1, prompt]
        answered = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=settings
        )
        return tokenizer.decode(answered[0, ids.shape[1] :], skip_special_tokens=True)


def chosen(
    prompt_keys: Int64[np.ndarray, " examples"],
    prompt_lengths: Int64[np.ndarray, " examples"],
    count: int,
) -> Int64[np.ndarray, " chosen"]:
    """Examples with prompts that differ, spread evenly over the set: the same in every run."""
    _, first = np.unique(prompt_keys, return_index=True)
    first = np.sort(first)
    first = first[prompt_lengths[first] > 0]
    places = np.linspace(0, len(first) - 1, min(count, len(first))).round().astype(np.int64)
    return first[places]


def check_whole_model(strategy: Strategy) -> None:
    """Refuse a strategy under which no device has the whole model.

    Raises:
        ConfigError: if it cuts weights into parts.
    """
    if isinstance(strategy, SHARDED) or getattr(strategy, "shard", None) is not None:
        raise ConfigError(
            "--report.generate needs the whole model on one device, and "
            f"{type(strategy).__name__} cuts it into parts. Leave it out, or use "
            "--trainer.strategy ddp."
        )


@contextmanager
def _answering(policy: Any) -> Iterator[Any]:
    """The policy's model with its own attention, in evaluation mode, and afterwards as it was."""
    modes = {module: module.training for module in policy.modules()}
    try:
        with policy.use_original_attention() as model, torch.no_grad():
            yield model
    finally:
        for module, training in modes.items():
            module.training = training


def _path(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / "generations.json"


def _answered_before(trainer: Trainer) -> dict[str, str | None]:
    """Answers before the first step by their prompts; none where a run was asked for them late."""
    try:
        samples = json.loads(_path(trainer).read_text(encoding="utf-8"))["samples"]
        return {sample["prompt"]: sample["before"] for sample in samples}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
