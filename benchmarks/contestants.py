"""Training processes that take steps on request: ours and TRL's (`trl_contestants.py`).

A contestant's process lives for the whole comparison. It loads everything, sends the memory it then
holds, and takes one optimizer step per request, for which it sends a `Step`. So other load on the
machine affects both contestants.
"""

import gc
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from common import reset_peak_memory, used_memory_mib
from silence import quiet
from step_floor import UnitCosts, floor
from step_runs import Inputs

Reference = Literal["computed", "cached"]
ContestantName = Literal["ours", "TRL", "TRL SFT"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """The training run of one process."""

    contestant: ContestantName
    reference: Reference
    """`cached`: TRL precomputes log-probs before its first step, ours are read from `cache`."""
    inputs: Inputs
    adapter: Path | None
    """An adapter to train on a frozen base; None: all weights are trained."""
    cache: Path
    output: Path
    num_steps: int
    batch_size: int
    max_length: int
    max_tokens: int
    learning_rate: float
    device: Literal["cpu", "cuda"]
    threads: int
    checkpointing: bool

    @property
    def policy(self) -> Path:
        return self.adapter or self.inputs.model


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One optimizer step, from the end of the one before: data, forward, backward, update."""

    seconds: float
    cpu_seconds: float
    """Of all threads; hardly affected by other load."""
    peak_mib: float
    """Above `idle_mib`, over all steps so far."""
    loss: float
    logps: dict[str, float]
    """Class means in nats, of the classes in the batch; none of SFT."""
    num_tokens: int
    """Tokens of the matched sequences, without padding."""
    floor_operations: float | None
    """Lower bound of the step's operations (`step_floor.py`); None for TRL's."""


class StepEnds(Protocol):
    """What a run is to tell of."""

    def ready(self) -> None:
        """Everything is loaded and nothing trained yet."""

    def end_step(self, step_values: Callable[[], dict[str, Any]]) -> None:
        """A step has ended; `step_values` gives the fields of `Step` that are not measured."""


class Turns:
    """A contestant's side of the connection: it measures a step and waits for the next request."""

    def __init__(self, connection: Connection, device: torch.device) -> None:
        self._connection, self._device = connection, device
        self._idle_mib = self._peak_mib = self._started = self._started_cpu = 0.0

    def ready(self) -> None:
        """Send the idle memory: everything is loaded and nothing trained yet."""
        gc.collect()
        self._idle_mib = self._peak_mib = reset_peak_memory(self._device)
        self._wait({"idle_mib": self._idle_mib})

    def end_step(self, step_values: Callable[[], dict[str, Any]]) -> None:
        """Send the step that ended; `step_values` gives its other fields, and is not timed."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._started
        cpu_seconds = time.process_time() - self._started_cpu
        # Linux counts resident pages per core, to within a batch: its high-water mark, read twice,
        # can be some pages lower the second time.
        self._peak_mib = max(self._peak_mib, used_memory_mib(self._device, peak=True))
        peak_mib = self._peak_mib - self._idle_mib
        self._wait(
            Step(seconds=seconds, cpu_seconds=cpu_seconds, peak_mib=peak_mib, **step_values())
        )

    def _wait(self, message: Any) -> None:
        self._connection.send(message)
        self._connection.recv()
        self._started, self._started_cpu = time.perf_counter(), time.process_time()


def run_contestant(connection: Connection, task: Task) -> None:
    """Run in the contestant's process. An exception is sent as text instead of a step."""
    torch.set_num_threads(task.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    turns = Turns(connection, torch.device(task.device))
    try:
        with quiet():
            _trainer_of(task.contestant)(task, turns)
    except Exception:
        connection.send(traceback.format_exc())


def _trainer_of(contestant: ContestantName) -> Callable[[Task, StepEnds], None]:
    if contestant == "ours":
        return train_ours
    from trl_contestants import train_kto, train_sft  # which import TRL

    return train_kto if contestant == "TRL" else train_sft


def train_ours(task: Task, turns: StepEnds) -> None:
    """Train as `fit` does, with `metrics.csv` and the diagnostics, but without saving a model."""
    from lightning import Callback, Trainer

    from kto_lightning.callbacks.checkpoints import StepSeed
    from kto_lightning.callbacks.reporting import DiagnosisWarnings, MetricsStart
    from kto_lightning.data.datamodule import KTODataModule
    from kto_lightning.models.routes.choose import explain_obstacles
    from kto_lightning.module import KTOModule
    from kto_lightning.training.metrics_csv import MetricsFile

    class TakeTurns(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            if pl_module.route_obstacles:
                raise SystemExit(explain_obstacles(pl_module.route_obstacles))
            self.unit = UnitCosts.of(pl_module.policy.causal_lm)
            turns.ready()

        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            turns.end_step(lambda: self._step_values(pl_module.published.last_row, batch))

        def _step_values(self, row: dict[str, float], batch: Any) -> dict[str, Any]:
            cached, frozen = task.reference == "cached", task.adapter is not None
            names = ("desirable", "undesirable")
            logps = {name: row.get(f"train/logps/{name}") for name in names}
            return {
                "loss": row["train/loss"],
                "logps": {name: value for name, value in logps.items() if value is not None},
                "num_tokens": batch.num_tokens,
                "floor_operations": floor(batch, self.unit, cached=cached, frozen=frozen),
            }

    on_gpu = task.device == "cuda"
    module = KTOModule(
        str(task.policy),
        desirable_weight=1.0,
        undesirable_weight=1.0,
        learning_rate=task.learning_rate,
        dtype="bfloat16" if on_gpu and task.adapter else None,
        activation_checkpointing=task.checkpointing,
        reference_cache=str(task.cache) if task.reference == "cached" else None,
    )
    data = KTODataModule(
        str(task.inputs.train),
        batch_size=task.batch_size,
        max_tokens=task.max_tokens,
        max_length=task.max_length,
        shuffle=False,
        pairing="rotate",
        preprocessing_workers=1,
    )
    Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=1,
        precision="bf16-mixed" if on_gpu else "32-true",
        max_steps=task.num_steps,
        max_epochs=-1,
        default_root_dir=task.output,
        logger=MetricsFile(task.output),
        callbacks=[MetricsStart(), StepSeed(), DiagnosisWarnings(), TakeTurns()],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    ).fit(module, datamodule=data)
