"""Training runs that count their steps' operations: ours, TRL's, and supervised fine-tuning."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import silence  # noqa: F401  (sets what the libraries below read when they are imported)
import torch
from datasets import Dataset
from inputs import Shape, read_jsonl
from lightning import Trainer
from linear_logps import addmm
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl.trainer import utils as trl_utils
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from kto_lightning.batches.types import StepBatch
from kto_lightning.data.datamodule import KTODataModule
from kto_lightning.module import KTOModule

ATEN = torch.ops.aten


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of all contestants."""

    shape: Shape = field(default_factory=Shape)
    num_records: int = 32
    batch_size: int = 8
    max_length: int = 1024
    words: int = 150
    """Of a generated record, on average."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Paths of the model and the records."""

    model: Path
    train: Path


def counter() -> FlopCounterMode:
    """Counts all matrix products; PyTorch's own table lacks CPU attention and `addmm_`."""
    attention = ATEN._scaled_dot_product_flash_attention_for_cpu
    backward = ATEN._scaled_dot_product_flash_attention_for_cpu_backward

    def forward_count(query, key, value, *_, **__) -> int:
        return sdpa_flop_count(query, *_one_per_query_head(query, key, value))

    def backward_count(gradient, query, key, value, *_, **__) -> int:
        return sdpa_backward_flop_count(gradient, query, *_one_per_query_head(query, key, value))

    formulas = {attention: forward_count, backward: backward_count, ATEN.addmm_: addmm}
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _one_per_query_head(query, *keys_and_values) -> list[torch.Size]:
    """Shapes [batch, heads, length, width] of keys and values as if no query heads shared them:
    products are as many, and PyTorch 2.11 refuses to count grouped heads."""
    return [torch.Size((shape[0], query[1], *shape[2:])) for shape in keys_and_values]


class CountedModule(KTOModule):
    """`KTOModule` that records its steps and their operations."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.steps: list[StepBatch] = []
        self.costs: list[int] = []

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        with counter() as counted:
            super().training_step(batch, batch_idx)
        self.steps.append(batch)
        self.costs.append(counted.get_total_flops())


class CountedTrainer(KTOTrainer):
    """`KTOTrainer` that records operations, tokens and padded positions of its micro-batches."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.costs: list[int] = []
        self.num_tokens = self.num_positions = 0
        super().__init__(*arguments, **settings)

    def training_step(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        self.num_tokens += int(inputs["attention_mask"].sum())
        self.num_positions += inputs["attention_mask"].numel()
        with counter() as counted:
            loss = super().training_step(model, inputs, *arguments, **options)
        self.costs.append(counted.get_total_flops())
        return loss


def run_ours(
    inputs: Inputs, settings: Settings, *, max_tokens: int, cache: Path | None = None
) -> CountedModule:
    """Train one epoch with `KTOModule` and count it."""
    module = CountedModule(str(inputs.model), reference_cache=None if cache is None else str(cache))
    data = KTODataModule(
        str(inputs.train),
        batch_size=settings.batch_size,
        max_tokens=max_tokens,
        max_length=settings.max_length,
        preprocessing_workers=1,
    )
    Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    ).fit(module, datamodule=data)
    if module.padding_reason is not None:
        raise SystemExit(f"step_cost: the model runs padded: {module.padding_reason}")
    return module


def trl_config(directory: Path, *, device: str = "cpu", **settings: Any) -> KTOConfig:
    """TRL's settings, with saving, logging and progress bars turned off."""
    return KTOConfig(
        **{
            "output_dir": str(directory),
            "dataset_num_proc": None,
            "dataloader_pin_memory": False,
            "bf16": False,
            "gradient_checkpointing": False,
            "use_cpu": device == "cpu",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "report_to": "none",
            **settings,
        }
    )


def run_trl(
    inputs: Inputs,
    settings: Settings,
    directory: Path,
    *,
    precomputed: bool,
    micro_batches: int,
    completions_only: bool,
) -> CountedTrainer:
    """Train one epoch with TRL and count it."""
    config = trl_config(
        directory,
        per_device_train_batch_size=max(2, settings.batch_size // micro_batches),
        gradient_accumulation_steps=micro_batches,
        num_train_epochs=1,
        max_length=settings.max_length,
        precompute_ref_log_probs=precomputed,
    )
    compact = patch.object(trl_utils, "_use_triton", lambda _: True)
    with compact if completions_only else nullcontext():
        trainer = CountedTrainer(
            model=AutoModelForCausalLM.from_pretrained(inputs.model, dtype=torch.float32),
            args=config,
            train_dataset=Dataset.from_list(read_jsonl(inputs.train)),
            processing_class=AutoTokenizer.from_pretrained(inputs.model),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer


def sft_cost(inputs: Inputs, steps: list[StepBatch], *, completions_only: bool) -> int:
    """Operations of cross entropy, forward and backward, on every sequence of the steps."""
    model = AutoModelForCausalLM.from_pretrained(inputs.model)
    total = 0
    for batch in (micro_batch for step in steps for micro_batch in step.micro_batches):
        sequences = batch.matched.input_ids.split(batch.matched.lengths)
        for ids, prompt_length in zip(sequences, batch.prompt_lengths, strict=True):
            with counter() as counted:
                if completions_only:
                    rows = torch.arange(max(prompt_length, 1) - 1, len(ids) - 1)
                    logits = model(input_ids=ids[None], logits_to_keep=rows).logits[0]
                    loss = cross_entropy(logits, ids[rows + 1])
                else:
                    loss = model(input_ids=ids[None], labels=ids[None]).loss
                loss.backward()
            total += counted.get_total_flops()
    return total
