"""`OUTPUT/generations.json`: the policy's answers to fixed prompts, before and after training."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from transformers import GenerationConfig

from kto_lightning.callbacks.lightning_state import kto_data, kto_module
from kto_lightning.errors import ConfigError, check_count
from kto_lightning.files import write_whole
from kto_lightning.models.policy import Policy
from kto_lightning.models.tokenizer import end_token_ids

_SHARDED = (FSDPStrategy, ModelParallelStrategy)


class Generations(Callback):
    """Lets the policy answer fixed prompts before the first step and after the last, for the
    report. Decoding is greedy: it draws no random numbers and so does not change the run.

    Args:
        generate: how many prompts, of held-out records if there are some; 0: none.
        max_new_tokens: the most tokens of an answer.

    Raises:
        ConfigError: if a number is out of its range.
    """

    def __init__(self, generate: int = 0, max_new_tokens: int = 64) -> None:
        check_count("--report.generate", generate, least=0)
        check_count("--report.max_new_tokens", max_new_tokens)
        self.generate, self.max_new_tokens = generate, max_new_tokens
        self.resume_settings = {
            "report.generate": generate,
            "report.max_new_tokens": max_new_tokens,
        }

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.generate and stage == "fit":
            check_whole_model(trainer.strategy)
            data = kto_data(trainer).prepared
            if data.stream is not None and data.validation_set is None:
                raise ConfigError(
                    "--report.generate takes prompts from records that are kept, and with "
                    "--data.streaming true there are none. Give --data.validation FILE."
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:  # a resumed run keeps the answers of before its first step
            self._write(trainer, pl_module, "before", {})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module, "after", _read_answers_before(trainer))

    def _write(
        self,
        trainer: Trainer,
        module: LightningModule,
        moment: Literal["before", "after"],
        before: dict[str, str | None],
    ) -> None:
        """Answer all prompts and overwrite the file, with earlier answers by prompt in `before`."""
        if not self.generate or not trainer.is_global_zero:
            return
        data, policy = kto_data(trainer).prepared, kto_module(module).policy
        examples = data.train_set if data.validation_set is None else data.validation_set
        tokenizer: Any = data.tokenizer  # whose `decode` has no useful type
        assert examples is not None
        assert policy is not None
        chosen = choose_prompts(examples.prompt_keys, examples.prompt_lengths, self.generate)
        samples = []
        with _generating(policy) as model, trainer.precision_plugin.forward_context():
            for index in chosen.tolist():
                example = examples[index]
                prompt = tokenizer.decode(example.prompt_ids)
                answer = self._answer(model, tokenizer, example.prompt_ids)
                completion = tokenizer.decode(example.completion_ids, skip_special_tokens=True)
                samples.append(
                    {
                        "prompt": prompt,
                        "completion": completion,
                        "desirable": example.desirable,
                        "before": before.get(prompt),
                        "after": None,
                        moment: answer,
                    }
                )
        content = {
            "source": "train" if data.validation_set is None else "validation",
            "max_new_tokens": self.max_new_tokens,
            "samples": samples,
        }
        write_whole(_path(trainer), json.dumps(content, indent=2) + "\n", what="the answers")

    def _answer(self, model: Any, tokenizer: Any, prompt_ids: np.ndarray) -> str:
        ends = end_token_ids(tokenizer, model.name_or_path, generation=model.generation_config)
        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=sorted(ends),
            pad_token_id=tokenizer.eos_token_id,
        )
        ids = torch.tensor(prompt_ids.tolist(), device=model.device)[None]  # [1, prompt]
        answered = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=settings
        )
        return tokenizer.decode(answered[0, ids.shape[1] :], skip_special_tokens=True)


def choose_prompts(
    prompt_keys: Int64[np.ndarray, " examples"],
    prompt_lengths: Int64[np.ndarray, " examples"],
    count: int,
) -> Int64[np.ndarray, " chosen"]:
    """Indices of examples with different prompts, spread evenly over the set: the same in every
    run."""
    _, first = np.unique(prompt_keys, return_index=True)
    first = np.sort(first)
    first = first[prompt_lengths[first] > 0]
    places = np.linspace(0, len(first) - 1, min(count, len(first))).round().astype(np.int64)
    return first[places]


def check_whole_model(strategy: Strategy) -> None:
    """Refuse a strategy under which no device holds the whole model.

    Raises:
        ConfigError: if it shards weights.
    """
    if isinstance(strategy, _SHARDED) or getattr(strategy, "shard", None) is not None:
        raise ConfigError(
            "--report.generate needs the whole model on one device, and "
            f"{type(strategy).__name__} shards it. Drop --report.generate, or use "
            "--trainer.strategy ddp."
        )


@contextmanager
def _generating(policy: Policy) -> Iterator[Any]:
    """The policy's model with its own attention and in evaluation mode; restored afterwards."""
    modes = {module: module.training for module in policy.modules()}
    try:
        with policy.use_original_attention() as model, torch.no_grad():
            yield model
    finally:
        for module, training in modes.items():
            module.training = training


def _path(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / "generations.json"


def _read_answers_before(trainer: Trainer) -> dict[str, str | None]:
    """Answers of before the first step, by prompt; empty where the run began without `generate`."""
    try:
        samples = json.loads(_path(trainer).read_text(encoding="utf-8"))["samples"]
        return {sample["prompt"]: sample["before"] for sample in samples}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
