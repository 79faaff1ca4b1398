"""TRL's trainers as contestants: they record their steps, and neither log nor save."""

from pathlib import Path
from typing import Any

import torch
from contestants import StepEnds, Task
from datasets import Dataset
from inputs import read_jsonl
from peft import PeftModel
from step_runs import quiet_config
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer


class TakeTurns(TrainerCallback):
    """Takes a step when it is asked for."""

    def __init__(self, turns: StepEnds) -> None:
        self._turns = turns
        self.trainer: Any = None
        """Whose `step_values` are sent."""

    def on_train_begin(self, *arguments: Any, **others: Any) -> None:
        self._turns.ready()

    def on_step_end(self, *arguments: Any, **others: Any) -> None:
        self._turns.end_step(self._step_values)

    def _step_values(self) -> dict[str, Any]:
        return {"floor_operations": None} | self.trainer.step_values


class RecordingKTO(KTOTrainer):
    """Keeps the last step's loss, log-probs and number of tokens."""

    def training_step(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        metrics = self._metrics["train"]
        metrics.clear()
        loss = super().training_step(model, inputs, *arguments, **options)
        names = {"desirable": "logps/chosen", "undesirable": "logps/rejected"}
        self.last = (loss, {k: metrics[v][-1] for k, v in names.items() if metrics.get(v)})
        self.num_tokens = inputs["attention_mask"].sum()
        return loss

    @property
    def step_values(self) -> dict[str, Any]:
        loss, logps = self.last
        return {"loss": loss.item(), "logps": logps, "num_tokens": int(self.num_tokens)}


class RecordingSFT(SFTTrainer):
    """Keeps the last step's loss and number of tokens."""

    def training_step(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Tensor:
        self.num_tokens = inputs["attention_mask"].sum()
        self.loss = super().training_step(model, inputs, *arguments, **options)
        return self.loss

    @property
    def step_values(self) -> dict[str, Any]:
        return {"loss": self.loss.item(), "logps": {}, "num_tokens": int(self.num_tokens)}


def train_kto(task: Task, turns: StepEnds) -> None:
    """Train with `KTOTrainer` and the settings of ours."""
    cached = task.reference == "cached"
    _train(task, turns, RecordingKTO, KTOConfig, precompute_ref_log_probs=cached)


def train_sft(task: Task, turns: StepEnds) -> None:
    """Train with `SFTTrainer` on the same sequences, whose completions alone are scored. It knows
    no labels of the records."""
    records = [
        {"prompt": record["prompt"], "completion": record["completion"]}
        for record in read_jsonl(task.inputs.train)
    ]
    settings = {"train_sampling_strategy": "sequential", "packing": False}
    _train(task, turns, RecordingSFT, SFTConfig, records, **settings)


def _train(
    task: Task,
    turns: StepEnds,
    trainer_class: Any,
    config_class: type[Any],
    records: list[dict[str, Any]] | None = None,
    **settings: Any,
) -> None:
    on_gpu = task.device == "cuda"
    taking_turns = TakeTurns(turns)
    trainer = trainer_class(
        model=_load_model(task.inputs.model, task.adapter, half=on_gpu),
        args=quiet_config(
            config_class,
            task.output,
            device=task.device,
            per_device_train_batch_size=task.batch_size,
            max_steps=task.num_steps,
            max_length=task.max_length,
            max_grad_norm=0.0,
            learning_rate=task.learning_rate,
            lr_scheduler_type="constant",
            bf16=on_gpu,
            gradient_checkpointing=task.checkpointing,
            **settings,
        ),
        train_dataset=Dataset.from_list(records or read_jsonl(task.inputs.train)),
        processing_class=AutoTokenizer.from_pretrained(task.inputs.model),
        callbacks=[taking_turns],
    )
    taking_turns.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def _load_model(directory: Path, adapter: Path | None, *, half: bool) -> Any:
    """The model in float32; with an adapter on a frozen base, which is in bfloat16 if `half`."""
    dtype = torch.bfloat16 if half and adapter else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    if adapter is None:
        return model
    return PeftModel.from_pretrained(model, adapter, is_trainable=True)
