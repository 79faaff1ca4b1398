"""The data report as an HTML page: tables side by side, findings and charts of each file."""

from collections.abc import Iterator

import numpy as np

from kto_lightning.errors import printable
from kto_lightning.reports.data.fields import DataReport, Histogram
from kto_lightning.reports.data.findings import findings_of, shown_ratio
from kto_lightning.reports.data.guide_lines import guide_lines, tried_lines
from kto_lightning.reports.data.rows import NOTHING, details_of, sections_of, title_of
from kto_lightning.reports.finding import Finding
from kto_lightning.reports.html import Chart, Colour, Fact, Page, Section, Series, Table

MIN_BIN_RECORDS = 5
"""Least records of a bin whose share of desirable ones is shown."""


def data_page(reports: list[DataReport]) -> Page:
    """The page of one or several reports."""
    sections = [
        Section(
            title="Side by side" if len(reports) > 1 else "In numbers", table=comparison(reports)
        )
    ]
    for report in reports:
        sections += data_sections(report, name=title_of(report, reports))
    if len(reports) == 1:
        sections = [*sections[1:], sections[0]]
    return Page(
        title="Data report",
        subtitle=", ".join(", ".join(report.sources) for report in reports),
        headline=_headline(reports),
        facts=data_facts(reports[0]) if len(reports) == 1 else [],
        sections=sections,
        footer="Written by `python -m kto_lightning inspect`. Blue and solid: desirable; orange "
        "and dashed: undesirable.",
    )


def _headline(reports: list[DataReport]) -> str:
    counts = [0, 0]
    for report in reports:
        for one in findings_of(report):
            counts[0] += one.grade == "problem"
            counts[1] += one.grade == "warning"
    named = [
        f"{count} {word}{'' if count == 1 else 's'}"
        for count, word in zip(counts, ("problem", "warning"), strict=True)
        if count
    ]
    files = "The file has" if len(reports) == 1 else f"The {len(reports)} files have"
    if not named:
        return f"{files} no problems and no warnings."
    return f"{files} {' and '.join(named)}. Each finding says what to do."


def data_facts(report: DataReport) -> list[Fact]:
    """The numbers to read first."""
    weights, lengths = report.weights, report.lengths
    return [
        Fact(name="Records", value=f"{report.examples:,}"),
        Fact(
            name="Desirable : undesirable",
            value=f"{report.labels.desirable:,} : {report.labels.undesirable:,}",
            hint=shown_ratio(report),
        ),
        Fact(
            name="Class weights",
            value=f"{weights.desirable:g} : {weights.undesirable:g}",
            hint="what `auto` gives",
        ),
        Fact(name="Order of labels", value=report.order.kind),
        Fact(
            name="Length predicts the label",
            value=NOTHING if lengths.auc is None else f"{lengths.auc:.2f}",
            hint="AUC; 0.5: not at all",
        ),
        Fact(name="Bad records", value=f"{report.bad_records.count:,}"),
    ]


def comparison(reports: list[DataReport]) -> Table:
    """The rows of the terminal report, with a column per file."""
    rows: list[list[str]] = []
    for section, cells in sections_of(reports).items():
        rows.append([section])
        for name, cell in cells.items():
            shown = [cell(report) for report in reports]
            if set(shown) != {NOTHING}:
                rows.append([name, *shown])
    return Table(header=["", *(title_of(report, reports) for report in reports)], rows=rows)


def data_sections(report: DataReport, *, name: str) -> list[Section]:
    """Findings and charts of one file."""
    findings = findings_of(report)
    return [
        Section(
            title=name,
            findings=findings or [Finding(grade="good", what="Nothing stands out")],
            charts=list(data_charts(report)),
            details=list(details_of(report)),
            listing=[printable(line) for line in (*guide_lines(report), *tried_lines(report))],
            text=[]
            if report.tokenizer
            else [
                "Lengths are in characters. With --tokenizer DIR they are in tokens, and the "
                "page shows what max_length truncates."
            ],
        )
    ]


def data_charts(report: DataReport) -> Iterator[Chart]:
    """Lengths per class, label order along the file, truncation, length against label."""
    shapes = report.shapes
    if shapes is None:
        return
    unit = report.lengths.unit
    for what, histogram in (("completions", shapes.completion), ("prompts", shapes.prompt)):
        yield _length_chart(histogram, f"Length of {what}", unit)
    yield _order_chart(report)
    if report.lengths.unit == "tokens":
        yield _truncation_chart(report)
    chart = _label_chart(report)
    if chart is not None:
        yield chart


def _length_chart(histogram: Histogram, title: str, unit: str) -> Chart:
    edges = np.array(histogram.edges)
    counts: dict[Colour, list[int]] = {
        "desirable": histogram.desirable,
        "undesirable": histogram.undesirable,
    }
    return Chart(
        title=title,
        x_label=f"{unit} (logarithmic)",
        y_label="share of the class",
        log_x=True,
        percent=True,
        series=[
            Series(name=name, x=edges, y=np.array(of) / sum(of), colour=name, kind="steps")
            for name, of in counts.items()
            if sum(of)
        ],
        caption="Each class adds up to 100%. Where the two differ, length predicts the label.",
    )


def _order_chart(report: DataReport) -> Chart:
    assert report.shapes is not None
    records = np.array(report.shapes.stretch_records, dtype=float)
    good = np.array(report.shapes.stretch_desirable, dtype=float)
    return Chart(
        title="Label order along the file",
        x_label="record, in file order",
        y_label="desirable",
        percent=True,
        zero=True,
        series=[
            Series(
                name="desirable, per stretch",
                x=np.concatenate([[0.0], np.cumsum(records)]),
                y=good / records,
                kind="bars",
            )
        ],
        level=("desirable, whole file", float(good.sum() / records.sum())),
        caption=f"Order: {report.order.kind} ({report.order.rule}). Stretches of "
        f"{int(records.max()):,} records; --data.shuffle true mixes them.",
    )


def _truncation_chart(report: DataReport) -> Chart:
    assert report.shapes is not None
    histogram, truncation = report.shapes.both, report.lengths.truncation
    edges = np.array(histogram.edges[1:])
    counts: dict[Colour, list[int]] = {
        "desirable": histogram.desirable,
        "undesirable": histogram.undesirable,
    }
    return Chart(
        title="Records truncated by max_length",
        x_label="max_length in tokens (logarithmic)",
        y_label="records truncated",
        log_x=True,
        percent=True,
        zero=True,
        series=[
            Series(name=name, x=edges, y=1 - np.cumsum(of) / sum(of), colour=name)
            for name, of in counts.items()
            if sum(of)
        ],
        marks=[] if truncation is None else [("max_length", float(truncation.max_length))],
        caption="Share of each class whose prompt and completion together are longer than "
        "max_length.",
    )


def _label_chart(report: DataReport) -> Chart | None:
    assert report.shapes is not None
    histogram = report.shapes.completion
    good, bad = np.array(histogram.desirable), np.array(histogram.undesirable)
    total, edges = good + bad, np.array(histogram.edges)
    shown = total >= MIN_BIN_RECORDS
    if not shown.any() or not good.any() or not bad.any():
        return None
    share = good[shown] / total[shown]
    return Chart(
        title="Length against label",
        x_label=f"length of the completion in {report.lengths.unit} (logarithmic)",
        y_label="desirable",
        log_x=True,
        percent=True,
        series=[
            Series(
                name="desirable among completions of this length",
                x=np.sqrt(edges[:-1] * edges[1:])[shown],
                y=share,
                spread=np.sqrt(share * (1 - share) / total[shown]),
                kind="points",
            )
        ],
        level=("all lengths", float(good.sum() / total.sum())),
        caption="A flat line: length does not predict the label. Bars are one standard error; "
        f"lengths of fewer than {MIN_BIN_RECORDS} completions are omitted.",
    )
