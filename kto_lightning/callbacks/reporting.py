"""What is about to be trained, said before the first step."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from kto_lightning.batches.class_weights import effective_ratio
from kto_lightning.distributed import warn
from kto_lightning.files import write_whole
from kto_lightning.models.following import FollowingReference
from kto_lightning.reports.data import (
    as_json,
    length_finding,
    report_of_training_set,
    write_data_report,
)
from kto_lightning.reports.diagnosis import RunningDiagnosis
from kto_lightning.reports.run.run_file import RunFile, write_run_file
from kto_lightning.reports.terminal import strip_trailing_spaces
from kto_lightning.training.metrics_csv import MetricsFile


class Summary(Callback):
    """What is about to be trained, on what and against what, before the first step."""

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        data_rows = _data_rows(data) if data.prepared.stream is None else _stream_rows(data)
        rows = [*data_rows, *_model_rows(module, data)]
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, value)
        with strip_trailing_spaces(console):
            console.print(table)
        warnings = list(data.prepared.warnings)
        num_steps = module.num_training_steps()
        if isinstance(module.reference, FollowingReference) and num_steps is not None:
            warnings += module.reference.warnings(num_steps)
        for warning in warnings:
            console.print(f"warning: {warning}", style="yellow")
        content = RunFile(
            planned_steps=num_steps,
            summary=[list(row) for row in rows],
            warnings=warnings,
        )
        write_run_file(trainer.default_root_dir, content)

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if data.prepared.stream is not None:
            print(f"stream    {data.prepared.stream.counts}", flush=True)


def _data_rows(data: Any) -> list[tuple[str, str]]:
    counts, weights = data.prepared.train_set.counts, data.prepared.class_weights
    good, bad = effective_ratio(counts.desirable, counts.undesirable, weights)
    dropped = counts.dropped_desirable + counts.dropped_undesirable + counts.dropped_empty
    where = f" ({', '.join(counts.dropped)}…)" if dropped else ""
    rows = [
        ("records", f"{counts.desirable} desirable, {counts.undesirable} undesirable"),
        ("dropped", f"{dropped}{where}"),
        (
            "truncated",
            f"{counts.truncated_desirable} desirable, {counts.truncated_undesirable} undesirable "
            f"to {data.batching.max_length} tokens",
        ),
        (
            "weights",
            f"desirable {weights.desirable:g}, undesirable {weights.undesirable:g}: "
            f"effective ratio {good:g} : {bad:g}",
        ),
        ("tokens", f"{counts.prompt_tokens} in prompts, {counts.completion_tokens} in completions"),
    ]
    if data.prepared.report_line:
        rows.append(("data report", data.prepared.report_line))
    if counts.prompts_not_prefix:
        rows.append(
            (
                "prompts",
                f"{counts.prompts_not_prefix} are not a prefix of their text; left out of the "
                f"first: {counts.lost_prompt_end!r}",
            )
        )
    return rows


def _stream_rows(data: Any) -> list[tuple[str, str]]:
    weights = data.prepared.class_weights
    return [
        ("records", f"streamed; partners from among {data.prepared.stream.buffer_size} neighbours"),
        ("weights", f"desirable {weights.desirable:g}, undesirable {weights.undesirable:g}"),
    ]


def _model_rows(module: Any, data: Any) -> list[tuple[str, str]]:
    parameters = list(module.policy.parameters())
    total = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    num_steps = module.num_training_steps() or "as many as the stream gives"
    attention = "packed, prompts shared by both completions"
    if module.padding_reason is not None:
        attention = f"padded, because {module.padding_reason}"
    per_step = data.batching.batch_size
    if data.prepared.train_set is not None:
        per_step = min(per_step, len(data.prepared.train_set))
    return [
        ("model", f"{module.model_settings.policy}: {trained:,} of {total:,} parameters trained"),
        ("reference", module.reference.description),
        ("attention", attention),
        ("steps", f"{num_steps}, {per_step} examples each"),
    ]


class MetricsStart(Callback):
    """Opens `metrics.csv` once the run knows at which step it begins."""

    def __init__(self) -> None:
        self._begun = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = True
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.begin(after_step=trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that was stopped in its last validation has no step left to take."""
        if not self._begun:
            self.on_train_start(trainer, pl_module)


class DataReportFile(Callback):
    """Writes `OUTPUT/data_report.json` before the first step; of a stream, which is not read by
    then, what was counted until the run ended."""

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if data.prepared.stream is not None:
            _write_stream_report(trainer)
            return
        report = report_of_training_set(
            data.train,
            data.prepared.train_set.records,
            data.prepared.train_set,
            batch_size=data.batching.batch_size,
            max_length=data.batching.max_length,
            tokenizer=data.prepared.tokenizer.name_or_path,
        )
        path = Path(trainer.default_root_dir) / "data_report.json"
        write_data_report(path, report)
        count = len(report.findings)
        found = f"{count} finding{'' if count == 1 else 's'}"
        data.prepared.report_line = f"{path}, {found} (report.html shows them)"
        sentence = length_finding(report)
        if sentence is not None:
            data.prepared.warnings.append(sentence[0].lower() + sentence[1:])

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.datamodule.prepared.stream is not None:  # pyright: ignore[reportAttributeAccessIssue]
            _write_stream_report(trainer)


def _write_stream_report(trainer: Any) -> None:
    stream = trainer.datamodule.prepared.stream
    sources = [stream.source] if isinstance(stream.source, str) else stream.source
    content = {"sources": sources, "streamed": True} | asdict(stream.counts)
    path = Path(trainer.default_root_dir) / "data_report.json"
    write_whole(path, as_json(content) + "\n", what="the data report")


class DiagnosisWarnings(Callback):
    """Warns on stderr of what `RunningDiagnosis` finds. A resumed run starts it afresh."""

    def __init__(self) -> None:
        self._diagnosis: RunningDiagnosis | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        self._diagnosis = RunningDiagnosis(module.objective.beta)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if not trainer.is_global_zero:
            return
        assert self._diagnosis is not None
        module: Any = pl_module
        row: Any = module.published.last_row
        for sentence in self._diagnosis.read(row):
            warn(trainer, sentence)
