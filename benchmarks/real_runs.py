"""One training run of `real_model.py` in a process of its own: ours, TRL's, or supervised.

Records, their order, batch, optimizer, learning rate and the number of steps are the same. Ours and
TRL's `KTOTrainer` also take the same partners (`pairing: rotate`) and class weights. Supervised
fine-tuning has no use for bad answers: it repeats the good ones until they are as many.
"""

import json
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import silence  # noqa: F401  (sets what the libraries below read when they are imported)
import torch
from common import used_memory_mib
from inputs import read_jsonl
from step_runs import quiet_config
from torch.nn.functional import cross_entropy

from kto_lightning.demo.answers import Answer
from kto_lightning.demo.evaluate import Sampling, answer
from kto_lightning.demo.instructions import Instruction
from kto_lightning.demo.own_model import HeldOut, open_model
from kto_lightning.demo.run import fit_command
from kto_lightning.files import write_whole

START, OURS, TRL, SFT = "start", "ours", "TRL", "SFT"
MAX_LENGTH = 512
TEXT_WINDOW = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """Settings that a run may change, one at a time."""

    learning_rate: float = 2e-5
    beta: float = 0.1
    batch_size: int = 16
    epochs: int = 1
    lora_rank: int = 0
    """0: all weights are trained."""
    balance: bool = True
    """Class weights that balance the classes, otherwise 1 and 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What one process does."""

    method: str
    seed: int
    training: Training
    start: str
    """The directory of the model before training."""
    records: str
    output: str
    threads: int
    num_held_out: int
    num_held_out_kinds: int
    max_new_tokens: int
    text_windows: int
    on_gpu: bool

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "Run":
        values = json.loads(path.read_text())
        return cls(**values | {"training": Training(**values["training"])})

    @property
    def held_out(self) -> HeldOut:
        """The same for all runs."""
        return HeldOut.draw(0, self.num_held_out, self.num_held_out_kinds)

    @property
    def sampling(self) -> Sampling:
        """The most probable answer, so that only training makes a difference."""
        return Sampling(max_new_tokens=self.max_new_tokens, temperature=0.0, batch_size=64)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.on_gpu else "cpu")


def train_ours(run: Run) -> Path:
    """`python -m kto_lightning fit`."""
    from kto_lightning.cli import trainer

    output, training = Path(run.output), run.training
    settings: dict[str, Any] = {
        "--model.policy": run.start,
        "--model.learning_rate": training.learning_rate,
        "--model.beta": training.beta,
        "--data.train": run.records,
        "--data.batch_size": training.batch_size,
        "--data.max_length": MAX_LENGTH,
        "--data.shuffle": "false",
        "--data.pairing": "rotate",
        "--trainer.max_epochs": training.epochs,
        "--trainer.devices": 1,
        "--trainer.precision": "bf16-mixed" if run.on_gpu else "32-true",
        "--trainer.enable_progress_bar": "false",
        "--seed_everything": run.seed,
        "--output_dir": output / "fit",
    }
    if training.lora_rank:
        settings |= {"--model.lora.r": training.lora_rank}
    if not training.balance:
        settings |= {"--model.desirable_weight": 1.0, "--model.undesirable_weight": 1.0}
    status = trainer.main(fit_command(settings))
    if status != 0:
        raise SystemExit(f"fit ended with status {status}")
    return output / "fit" / "model"


def train_trl(run: Run) -> Path:
    """TRL's `KTOTrainer`."""
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.kto_trainer import KTOTrainer

    from kto_lightning.batches.class_weights import ClassWeights, recommended_weights

    records = read_jsonl(Path(run.records))
    good = sum(record["label"] for record in records)
    weights = ClassWeights(desirable=1.0, undesirable=1.0)
    if run.training.balance:
        weights = recommended_weights(good, len(records) - good)
    return _train(
        run,
        KTOTrainer,
        KTOConfig,
        records,
        beta=run.training.beta,
        desirable_weight=weights.desirable,
        undesirable_weight=weights.undesirable,
    )


def train_sft(run: Run) -> Path:
    """TRL's `SFTTrainer` on the good answers, whose completions alone have a loss."""
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    records = read_jsonl(Path(run.records))
    good = [{k: r[k] for k in ("prompt", "completion")} for r in records if r["label"]]
    repeated = [good[index % len(good)] for index in range(len(records))]
    return _train(run, SFTTrainer, SFTConfig, repeated, completion_only_loss=True)


def _train(
    run: Run,
    trainer_class: Any,
    config_class: type[Any],
    records: list[dict[str, Any]],
    **settings: Any,
) -> Path:
    """Train by one of TRL's trainers; the directory of the model."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from kto_lightning.models.tokenizer import load_tokenizer

    training, directory = run.training, Path(run.output) / "model"
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(run.start, dtype=torch.float32),
        args=quiet_config(
            config_class,
            directory,
            device=run.device.type,
            bf16=run.on_gpu,
            learning_rate=training.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            per_device_train_batch_size=training.batch_size,
            num_train_epochs=training.epochs,
            max_length=MAX_LENGTH,
            seed=run.seed,
            **settings,
        ),
        train_dataset=Dataset.from_list(records),
        processing_class=load_tokenizer(run.start),
    )
    trainer.train()
    trainer.save_model(str(directory))
    return directory


TRAIN = {OURS: train_ours, TRL: train_trl, SFT: train_sft}


def untouched_text() -> str:
    """English prose that no run trains on: chapters of Python's language reference, which every
    installation of Python holds."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in ("execmodel", "naming", "exceptions", "objects"))


@torch.inference_mode()
def text_logp(model: Any, tokenizer: Any, num_windows: int) -> float:
    """The mean log-probability of a token of the untouched text, in nats."""
    ids = tokenizer(untouched_text(), return_tensors="pt")["input_ids"][0]
    ids = ids[: num_windows * TEXT_WINDOW]
    windows = ids[: len(ids) // TEXT_WINDOW * TEXT_WINDOW].view(-1, TEXT_WINDOW).to(model.device)
    losses = [
        cross_entropy(model(input_ids=window[None]).logits[0, :-1].float(), window[1:])
        for window in windows
    ]
    return -torch.stack(losses).mean().item()


def evaluate(run: Run, directory: Path) -> dict[str, Any]:
    """What a model answers to the held-out instructions, and what it still knows."""
    model, tokenizer = open_model(str(directory), run.device)
    answers: list[Answer[Instruction]] = answer(
        model, tokenizer, run.held_out.all, run.sampling, seed=0
    )
    return {
        "good": [each.is_good for each in answers],
        "answers": [
            {"kind": each.problem.kind, "prompt": each.problem.prompt, "answer": each.completion}
            for each in answers
        ],
        "text_logp": text_logp(model, tokenizer, run.text_windows),
    }


def main(path: Path) -> int:
    run = Run.read(path)
    torch.set_num_threads(run.threads)
    result: dict[str, Any] = {"method": run.method, "seed": run.seed}
    directory = Path(run.start)
    try:
        if run.method != START:
            began, began_cpu = time.perf_counter(), time.process_time()
            directory = TRAIN[run.method](run)
            result |= {
                "seconds": time.perf_counter() - began,
                "cpu_seconds": time.process_time() - began_cpu,
                "peak_mib": used_memory_mib(run.device, peak=True),
            }
        result |= evaluate(run, directory)
    except Exception:
        traceback.print_exc()
        return 1
    write_whole(path.with_name("result.json"), json.dumps(result), what="the result")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
