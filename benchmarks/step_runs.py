"""Training runs that count their steps' operations: ours, TRL's, and supervised fine-tuning."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import silence  # noqa: F401  (sets what the libraries below read when they are imported)
import torch
from datasets import Dataset
from inputs import Shape, read_jsonl, save_model
from lightning import Trainer
from operations import counter
from step_floor import num_positions
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl.trainer import utils as trl_utils
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from kto_lightning.batches.types import StepBatch
from kto_lightning.data.datamodule import KTODataModule
from kto_lightning.module import KTOModule

C = TypeVar("C")


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


def save_inputs(
    directory: Path, records: list[dict[str, Any]], shape: Shape, *, lora: bool, device: str
) -> tuple[Inputs, Path | None]:
    """Save a model whose tokenizer knows the records, and with `lora` an adapter on it; a frozen
    base is in bfloat16 on a GPU. The paths, of which the records' has no file yet."""
    inputs = Inputs(model=directory / "model", train=directory / "train.jsonl")
    adapter = directory / "adapter" if lora else None
    save_model(
        inputs.model,
        records,
        shape,
        dtype=torch.bfloat16 if lora and device == "cuda" else torch.float32,
        device=device,
        adapter=adapter,
    )
    return inputs, adapter


CUTS = 3
"""For several micro-batches: the tokens of the largest step over `--data.max_tokens`."""


class CountedModule(KTOModule):
    """`KTOModule` that records its steps, their operations and the positions that it ran."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.steps: list[StepBatch] = []
        self.costs: list[int] = []
        self.num_positions = 0
        """In forwards of one position: with a gradient, forward and backward count as three."""

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        assert self.policy is not None
        vocabulary = self.policy.causal_lm.get_input_embeddings().weight.shape

        def count_positions(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if isinstance(module, nn.Embedding) and module.weight.shape == vocabulary:
                self.num_positions += inputs[0].numel() * (3 if torch.is_grad_enabled() else 1)

        hook = register_module_forward_pre_hook(count_positions)
        try:
            with counter() as counted:
                super().training_step(batch, batch_idx)
        finally:
            hook.remove()
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
    return module


def run_all_ours(
    inputs: Inputs, settings: Settings, directory: Path
) -> dict[tuple[str, str], CountedModule]:
    """Runs by micro-batches of a step (one, several) and reference (computed, cached)."""
    whole = settings.batch_size * settings.max_length
    first = run_ours(inputs, settings, max_tokens=whole)
    cut = max(1, max(step.num_tokens for step in first.steps) // CUTS)
    cache = directory / "cache"
    run_ours(inputs, settings, max_tokens=whole, cache=cache)
    return {
        ("one", "computed"): first,
        ("one", "cached"): run_ours(inputs, settings, max_tokens=whole, cache=cache),
        ("several", "computed"): run_ours(inputs, settings, max_tokens=cut),
        ("several", "cached"): run_ours(inputs, settings, max_tokens=cut, cache=cache),
    }


def row_of(
    kind: tuple[str, str], run: CountedModule, floor: Callable[..., float]
) -> dict[str, Any]:
    """The row of one of our runs, not yet divided by SFT's operations.

    Args:
        kind: its key in `run_all_ours`.
        floor: the lower bound of a step, which takes it and whether the reference is `cached`.
    """
    micro_batches, reference = kind
    cached = reference == "cached"
    needed = sum(num_positions(step, cached=cached) for step in run.steps)
    return {
        "contestant": "ours",
        "reference": reference,
        "micro_batches": micro_batches,
        "operations": sum(run.costs),
        "floor_operations": sum(floor(step, cached=cached) for step in run.steps),
        "positions_per_token": run.num_positions / needed,
    }


def trl_config(directory: Path, *, device: str = "cpu", **settings: Any) -> KTOConfig:
    """`quiet_config` of `KTOTrainer`."""
    return quiet_config(KTOConfig, directory, device=device, **settings)


def quiet_config(
    config_class: type[C], directory: Path, *, device: str = "cpu", **settings: Any
) -> C:
    """Settings of a trainer of TRL, with saving, logging and progress bars turned off."""
    return config_class(
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


def add_ratios(
    rows: list[dict[str, Any]], inputs: Inputs, steps: list[StepBatch]
) -> tuple[int, int]:
    """Add to each row its operations over those of SFT and of its floor, where it has one.

    Returns:
        SFT's operations, and those of SFT whose head runs on the completions.
    """
    sft = sft_cost(inputs, steps, completions_only=False)
    sft_completions = sft_cost(inputs, steps, completions_only=True)
    for row in rows:
        row["over_sft"] = row["operations"] / sft
        row["over_sft_completions"] = row["operations"] / sft_completions
        if "floor_operations" in row:
            row["floor_over_sft"] = row["floor_operations"] / sft
            row["over_floor"] = row["operations"] / row["floor_operations"]
    return sft, sft_completions
