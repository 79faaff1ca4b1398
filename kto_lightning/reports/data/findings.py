"""Findings of the data report: observation, meaning for KTO, what to do."""

import json
from collections.abc import Iterator
from math import sqrt

from kto_lightning.batches.class_weights import ClassWeights, imbalance_warning
from kto_lightning.data.lost import losses_of
from kto_lightning.reports.data.fields import DataReport
from kto_lightning.reports.data.order import single_label_chance
from kto_lightning.reports.data.record_findings import about_records, uncertain_records
from kto_lightning.reports.finding import Finding, capitalize_first

PREDICTIVE_AUC = 0.7
"""Length predicts the label if its AUC is at least this, or at most 1 minus this."""
MAX_SINGLE_LABEL = 0.2
"""Share of single-label batches in file order from which on they are reported."""
MAX_SHUFFLED = 0.2
"""The same after a shuffle, when only a larger batch size helps."""
LARGE_BATCH = 1024
MAX_TRUNCATED = 0.05
MAX_SAME_PROMPT = 0.05


def findings_of(report: DataReport) -> list[Finding]:
    """The findings of a report, by subject; its own `findings` are not read."""
    parts = (
        about_records,
        _about_labels,
        _about_order,
        _about_losses,
        _about_lengths,
        _about_prompts,
    )
    return [finding for part in parts for finding in part(report)]


def summary_sentences(report: DataReport) -> list[str]:
    """The findings that `fit` repeats in its summary, a sentence each."""
    found = (*uncertain_records(report), _length_finding(report))
    return [finding.sentence for finding in found if finding is not None]


def _about_labels(report: DataReport) -> Iterator[Finding]:
    labels, weights = report.labels, report.weights
    counts = labels.desirable, labels.undesirable
    if not all(counts):
        if any(counts):
            label = "desirable" if labels.desirable else "undesirable"
            yield Finding(
                grade="problem",
                what=f"All {sum(counts):,} records are {label}",
                meaning="KTO learns from the contrast of both classes and has none here",
                action="add records of the other label, if there are any",
            )
        return
    if imbalance_warning(*counts, ClassWeights(desirable=1.0, undesirable=1.0)):
        yield Finding(
            grade="note",
            what=f"The labels are {shown_ratio(report)}, outside 1:1 to 4:3",
            meaning="KTO needs both classes to have about equal weight, or the more frequent one "
            "dominates every step; class weights balance them",
            action="leave both at `auto`, which gives "
            f"desirable_weight {weights.desirable} and undesirable_weight {weights.undesirable}",
        )


def _about_order(report: DataReport) -> Iterator[Finding]:
    order, size = report.order, report.order.batch_size
    in_order, shuffled = order.single_label_batches, order.single_label_batches_shuffled
    if in_order is None or shuffled is None or size < 2 or order.kind == "one label":
        return
    if in_order >= MAX_SINGLE_LABEL and in_order > shuffled + 0.1:
        yield Finding(
            grade="note",
            what=f"In file order {in_order:.0%} of the batches of {size} hold one label only, "
            f"shuffled {shuffled:.0%}",
            meaning="KTO compares the rewards of a batch with one reference point, and a batch of "
            "one label moves all of them in the same direction",
            action="keep `--data.shuffle true`",
        )
    if shuffled > MAX_SHUFFLED:
        yield Finding(
            grade="warning",
            what=f"Even shuffled, {shuffled:.0%} of the batches of {size} hold one label only",
            meaning="such a batch does not contrast the two classes",
            action=_batch_size_action(report),
        )


def _batch_size_action(report: DataReport) -> str:
    """The action that makes single-label batches rare after a shuffle."""
    labels, size = report.labels, report.order.batch_size
    while (single_label_chance(labels.desirable, labels.undesirable, size) or 0) > MAX_SHUFFLED:
        size *= 2
        if size > LARGE_BATCH:
            return "add records of the rarer label"
    return f"raise `--data.batch_size` to {size}"


def _about_losses(report: DataReport) -> Iterator[Finding]:
    for loss in losses_of(report.lost_parts or [], report.other_end):
        yield Finding(
            grade="warning",
            what=capitalize_first(loss.what),
            meaning=loss.meaning,
            action=loss.action,
        )


def _about_lengths(report: DataReport) -> Iterator[Finding]:
    lengths = report.lengths
    if report.tokenizer_problem:
        yield Finding(
            grade="warning",
            what="Lengths are in characters, because the records could not be tokenized",
            meaning="`fit` would stop with the same error",
            action="fix the error shown below",
        )
    finding = _length_finding(report)
    if finding is not None:
        yield finding
    yield from _about_truncation(report)
    if lengths.prompts_not_prefix:
        yield Finding(
            grade="note",
            what=f"{lengths.prompts_not_prefix:,} tokenized prompts are not the beginning of their "
            f"tokenized text; their end (first {json.dumps(lengths.lost_prompt_end)}) is not "
            "trained on",
            meaning="as in TRL, the completion begins at the first token that differs. Generation "
            "starts after the whole prompt, so any difference but a space or an empty thinking "
            "block is an error",
            action="if it should be trained on, fix the generation prompt of the chat template, or "
            "remove the space at the end of plain prompts",
        )


def _length_finding(report: DataReport) -> Finding | None:
    lengths = report.lengths
    good, bad = lengths.completion.desirable, lengths.completion.undesirable
    if not _length_predicts_label(report) or lengths.auc is None or not good or not bad:
        return None
    longer = "longer" if lengths.auc > 0.5 else "shorter"
    return Finding(
        grade="warning",
        what=f"Length alone predicts the label (AUC {lengths.auc:.2f}): desirable completions are "
        f"the {longer} ones (median {good.median:,.0f} against {bad.median:,.0f} {lengths.unit})",
        meaning="KTO's rewards are sums over tokens, so the model may learn length alone",
        action="add desirable and undesirable completions of similar lengths, and watch the length "
        "of generated completions",
    )


def _length_predicts_label(report: DataReport) -> bool:
    """Whether the AUC is far from a half, and by at least three standard errors.

    The variance without a relation is (n_D + n_U + 1) / (12 n_D n_U) (Mann and Whitney 1947).
    """
    auc, good, bad = report.lengths.auc, report.labels.desirable, report.labels.undesirable
    if auc is None or not good or not bad:
        return False
    error = sqrt((good + bad + 1) / (12 * good * bad))
    return abs(auc - 0.5) >= max(PREDICTIVE_AUC - 0.5, 3 * error)


def _about_truncation(report: DataReport) -> Iterator[Finding]:
    truncation = report.lengths.truncation
    if truncation is None or not report.examples:
        return
    dropped = truncation.dropped.desirable + truncation.dropped.undesirable
    truncated = truncation.truncated.desirable + truncation.truncated.undesirable
    if dropped:
        yield Finding(
            grade="warning",
            what=f"{dropped:,} of {report.examples:,} prompts fill max_length "
            f"{truncation.max_length:,} alone and are dropped",
            meaning="no token of their completions is left to train on",
            action="raise `--data.max_length`, or set `--data.truncation keep_end`",
        )
    if truncated > MAX_TRUNCATED * report.examples:
        yield Finding(
            grade="warning",
            what=f"{truncated:,} of {report.examples:,} records are cut at max_length "
            f"{truncation.max_length:,} ({truncation.truncated.desirable:,} desirable, "
            f"{truncation.truncated.undesirable:,} undesirable)",
            meaning="their end, including the end-of-text token, is not trained on: the model does "
            "not learn from them when to stop",
            action="raise `--data.max_length` if memory allows",
        )


def _about_prompts(report: DataReport) -> Iterator[Finding]:
    repeats = report.repeats
    most_common, same = repeats.commonest_prompt_share, repeats.same_prompt_mismatches
    if repeats.distinct_prompts == 1 and report.examples > 1:
        yield Finding(
            grade="problem",
            what="All records share one prompt",
            meaning="KTO's reference point needs completions of another prompt, and there are none",
            action="add records with other prompts, or use `--model.loss apo_zero_unpaired`",
        )
    elif most_common is not None and most_common > 0.5 and report.examples > 1:
        yield Finding(
            grade="warning",
            what=f"One prompt holds {most_common:.0%} of all records",
            meaning="some mismatched completions are used more than once, so the estimate of the "
            "reference point is based on fewer of them",
            action="add records with other prompts",
        )
    elif same is not None and same >= MAX_SAME_PROMPT:
        yield Finding(
            grade="note",
            what=f"With TRL's pairing {same:.0%} of the mismatched completions would answer the "
            "same prompt and not be mismatched",
            meaning="KTO's reference point would contain the rewards of matched completions",
            action="keep `--data.pairing distinct_prompts`",
        )


def shown_ratio(report: DataReport) -> str:
    """The ratio of desirable to undesirable records, such as `2.94 : 1` or `1 : 1.64`."""
    good, bad = report.labels.desirable, report.labels.undesirable
    if not good or not bad:
        return f"{good:,} : {bad:,}"
    return f"{good / bad:.3g} : 1" if good >= bad else f"1 : {bad / good:.3g}"
