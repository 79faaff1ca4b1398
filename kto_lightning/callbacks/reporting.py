"""Reports of a run: `metrics.csv`, the data report, the summary before the first step, warnings.

`DataReportFile` comes before `Summary`, which prints its line and its warning.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kto_lightning.batches.class_weights import effective_ratio
from kto_lightning.callbacks.lightning_state import kto_data, kto_module
from kto_lightning.callbacks.memory import memory_rows
from kto_lightning.data.datamodule import KTODataModule
from kto_lightning.data.prepared import PreparedData
from kto_lightning.data.rewards import check_writable, rewards_paths
from kto_lightning.data.sources import names_of
from kto_lightning.data.streaming.stream import ExampleStream
from kto_lightning.distributed import warn
from kto_lightning.errors import printable
from kto_lightning.files import write_whole
from kto_lightning.models.following import FollowingReference
from kto_lightning.models.lora_layers import left_out
from kto_lightning.models.routes.choose import explain_obstacles
from kto_lightning.models.routes.runner import RouteName
from kto_lightning.models.text_part import shown_names
from kto_lightning.module import KTOModule
from kto_lightning.reports.data import (
    as_json,
    report_of_training_set,
    summary_sentences,
    write_data_report,
)
from kto_lightning.reports.diagnosis import RunningDiagnosis
from kto_lightning.reports.run.run_file import RunFile, write_run_file
from kto_lightning.reports.terminal import strip_trailing_spaces
from kto_lightning.training.metrics_csv import MetricsFile
from kto_lightning.training.run_lock import this_process

Row = tuple[str, str]
"""A name and a text of the summary's table."""


class MetricsStart(Callback):
    """Opens `metrics.csv` once the step is known from which the run starts or resumes."""

    def __init__(self) -> None:
        self._is_open = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_open = True
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.begin(after_step=trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open it for a run resumed after its last step, whose training never starts."""
        if not self._is_open:
            self.on_train_start(trainer, pl_module)


class DataReportFile(Callback):
    """Writes `OUTPUT/data_report.json` before the first step. A stream has not been read by then:
    its counts are written at the start, and again when training ends."""

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module_data = kto_data(trainer)
        data, batching = module_data.prepared, module_data.batching
        if data.stream is not None:
            _write_stream_report(data.stream, trainer)
            return
        assert module_data.train is not None
        assert data.train_set is not None
        report = report_of_training_set(
            module_data.train,
            data.train_set.records,
            data.train_set,
            batch_size=batching.batch_size,
            max_length=batching.max_length,
            tokenizer=data.tokenizer.name_or_path,
            other_end=data.train_set.other_end(data.end_ids, data.tokenizer),
        )
        path = _data_report_path(trainer)
        write_data_report(path, report)
        count = len(report.findings)
        findings = f"{count} finding{'' if count == 1 else 's'}"
        data.report_line = f"{path}, {findings} (report.html shows them)"
        data.warnings += [text[0].lower() + text[1:] for text in summary_sentences(report)]

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stream = kto_data(trainer).prepared.stream
        if stream is not None:
            _write_stream_report(stream, trainer)


def _write_stream_report(stream: ExampleStream, trainer: Trainer) -> None:
    names = names_of(stream.source)
    sources = [names] if isinstance(names, str) else names
    content = {"sources": sources, "streamed": True, "read_as": stream.reader.notes}
    content |= asdict(stream.counts)
    write_whole(_data_report_path(trainer), as_json(content) + "\n", what="the data report")


def _data_report_path(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / "data_report.json"


class Summary(Callback):
    """Prints data, model, reference and steps before the first step, with all warnings so far, and
    writes them to `OUTPUT/run.json`; prints a stream's counts at the end."""

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module, data = kto_module(pl_module), kto_data(trainer)
        readings = [("reading", text) for text in data.prepared.readings]
        rows = [*readings, *_data_rows(data), *_model_rows(module, data)]
        rows += memory_rows(trainer, module, data)
        warnings, num_steps = list(data.prepared.warnings), module.num_training_steps()
        if isinstance(module.reference, FollowingReference) and num_steps is not None:
            warnings += module.reference.warnings(num_steps)
        for change in module.resumption.latest:
            print(f"changed   {change}")
        _print_summary(rows, warnings)
        content = RunFile(
            planned_steps=num_steps,
            status="running",
            process=this_process(),
            changes=module.resumption.changes,
            summary=[list(row) for row in rows],
            warnings=warnings,
        )
        write_run_file(trainer.default_root_dir, content)

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stream = kto_data(trainer).prepared.stream
        if stream is not None:
            print(f"stream    {stream.counts}", flush=True)


def _print_summary(rows: list[Row], warnings: list[str]) -> None:
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    with strip_trailing_spaces(console):
        console.print(table)
    for warning in warnings:
        console.print(Text(f"warning: {printable(warning)}", style="yellow"))


def _data_rows(module_data: KTODataModule) -> list[Row]:
    data = module_data.prepared
    if data.stream is not None:
        return _stream_rows(data, data.stream)
    assert data.train_set is not None
    assert data.class_weights is not None
    counts, weights = data.train_set.counts, data.class_weights
    desirable, undesirable = effective_ratio(counts.desirable, counts.undesirable, weights)
    dropped = counts.dropped_desirable + counts.dropped_undesirable
    where = f" ({', '.join(counts.dropped)}…)" if dropped else ""
    rows = [
        ("records", f"{counts.desirable} desirable, {counts.undesirable} undesirable"),
        ("dropped", f"{dropped}{where}"),
        (
            "truncated",
            f"{counts.truncated_desirable} desirable, {counts.truncated_undesirable} undesirable "
            f"to {module_data.batching.max_length} tokens",
        ),
        (
            "weights",
            f"desirable {weights.desirable:g}, undesirable {weights.undesirable:g}: "
            f"effective ratio {desirable:g} : {undesirable:g}",
        ),
        ("tokens", f"{counts.prompt_tokens} in prompts, {counts.completion_tokens} in completions"),
    ]
    if data.report_line:
        rows.append(("data report", data.report_line))
    if counts.prompts_not_prefix:
        rows.append(
            (
                "prompts",
                f"{counts.prompts_not_prefix} are not a prefix of their text; dropped from the "
                f"first: {counts.lost_prompt_end!r}",
            )
        )
    return rows


def _stream_rows(data: PreparedData, stream: ExampleStream) -> list[Row]:
    weights = data.class_weights
    assert weights is not None
    return [
        ("records", f"streamed; partners from among {stream.buffer_size} neighbours"),
        ("weights", f"desirable {weights.desirable:g}, undesirable {weights.undesirable:g}"),
    ]


_ROUTES: dict[RouteName, str] = {
    "packed": "packed, prompts shared by both completions",
    "cached": "cached, prompts once and both completions on top of them",
    "padded": "padded, each completion with its prompt",
}


def _model_rows(module: KTOModule, data: KTODataModule) -> list[Row]:
    assert module.policy is not None
    assert module.reference is not None
    parameters = list(module.policy.parameters())
    total = sum(p.numel() for p in parameters)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    num_steps = module.num_training_steps() or "as many as the stream gives"
    route = _ROUTES[module.policy.route]
    if module.route_obstacles:
        route = f"{route}; {explain_obstacles(module.route_obstacles)}"
    per_step = data.batching.batch_size
    if data.prepared.train_set is not None:
        per_step = min(per_step, len(data.prepared.train_set))
    trained = f"{trainable:,} of {total:,} parameters trained"
    if module.unused_modules:
        trained += f"; frozen, as no text reaches it: {shown_names(module.unused_modules)}"
    lora = module.model_settings.lora
    unadapted = left_out(module.policy.model, module.unused_modules)
    if lora is not None and lora.exclude_modules is None and unadapted:
        trained += f"; no adapter on {', '.join(unadapted)}, which peft cannot adapt"
    return [
        ("model", f"{module.model_settings.policy}: {trained}"),
        ("reference", module.reference.description),
        ("route", route),
        ("steps", f"{num_steps}, {per_step} examples each"),
    ]


class WritableRewards(Callback):
    """Checks that `predict` can write its rewards, before the model is loaded.

    Args:
        output_dir: where; None: beside the records.

    Raises:
        DataError, KTOError: as `rewards_paths` and `check_writable`.
    """

    def __init__(self, output_dir: str | None) -> None:
        self._output_dir = output_dir

    @rank_zero_only
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        examples = kto_data(trainer).prepared.predict_set
        assert examples is not None
        check_writable(rewards_paths(examples, self._output_dir).values())


class DiagnosisWarnings(Callback):
    """Prints the warnings of `RunningDiagnosis` on stderr. A resumed run starts it over."""

    def __init__(self) -> None:
        self._diagnosis: RunningDiagnosis | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._diagnosis = RunningDiagnosis(kto_module(pl_module).objective.beta)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if not trainer.is_global_zero:
            return
        assert self._diagnosis is not None
        for sentence in self._diagnosis.read(kto_module(pl_module).published.last_row):
            warn(trainer, sentence)
