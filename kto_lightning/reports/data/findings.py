"""Each thing in the data that stands out: what it is, whether it matters for KTO, what to do."""

import json
from collections.abc import Iterator
from math import sqrt
from pathlib import Path

from kto_lightning.batches.class_weights import ClassWeights, check_weights
from kto_lightning.reports.data.fields import DataReport, Places
from kto_lightning.reports.data.order import single_label_chance
from kto_lightning.reports.finding import Finding

PREDICTIVE_AUC = 0.7
"""Length predicts the label from here on, and from 1 minus this downwards."""
MANY_SINGLE_LABEL = 0.2
"""Share of single-label batches from which on they are worth a word."""
MANY_SHUFFLED = 0.2
"""The same for batches that are shuffled, which nothing but their size can mend."""
LARGE_BATCH = 1024
MUCH_TRUNCATED = 0.05
MANY_SAME_PROMPT = 0.05


def findings_of(report: DataReport) -> list[Finding]:
    """What stands out in a report, gravest first; the report's own `findings` are not looked at."""
    parts = (_about_records, _about_labels, _about_order, _about_lengths, _about_prompts)
    return [finding for part in parts for finding in part(report)]


def _about_records(report: DataReport) -> Iterator[Finding]:
    bad, repeats = report.bad_records, report.repeats
    if not report.examples:
        yield Finding(
            grade="problem",
            what="There is no usable record",
            meaning="KTO takes a prompt, a completion and a label from each",
            action="mend the records named below, or give another file",
        )
    elif bad.count:
        yield Finding(
            grade="problem",
            what=f"{bad.count:,} {_are(bad, 'record cannot', 'records cannot')} be used and would "
            "stop `fit` before its first step",
            meaning="KTO takes a prompt, a completion and a label from each",
            action="mend or drop what is named below",
        )
    contradictory, empty = repeats.contradictory_labels, report.empty_completions
    if contradictory.count:
        yield Finding(
            grade="warning",
            what=f"{contradictory.count:,} "
            f"{_are(contradictory, 'completion carries', 'completions carry')} both labels for the "
            "same prompt",
            meaning="in KTO's loss they pull against each other and cancel out",
            action=f"keep one of the two ({_shown(contradictory)})",
        )
    if repeats.exact_duplicates.count:
        duplicates = repeats.exact_duplicates
        yield Finding(
            grade="note",
            what=f"{duplicates.count:,} "
            f"{_are(duplicates, 'record repeats', 'records repeat')} an earlier one word for word",
            meaning="each makes that judgement count again, and one in the held-out records makes "
            "those look better than they are",
            action=f"drop those that are not meant to ({_shown(duplicates)})",
        )
    if empty.count:
        yield Finding(
            grade="warning",
            what=f"{empty.count:,} {_are(empty, 'completion is', 'completions are')} empty",
            meaning="from them KTO learns only when to stop: a desirable one teaches to say "
            "nothing",
            action=f"drop or fill them ({_shown(empty)})",
        )


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
    if check_weights(*counts, ClassWeights(desirable=1.0, undesirable=1.0)):
        yield Finding(
            grade="note",
            what=f"The labels are {shown_ratio(report)}, outside 1:1 to 4:3",
            meaning="KTO needs both classes to weigh about the same, else the commoner one decides "
            "every step; class weights make up for that",
            action="leave both at `auto`, which gives "
            f"desirable_weight {weights.desirable} and undesirable_weight {weights.undesirable}",
        )


def _about_order(report: DataReport) -> Iterator[Finding]:
    order, size = report.order, report.order.batch_size
    in_order, shuffled = order.single_label_batches, order.single_label_batches_shuffled
    if in_order is None or shuffled is None or size < 2 or order.kind == "one label":
        return
    if in_order >= MANY_SINGLE_LABEL and in_order > shuffled + 0.1:
        yield Finding(
            grade="note",
            what=f"In file order {in_order:.0%} of the batches of {size} hold one label only, "
            f"shuffled {shuffled:.0%}",
            meaning="KTO compares the rewards of a batch with one reference point, and a batch of "
            "one label pushes all of them the same way",
            action="keep `--data.shuffle true`",
        )
    if shuffled > MANY_SHUFFLED:
        yield Finding(
            grade="warning",
            what=f"Even shuffled, {shuffled:.0%} of the batches of {size} hold one label only",
            meaning="such a batch cannot weigh good against bad",
            action=_fitting_batch_size(report),
        )


def _fitting_batch_size(report: DataReport) -> str:
    """What to do so that few shuffled batches hold one label only."""
    labels, size = report.labels, report.order.batch_size
    while (single_label_chance(labels.desirable, labels.undesirable, size) or 0) > MANY_SHUFFLED:
        size *= 2
        if size > LARGE_BATCH:
            return "add records of the rarer label"
    return f"raise `--data.batch_size` to {size}"


def _about_lengths(report: DataReport) -> Iterator[Finding]:
    lengths = report.lengths
    if report.tokenizer_problem:
        yield Finding(
            grade="warning",
            what="Lengths are in characters, because the records could not be tokenized",
            meaning="`fit` would stop at the same place",
            action="see below",
        )
    finding = _about_telling_lengths(report)
    if finding is not None:
        yield finding
    yield from _about_truncation(report)
    if lengths.prompts_not_prefix:
        yield Finding(
            grade="note",
            what=f"{lengths.prompts_not_prefix:,} tokenized prompts are not the beginning of their "
            f"tokenized text; their end (first {json.dumps(lengths.lost_prompt_end)}) is not "
            "trained on",
            meaning="as in TRL, the completion begins where the two part. Answers are sampled "
            "after the whole prompt, so a difference beyond a space or an empty thought is a fault",
            action="if it should be trained on, mend the chat template's generation prompt, or let "
            "plain prompts not end in a space",
        )


def length_finding(report: DataReport) -> str | None:
    """What to know when completions' lengths predict their labels; None when they do not."""
    finding = _about_telling_lengths(report)
    return None if finding is None else finding.sentence


def _about_telling_lengths(report: DataReport) -> Finding | None:
    lengths = report.lengths
    good, bad = lengths.completion.desirable, lengths.completion.undesirable
    if not _length_tells(report) or lengths.auc is None or not good or not bad:
        return None
    longer = "longer" if lengths.auc > 0.5 else "shorter"
    return Finding(
        grade="warning",
        what=f"Length alone predicts the label (AUC {lengths.auc:.2f}): desirable completions are "
        f"the {longer} ones (median {good.median:,.0f} against {bad.median:,.0f} {lengths.unit})",
        meaning="KTO's rewards are sums over tokens, so that a model may learn just that",
        action="add desirable and undesirable completions of like lengths, and watch how long its "
        "answers become",
    )


def _length_tells(report: DataReport) -> bool:
    """Whether the AUC is far from a half, and by more than three standard errors of no relation.

    Their square is (n_D + n_U + 1) / (12 n_D n_U), Mann and Whitney's.
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
            meaning="no token of their completions is left for KTO to judge",
            action="raise `--data.max_length`, or set `--data.truncation keep_end`",
        )
    if truncated > MUCH_TRUNCATED * report.examples:
        yield Finding(
            grade="warning",
            what=f"{truncated:,} of {report.examples:,} records are cut at max_length "
            f"{truncation.max_length:,} ({truncation.truncated.desirable:,} desirable, "
            f"{truncation.truncated.undesirable:,} undesirable)",
            meaning="their end, the end-of-text token included, is never judged: the model does "
            "not learn to stop from them",
            action="raise `--data.max_length` if memory allows",
        )


def _about_prompts(report: DataReport) -> Iterator[Finding]:
    repeats = report.repeats
    commonest, same = repeats.commonest_prompt_share, repeats.same_prompt_mismatches
    if repeats.distinct_prompts == 1 and report.examples > 1:
        yield Finding(
            grade="problem",
            what="All records share one prompt",
            meaning="KTO's reference point takes completions that answer another prompt, and there "
            "are none",
            action="add records with other prompts, or use `--model.loss apo_zero_unpaired`",
        )
    elif commonest is not None and commonest > 0.5 and report.examples > 1:
        yield Finding(
            grade="warning",
            what=f"One prompt holds {commonest:.0%} of all records",
            meaning="some mismatched completions are used more than once, and the reference point "
            "rests on fewer of them",
            action="add records with other prompts",
        )
    elif same is not None and same >= MANY_SAME_PROMPT:
        yield Finding(
            grade="note",
            what=f"Paired as TRL does it, {same:.0%} of the mismatched completions would answer "
            "the same prompt and be no mismatch",
            meaning="KTO's reference point would be too high by what the policy has learnt",
            action="keep `--data.pairing distinct_prompts`",
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
