"""One plain sentence for each thing in the data that matters: what it is, and what to do."""

import json
from collections.abc import Iterator
from math import sqrt
from pathlib import Path

from kto_lightning.data.weights import ClassWeights, check_weights
from kto_lightning.report.fields import DataReport, Places
from kto_lightning.report.sections import single_label_chance

TELLING_AUC = 0.7
"""Length predicts the label from here on, and from 1 minus this downwards."""
MANY_SINGLE_LABEL = 0.2
"""Share of single-label batches from which on they are worth a word."""
MANY_SHUFFLED = 0.2
"""The same for batches that are shuffled, which nothing but their size can mend."""
LARGE_BATCH = 1024
MUCH_TRUNCATED = 0.05
MANY_SAME_PROMPT = 0.05


def findings_of(report: DataReport) -> list[str]:
    """What stands out in a report, gravest first; the report's own `findings` are not looked at."""
    parts = (_about_records, _about_labels, _about_order, _about_lengths, _about_prompts)
    return [sentence for part in parts for sentence in part(report)]


def _about_records(report: DataReport) -> Iterator[str]:
    bad, repeats = report.bad_records, report.repeats
    if not report.examples:
        yield "There is no usable record: mend the records named below, or give another file."
    elif bad.count:
        yield (
            f"{bad.count:,} {_are(bad, 'record cannot', 'records cannot')} be used and would stop "
            "`fit` before its first step: mend or drop what is named below."
        )
    contradictory, empty = repeats.contradictory_labels, report.empty_completions
    if contradictory.count:
        yield (
            f"{contradictory.count:,} "
            f"{_are(contradictory, 'completion carries', 'completions carry')} both labels for the "
            f"same prompt, which cancel out: keep one of the two ({_shown(contradictory)})."
        )
    if repeats.exact_duplicates.count:
        duplicates = repeats.exact_duplicates
        yield (
            f"{duplicates.count:,} {_are(duplicates, 'record repeats', 'records repeat')} an "
            f"earlier one word for word, which makes it count again: drop those that are not "
            f"meant to ({_shown(duplicates)})."
        )
    if empty.count:
        yield (
            f"{empty.count:,} {_are(empty, 'completion is', 'completions are')} empty, from which "
            f"only when to stop is learnt: drop or fill them ({_shown(empty)})."
        )


def _about_labels(report: DataReport) -> Iterator[str]:
    labels, weights = report.labels, report.weights
    counts = labels.desirable, labels.undesirable
    if not all(counts):
        single = check_weights(*counts, ClassWeights(desirable=1.0, undesirable=1.0))
        if single:
            yield single[0].upper() + single[1:]
        return
    if check_weights(*counts, ClassWeights(desirable=1.0, undesirable=1.0)):
        yield (
            f"The labels are {shown_ratio(report)}, outside 1:1 to 4:3: leave both class weights "
            f"at `auto`, which gives desirable_weight {weights.desirable} and "
            f"undesirable_weight {weights.undesirable}."
        )


def _about_order(report: DataReport) -> Iterator[str]:
    order, size = report.order, report.order.batch_size
    in_order, shuffled = order.single_label_batches, order.single_label_batches_shuffled
    if in_order is None or shuffled is None or size < 2 or order.kind == "one label":
        return
    if in_order >= MANY_SINGLE_LABEL and in_order > shuffled + 0.1:
        yield (
            f"In file order {in_order:.0%} of the batches of {size} hold one label only, shuffled "
            f"{shuffled:.0%}: keep `--data.shuffle true`."
        )
    if shuffled > MANY_SHUFFLED:
        yield (
            f"Even shuffled, {shuffled:.0%} of the batches of {size} hold one label only and "
            f"cannot weigh good against bad: {_fitting_batch_size(report)}."
        )


def _fitting_batch_size(report: DataReport) -> str:
    """What to do so that few shuffled batches hold one label only."""
    labels, size = report.labels, report.order.batch_size
    while (single_label_chance(labels.desirable, labels.undesirable, size) or 0) > MANY_SHUFFLED:
        size *= 2
        if size > LARGE_BATCH:
            return "add records of the rarer label"
    return f"raise `--data.batch_size` to {size}"


def _about_lengths(report: DataReport) -> Iterator[str]:
    lengths = report.lengths
    if report.tokenizer_problem:
        yield "Lengths are in characters, because the records could not be tokenized: see below."
    sentence = length_finding(report)
    if sentence is not None:
        yield sentence
    yield from _about_truncation(report)
    if lengths.prompts_not_prefix:
        yield (
            f"{lengths.prompts_not_prefix:,} tokenized prompts are not the beginning of their "
            f"tokenized text; their end (first {json.dumps(lengths.lost_prompt_end)}) is not "
            "trained on. If it should be, mend the chat template's generation prompt, or let "
            "plain prompts not end in a space."
        )


def length_finding(report: DataReport) -> str | None:
    """What to know when completions' lengths predict their labels; None when they do not."""
    lengths = report.lengths
    good, bad = lengths.completion.desirable, lengths.completion.undesirable
    if not _length_tells(report) or lengths.auc is None or not good or not bad:
        return None
    longer = "longer" if lengths.auc > 0.5 else "shorter"
    return (
        f"Length alone predicts the label (AUC {lengths.auc:.2f}): desirable completions are "
        f"the {longer} ones (median {good.median:,.0f} against {bad.median:,.0f} "
        f"{lengths.unit}). A model may learn just that: add desirable and undesirable "
        "completions of like lengths, and watch how long its answers become."
    )


def _length_tells(report: DataReport) -> bool:
    """Whether the AUC is far from a half, and by more than three standard errors of no relation.

    Their square is (n_D + n_U + 1) / (12 n_D n_U), Mann and Whitney's.
    """
    auc, good, bad = report.lengths.auc, report.labels.desirable, report.labels.undesirable
    if auc is None or not good or not bad:
        return False
    error = sqrt((good + bad + 1) / (12 * good * bad))
    return abs(auc - 0.5) >= max(TELLING_AUC - 0.5, 3 * error)


def _about_truncation(report: DataReport) -> Iterator[str]:
    truncation = report.lengths.truncation
    if truncation is None or not report.examples:
        return
    dropped = truncation.dropped.desirable + truncation.dropped.undesirable
    truncated = truncation.truncated.desirable + truncation.truncated.undesirable
    if dropped:
        yield (
            f"{dropped:,} of {report.examples:,} prompts fill max_length {truncation.max_length:,} "
            "alone and are dropped: raise `--data.max_length`, or set `--data.truncation keep_end`."
        )
    if truncated > MUCH_TRUNCATED * report.examples:
        yield (
            f"{truncated:,} of {report.examples:,} records are cut at max_length "
            f"{truncation.max_length:,} ({truncation.truncated.desirable:,} desirable, "
            f"{truncation.truncated.undesirable:,} undesirable), so that their end is never "
            "judged: raise `--data.max_length` if memory allows."
        )


def _about_prompts(report: DataReport) -> Iterator[str]:
    repeats = report.repeats
    commonest, same = repeats.commonest_prompt_share, repeats.same_prompt_mismatches
    if repeats.distinct_prompts == 1 and report.examples > 1:
        yield (
            "All records share one prompt, and KTO needs at least two: add records with other "
            "prompts, or use `--model.loss apo_zero_unpaired`."
        )
    elif commonest is not None and commonest > 0.5 and report.examples > 1:
        yield (
            f"One prompt holds {commonest:.0%} of all records, so that some mismatched completions "
            "are used more than once: add records with other prompts."
        )
    elif same is not None and same >= MANY_SAME_PROMPT:
        yield (
            f"Paired as TRL does it, {same:.0%} of the mismatched completions would answer the "
            "same prompt and be no mismatch: keep `--data.pairing distinct_prompts`."
        )


def shown_ratio(report: DataReport) -> str:
    """Desirable to undesirable records such as `2.94 : 1` or `1 : 1.64`."""
    good, bad = report.labels.desirable, report.labels.undesirable
    if not good or not bad:
        return f"{good:,} : {bad:,}"
    return f"{good / bad:.3g} : 1" if good >= bad else f"1 : {bad / good:.3g}"


def _are(places: Places, one: str, several: str) -> str:
    return one if places.count == 1 else several


def _shown(places: Places) -> str:
    """The first two places, their directories left out."""
    names = [Path(place).name for place in places.first]
    return ", ".join(names[:2]) + (", …" if len(names) > 2 else "")
