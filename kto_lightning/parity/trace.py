"""Inputs and settings of both trainers, and the trace of a run."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from kto_lightning.batches.objective import LossName
from kto_lightning.models.model_class import auto_class

Optimizer = Literal["adamw", "sgd"]
Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """A short run, in terms that both trainers have."""

    steps: int
    batch_size: int
    """Examples per optimizer step; TRL uses one micro-batch, `fit` as many as `max_tokens` asks."""
    loss: LossName = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    learning_rate: float = 1e-6
    optimizer: Optimizer = "adamw"
    lr_schedule: Schedule = "constant"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    gradient_clip_norm: float | None = None
    max_length: int | None = 1024


@dataclass(kw_only=True, slots=True)
class Inputs:
    """Models (directories or hub ids) and training records (a jsonl file)."""

    model: str
    """Model and tokenizer; the base of an adapter."""
    train: str
    """Records with `prompt`, `completion` and a boolean `label`."""
    adapter: str | None = None
    """A saved LoRA adapter to train further; None: full fine-tuning."""
    reference: str | None = None
    """Another model as the reference; None: the initial policy."""
    chat_template: str | None = None
    """A file with a chat template instead of the tokenizer's."""
    moves_weights: bool = False
    """Whether every weight is multiplied by 1 ± eps, to see how far rounding alone moves a run."""

    def load(self) -> Any:
        """The initial model in float32; a `PeftModel` if there is an adapter."""
        model = self._moved(load_model(self.model))
        if self.adapter is None:
            return model
        return PeftModel.from_pretrained(model, self.adapter, is_trainable=True)

    def load_reference(self) -> PreTrainedModel | None:
        """None: TRL makes one of the initial policy by itself."""
        if self.reference is not None:
            return self._moved(load_model(self.reference))
        return self.load() if self.moves_weights and self.adapter is None else None

    def _moved(self, model: PreTrainedModel) -> PreTrainedModel:
        if self.moves_weights:
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for weight in model.parameters():
                    signs = torch.randint(2, weight.shape, generator=generator) * 2 - 1
                    weight.mul_(1 + torch.finfo(weight.dtype).eps * signs)
        return model

    def initial_weights(self) -> dict[str, Tensor]:
        """The weights before the first step, as in `Trace.weights`."""
        return trained_weights(self.load())


@dataclass(kw_only=True, slots=True)
class Trace:
    """One value per optimizer step in every column, and the weights after the last step."""

    columns: dict[str, list[float]]
    """By the names of `metrics.csv`; NaN where a batch lacks a class. TRL's trace also has
    `mismatched_logps`, the mean of |log π_θ(y'|x)| over the batch, 0 without a mismatched pass."""
    weights: dict[str, Tensor]
    """The state dict of the trained model, or of its adapter only."""


def load_model(name: str) -> PreTrainedModel:
    """A model in float32, whatever its config specifies, of the class that `fit` trains."""
    auto = auto_class(name, AutoConfig.from_pretrained(name), trust_remote_code=False)
    return auto.from_pretrained(name, dtype=torch.float32)


def trained_weights(model: Any) -> dict[str, Tensor]:
    """A copy of the state dict of a model, or of its adapter if it has one."""
    if isinstance(model, PeftModel):
        state = get_peft_model_state_dict(model, adapter_name="default")
    else:
        state = model.state_dict()
    return {name: tensor.detach().clone() for name, tensor in state.items()}
