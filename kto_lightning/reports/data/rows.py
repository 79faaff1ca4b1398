"""Table rows of the data report, shared by terminal and page."""

from collections.abc import Callable, Iterator
from pathlib import Path

from kto_lightning.reports.data.fields import DataReport, PerClass, Quantiles
from kto_lightning.reports.data.findings import shown_ratio

MAX_COLUMNS = 12
MAX_NAME = 60
"""Characters of a column's name; a name may be as long as a text."""
NOTHING = "-"

Cell = Callable[[DataReport], str]


def title_of(report: DataReport, beside: list[DataReport]) -> str:
    """The file name without its suffix; the path if another report has the same name."""
    same = [other for other in beside if _names(other) == _names(report)]
    return ", ".join(_names(report) if len(same) == 1 else report.sources)


def _names(report: DataReport) -> list[str]:
    return [Path(source).name.removesuffix(Path(source).suffix) for source in report.sources]


def sections_of(reports: list[DataReport]) -> dict[str, dict[str, Cell]]:
    """Sections of rows by their titles; each row is a name and a function of a report.

    Without a usable record in any of the reports, there is nothing to say but of the records.
    """
    size = reports[0].order.batch_size
    sections: dict[str, dict[str, Cell]] = {
        "Records": {
            "examples": lambda report: f"{report.examples:,}",
            "bad records": lambda report: f"{report.bad_records.count:,}",
            "left out": _left_out,
            "read as": lambda report: "\n".join(report.read_as) or NOTHING,
            "format": _format,
            "columns": _columns,
        },
        "Labels": {
            "desirable : undesirable": _counts,
            "ratio": shown_ratio,
            "first 30 (T good, F bad)": _first_labels,
            "desirable_weight": lambda report: str(report.weights.desirable),
            "undesirable_weight": lambda report: str(report.weights.undesirable),
            "effective ratio": _effective,
        },
        "Order": {
            "order": lambda report: report.order.kind,
            "neighbours that differ": _changes,
            "longest run, T / F": lambda report: _pair(report.order.longest_run),
            f"one-label batches of {size}": _single_label,
        },
        "Lengths": _length_rows(),
        "Repeats": {
            "different prompts": lambda report: f"{report.repeats.distinct_prompts:,}",
            "records sharing a prompt": lambda report: _percent(
                report.repeats.repeated_prompt_share
            ),
            "exact duplicates": lambda report: f"{report.repeats.exact_duplicates.count:,}",
            "contradictory labels": lambda report: f"{report.repeats.contradictory_labels.count:,}",
            "empty completions": lambda report: f"{report.empty_completions.count:,}",
            "TRL's y' of same prompt": lambda report: _percent(
                report.repeats.same_prompt_mismatches
            ),
        },
    }
    return (
        sections if any(report.examples for report in reports) else {"Records": sections["Records"]}
    )


def _length_rows() -> dict[str, Cell]:
    return {
        "counted in": lambda report: report.lengths.unit,
        "shown as": lambda _: "median / 95% / longest",
        "desirable completions": lambda report: _quantiles(report.lengths.completion.desirable),
        "undesirable completions": lambda report: _quantiles(report.lengths.completion.undesirable),
        "prompts of desirable": lambda report: _quantiles(report.lengths.prompt.desirable),
        "prompts of undesirable": lambda report: _quantiles(report.lengths.prompt.undesirable),
        "prompt share of all": lambda report: _percent(report.lengths.prompt_share),
        "AUC of length for label": _auc,
        "truncated, T / F": _truncated,
        "dropped, T / F": _dropped,
        "prompt is not a prefix": _not_prefix,
    }


def _counts(report: DataReport) -> str:
    return f"{report.labels.desirable:,} : {report.labels.undesirable:,}"


def _first_labels(report: DataReport) -> str:
    letters = "".join("T" if label else "F" for label in report.labels.first)
    return " ".join(letters[start : start + 10] for start in range(0, len(letters), 10))


def _effective(report: DataReport) -> str:
    weights = report.weights
    good, bad = weights.effective_desirable, weights.effective_undesirable
    if not good or not bad:
        return f"{good:g} : {bad:g}"
    return f"{good:.8g} : {bad:.8g} ≈ {round(good / bad, 2):g} : 1"


def _changes(report: DataReport) -> str:
    order = report.order
    if order.changes is None:
        return NOTHING
    return f"{_percent(order.changes)} (chance {_percent(order.changes_by_chance)})"


def _single_label(report: DataReport) -> str:
    order = report.order
    if order.single_label_batches is None:
        return NOTHING
    shuffled = _percent(order.single_label_batches_shuffled)
    return f"{_percent(order.single_label_batches)} (shuffled {shuffled})"


def _format(report: DataReport) -> str:
    form = report.format
    parts = [form.kind]
    if form.user_turns is not None:
        parts.append(f"{form.user_turns:.1f} user turns (most {form.most_user_turns})")
    shares = {"system": form.system_share, "tools": form.tools_share}
    shares["tool calls"] = form.tool_call_share
    parts += [f"{name} {_percent(share)}" for name, share in shares.items() if share]
    return "\n".join(parts)


def _left_out(report: DataReport) -> str:
    return "\n".join(f"{count:,} {why}" for why, count in report.left_out.items()) or NOTHING


def _columns(report: DataReport) -> str:
    lines = [
        f"{_shortened(column.name)}: {column.type or 'null'}"
        + (f" ({column.filled:,} filled)" if column.filled != _most_filled(report) else "")
        for column in report.columns[:MAX_COLUMNS]
    ]
    hidden = len(report.columns) - len(lines)
    return "\n".join([*lines, f"and {hidden} more"] if hidden else lines)


def _shortened(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"


def _most_filled(report: DataReport) -> int:
    return max(column.filled for column in report.columns)


def _auc(report: DataReport) -> str:
    return NOTHING if report.lengths.auc is None else f"{report.lengths.auc:.2f}"


def _truncated(report: DataReport) -> str:
    truncation = report.lengths.truncation
    if truncation is None:
        return NOTHING
    return f"{_pair(truncation.truncated)} (at {truncation.max_length:,})"


def _dropped(report: DataReport) -> str:
    truncation = report.lengths.truncation
    return NOTHING if truncation is None else _pair(truncation.dropped)


def _not_prefix(report: DataReport) -> str:
    count = report.lengths.prompts_not_prefix
    return NOTHING if count is None else f"{count:,}"


def _quantiles(lengths: Quantiles | None) -> str:
    if lengths is None:
        return NOTHING
    return f"{lengths.median:,.0f} / {lengths.q95:,.0f} / {lengths.maximum:,.0f}"


def _pair(counts: PerClass[int]) -> str:
    return f"{counts.desirable:,} / {counts.undesirable:,}"


def _percent(share: float | None) -> str:
    """Whole percents; `<1%` and `>99%` where rounding would give 0% or 100%."""
    if share is None:
        return NOTHING
    if 0 < share < 0.005 or 0.995 <= share < 1:
        return "<1%" if share < 0.5 else ">99%"
    return f"{share:.0%}"


def details_of(report: DataReport) -> Iterator[str]:
    """Lines on the first bad records and on a failure of the tokenizer."""
    bad = report.bad_records
    shown = bad.first if report.guide is None else bad.first[:1]
    yield from shown
    if bad.count > len(shown):
        yield f"and {bad.count - len(shown):,} more"
    if report.tokenizer_problem:
        yield from report.tokenizer_problem.splitlines()
