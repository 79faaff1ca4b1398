"""The run report as a page."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kto_lightning.reports.data.fields import DataReport
from kto_lightning.reports.data.findings import findings_of
from kto_lightning.reports.data.page import comparison, data_charts
from kto_lightning.reports.finding import Finding
from kto_lightning.reports.html import Fact, Page, Sample, Section, Table, write_page
from kto_lightning.reports.run.curves import run_charts
from kto_lightning.reports.run.run import Run, read_run
from kto_lightning.reports.run.verdict import headline, verdict


def write_run_report(output_dir: str | Path, html: str | Path | None = None) -> tuple[Path, str]:
    """Write the report of a run, finished or not, as an HTML page.

    Args:
        output_dir: the run's OUTPUT.
        html: path of the page; None: `OUTPUT/report.html`.

    Returns:
        The path of the page, and the verdict in up to four sentences.

    Raises:
        KTOError: if there is no run, matplotlib is missing, or the page cannot be written.
    """
    run = read_run(output_dir)
    path = Path(html) if html is not None else run.directory / "report.html"
    findings = verdict(run)
    write_page(run_page(run, findings), path)
    return path, headline(findings)


def run_page(run: Run, findings: list[Finding]) -> Page:
    """The page of a run.

    Args:
        findings: its verdict.
    """
    charts = list(run_charts(run))
    sections = [Section(title="Verdict", findings=findings)]
    if charts:
        sections.append(Section(title="Curves", charts=charts, text=[_curves_text(run)]))
    sections += [*_held_out_sections(run), *_generation_sections(run), *_data_sections(run)]
    details = [*_changes(run), *run.file.warnings]
    if run.file.summary or details:
        table = Table(header=[], rows=[list(row) for row in run.file.summary])
        sections.append(Section(title="The run", table=table, details=details))
    settings = list(_flat(run.settings))
    if settings:
        sections.append(
            Section(
                title="Settings",
                text=["From config.yaml; keys that are null are omitted."],
                collapsed=Table(header=["key", "value"], rows=settings),
            )
        )
    return Page(
        title="Run report",
        subtitle=str(run.directory),
        headline=headline(findings),
        facts=list(_facts(run)),
        sections=sections,
        footer="Written by kto_lightning from metrics.csv, config.yaml and data_report.json. "
        "Rewards are β · log(policy / reference), log-probs and z0 are in nats.",
    )


def _curves_text(run: Run) -> str:
    text = "Over completed optimizer steps. Thin or shaded: batch by batch; thick: running mean."
    missing = [
        name
        for name in ("loss", "z0", "z0_raw", "grad_norm", "lr", "reward/margin")
        if f"train/{name}" not in run.columns
    ]
    if missing:
        text += f" This metrics.csv has no {', '.join(missing)}."
    return text


def _facts(run: Run) -> Iterator[Fact]:
    if not len(run.steps):
        return
    planned = run.file.planned_steps
    yield Fact(
        name="Steps",
        value=f"{run.steps[-1]:,}",
        hint="finished" if run.file.finished else _hint(run.status, planned),
    )
    for name, column, form in (
        ("Loss", "train/loss", "{:.3f}"),
        ("Margin", "train/reward/margin", "{:.2f}"),
        ("Held-out AUC", "val/reward/auc", "{:.3f}"),
        ("Held-out margin", "val/reward/margin", "{:.2f}"),
        ("z0 in nats", "train/z0", "{:.3g}"),
    ):
        known = run.measured(column)
        if not len(known):
            continue
        if column.startswith("val/"):
            yield Fact(name=name, value=form.format(known[-1]), hint="at the last validation")
            continue
        window = max(1, min(20, len(known) // 4))
        yield Fact(
            name=name,
            value=form.format(known[-window:].mean()),
            hint=f"last {window} steps" if window > 1 else "last step",
        )
    speed, memory = run.measured("train/tokens_per_second"), run.measured("train/peak_memory_mib")
    if len(speed):
        yield Fact(name="Tokens per second", value=f"{np.median(speed):,.0f}", hint="median")
    if len(memory):
        yield Fact(name="Memory", value=f"{memory.max():,.0f} MiB", hint="highest")


def _changes(run: Run) -> Iterator[str]:
    for change in run.file.changes:
        key, before, after, step = map(change.get, ("key", "before", "after", "step"))
        yield f"--{key} {before} -> {after} from step {step} on"


def _hint(status: str | None, planned: int | None) -> str:
    of = [f"of {planned:,}"] if planned else []
    return ", ".join([*of, *([status] if status else [])])


def _held_out_sections(run: Run) -> Iterator[Section]:
    names = [name for name in run.columns if name.startswith("val/") and len(run.measured(name))]
    if not names:
        return
    at = np.flatnonzero(np.isfinite(run.column(names[0])))
    at = np.unique(at[np.linspace(0, len(at) - 1, min(len(at), 8)).round().astype(int)])
    rows = [
        [name.removeprefix("val/"), *(_cell(run.column(name)[row]) for row in at.tolist())]
        for name in names
    ]
    yield Section(
        title="Held-out records",
        table=Table(header=["", *(f"step {run.steps[row]:,}" for row in at.tolist())], rows=rows),
    )


def _cell(value: Any) -> str:
    return f"{value:.4g}" if np.isfinite(value) else "-"


def _generation_sections(run: Run) -> Iterator[Section]:
    """Completions before and after training, if the run generated them."""
    content = run.generations
    if content is None or not isinstance(content.get("samples"), list):
        return
    samples = []
    for one in content["samples"]:
        answers = [("before training", one.get("before")), ("after training", one.get("after"))]
        recorded = f"in the data, marked {'desirable' if one.get('desirable') else 'undesirable'}"
        answers.append((recorded, one.get("completion")))
        samples.append(
            Sample(
                prompt=str(one.get("prompt", "")),
                answers=[
                    (name, "(not recorded)" if text is None else str(text) or "(nothing)")
                    for name, text in answers
                ],
            )
        )
    source = content.get("source")
    text = (
        "For held-out prompts, which the policy was not trained on."
        if source == "validation"
        else "For training prompts, as no records were held out (--data.validation)."
    )
    tokens = content.get("max_new_tokens")
    yield Section(
        title="Answers before and after",
        text=[f"{text} Greedy decoding, at most {tokens} tokens."],
        samples=samples,
    )


def _data_sections(run: Run) -> Iterator[Section]:
    if run.data is None:
        return
    if run.data.get("streamed"):
        yield Section(
            title="Data", text=["The records were streamed; `inspect` reports on their files."]
        )
        return
    try:
        report = DataReport.from_dict(run.data)
        section = Section(
            title="Data",
            findings=findings_of(report) or [Finding(grade="good", what="Nothing stands out")],
            charts=list(data_charts(report)),
            collapsed=comparison([report]),
        )
    except (ValueError, ArithmeticError, LookupError):  # no report, or one with odd values
        section = Section(
            title="Data",
            text=["data_report.json is from another version; `inspect` writes a new one."],
        )
    yield section


def _flat(settings: dict, prefix: str = "") -> Iterator[list[str]]:
    """Settings that are not null, by `group.key`."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield [f"{prefix}{key}", str(value)]
