"""Statistics of the data report: labels, class weights, lengths, repeats, histograms."""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torchmetrics.functional.classification import binary_auroc

from kto_lightning.batches.class_weights import effective_ratio, recommended_weights
from kto_lightning.batches.pairing import pair_rotate
from kto_lightning.reports.data.facts import Facts
from kto_lightning.reports.data.fields import (
    CutAnswers,
    Format,
    Histogram,
    Labels,
    Lengths,
    PerClass,
    Places,
    Quantiles,
    Repeats,
    Shapes,
    Weights,
)
from kto_lightning.reports.data.order import share

NUM_FIRST = 30
MAX_CONTRADICTIONS = 3
DIFY_LENGTH = 500 + len("...")
MIN_CUT = 50
"""Least characters of an answer that an export may have cut."""
NUM_BINS = 32
NUM_STRETCHES = 60
MIN_STRETCH_RECORDS = 8
"""Least records of a stretch of the file, for a meaningful share."""
RecordLengths = Int64[np.ndarray, " records"]
RecordLabels = Bool[np.ndarray, " records"]
FileLabels = Bool[np.ndarray, " file_records"]
"""Of all records in the file; `RecordLengths` lacks those that `max_length` drops."""


def format_of(facts: Facts) -> Format:
    """Plain text or chat, and the shares of records with system messages, tools and tool calls."""
    table = facts.table
    chat = table["chat"]
    kinds: dict[tuple[bool, bool], Literal["plain", "chat", "mixed", "none"]] = {
        (True, True): "mixed",
        (True, False): "chat",
        (False, True): "plain",
        (False, False): "none",
    }
    turns = table["user_turns"][chat]
    return Format(
        kind=kinds[bool(chat.any()), bool((~chat).any())],
        user_turns=float(turns.mean()) if len(turns) else None,
        most_user_turns=int(turns.max()) if len(turns) else None,
        system_share=share(table["system"]) or 0.0,
        tools_share=share(table["tools"]) or 0.0,
        tool_call_share=share(table["tool_call"]) or 0.0,
    )


def labels_of(desirable: Bool[np.ndarray, " records"]) -> Labels:
    """Count of each label, and the first labels."""
    good, bad = int(desirable.sum()), int((~desirable).sum())
    return Labels(
        desirable=good,
        undesirable=bad,
        ratio=good / bad if bad else None,
        first=desirable[:NUM_FIRST].tolist(),
    )


def weights_of(num_desirable: int, num_undesirable: int) -> Weights:
    """The class weights that balance both classes."""
    weights = recommended_weights(num_desirable, num_undesirable)
    both = effective_ratio(num_desirable, num_undesirable, weights)
    return Weights(
        desirable=weights.desirable,
        undesirable=weights.undesirable,
        effective_desirable=both[0],
        effective_undesirable=both[1],
    )


def lengths_of(
    prompt: Int64[np.ndarray, " records"],
    completion: Int64[np.ndarray, " records"],
    desirable: Bool[np.ndarray, " records"],
    *,
    unit: Literal["tokens", "characters"],
) -> Lengths:
    """Quantiles of lengths; fields that need a tokenizer are None."""
    both = prompt + completion
    own_share = prompt[both > 0] / both[both > 0]
    return Lengths(
        unit=unit,
        prompt=_quantiles_per_class(prompt, desirable),
        completion=_quantiles_per_class(completion, desirable),
        prompt_share=float(prompt.sum() / both.sum()) if both.any() else None,
        mean_prompt_share=float(own_share.mean()) if len(own_share) else None,
        auc=length_auc(completion, desirable),
        truncation=None,
        prompts_not_prefix=None,
        lost_prompt_end=None,
    )


def _quantiles_per_class(
    lengths: Int64[np.ndarray, " records"], desirable: Bool[np.ndarray, " records"]
) -> PerClass[Quantiles | None]:
    return PerClass(
        desirable=_quantiles(lengths[desirable]), undesirable=_quantiles(lengths[~desirable])
    )


def _quantiles(lengths: Int64[np.ndarray, " records"]) -> Quantiles | None:
    if not len(lengths):
        return None
    at = np.quantile(lengths, [0.0, 0.25, 0.5, 0.75, 0.95, 1.0]).tolist()
    names = ("minimum", "q25", "median", "q75", "q95", "maximum")
    return Quantiles(**dict(zip(names, at, strict=True)), mean=float(lengths.mean()))


def length_auc(
    lengths: Int64[np.ndarray, " records"], desirable: Bool[np.ndarray, " records"]
) -> float | None:
    """Probability that a desirable completion is the longer one of a pair; ties count half."""
    if desirable.all() or not desirable.any():
        return None
    # torchmetrics would send numbers above 1 through a sigmoid, which makes long ones equal.
    scores = torch.from_numpy(lengths / max(int(lengths.max()), 1))
    return float(binary_auroc(scores, torch.from_numpy(desirable.astype(np.int64))))


def repeats_of(facts: Facts, *, batch_size: int) -> Repeats:
    """Repeated prompts, duplicates and contradictory labels."""
    table = facts.table
    _, which, counts = np.unique(table["prompt_key"], return_inverse=True, return_counts=True)
    mismatches = None
    if batch_size > 1 and len(facts):
        partner = pair_rotate(len(facts), batch_size).partner
        mismatches = share(which == which[partner])
    return Repeats(
        distinct_prompts=len(counts),
        repeated_prompt_share=share(counts[which] > 1),
        commonest_prompt_share=float(counts.max() / len(facts)) if len(facts) else None,
        exact_duplicates=_duplicates(facts),
        contradictory_labels=_contradictions(facts),
        same_prompt_mismatches=mismatches,
    )


def _duplicates(facts: Facts) -> Places:
    same = facts.table[["answer_key", "desirable"]]
    _, first = np.unique(same, return_index=True)
    repeated = np.ones(len(facts), dtype=np.bool_)
    repeated[first] = False
    return facts.places(np.flatnonzero(repeated))


def _contradictions(facts: Facts) -> Places:
    keys, desirable = facts.table["answer_key"], facts.table["desirable"]
    rows = np.arange(len(facts))
    # `np.unique` gives the first record of each key.
    good, first_good = np.unique(keys[desirable], return_index=True)
    bad, first_bad = np.unique(keys[~desirable], return_index=True)
    _, in_good, in_bad = np.intersect1d(good, bad, assume_unique=True, return_indices=True)
    pairs = np.stack([rows[desirable][first_good[in_good]], rows[~desirable][first_bad[in_bad]]])
    pairs = np.sort(pairs, axis=0)  # [2, contradictions]
    pairs = pairs[:, np.argsort(pairs[0])]
    shown = pairs[:, :MAX_CONTRADICTIONS].T.ravel().tolist()
    return Places(count=pairs.shape[1], first=[facts.place(row) for row in shown])


def cut_answers_of(facts: Facts) -> CutAnswers | None:
    """Answers that an export has cut: they end with dots at the same length, and none is longer.

    Dify's export of feedback cuts at 500 characters and appends three dots.
    """
    lengths, dots = facts.table["completion_characters"], facts.table["dots"]
    longest = int(lengths.max()) if len(facts) else 0
    for length in dict.fromkeys((longest, DIFY_LENGTH)):
        rows = np.flatnonzero((lengths == length) & (dots > 0))
        different = len(np.unique(facts.table["dotted_key"][rows]))
        least = 1 if length == longest == DIFY_LENGTH else 2 if length == DIFY_LENGTH else 3
        if different >= least and length >= MIN_CUT:
            mark = int(dots[rows[0]])
            return CutAnswers(
                characters=length - mark,
                mark="..." if mark == 3 else "…",
                answers=facts.places(rows),
            )
    return None


def shapes_of(
    prompt: RecordLengths, completion: RecordLengths, measured: RecordLabels, labels: FileLabels
) -> Shapes:
    """Histograms of lengths, and the share of desirable records along the file.

    Args:
        prompt: length of each measured prompt.
        completion: length of each measured completion.
        measured: whether each of these is desirable.
        labels: whether each record of the file is, in file order.
    """
    num_stretches = max(1, min(NUM_STRETCHES, len(labels) // MIN_STRETCH_RECORDS))
    stretches = np.array_split(labels, num_stretches)
    return Shapes(
        prompt=histogram(prompt, measured),
        completion=histogram(completion, measured),
        both=histogram(prompt + completion, measured),
        stretch_records=[len(stretch) for stretch in stretches],
        stretch_desirable=[int(stretch.sum()) for stretch in stretches],
    )


def histogram(lengths: RecordLengths, desirable: RecordLabels) -> Histogram:
    """Counts per class in logarithmic bins, whose edges are whole numbers so that every bin has at
    least one possible length."""
    low, high = max(1, int(lengths.min())), max(2, int(lengths.max()) + 1)
    edges = np.unique(np.geomspace(low, max(high, low + 1), NUM_BINS + 1).round().astype(np.int64))
    inside = np.clip(lengths, low, None)  # no 0 on a logarithmic axis
    good, bad = (np.histogram(inside[mask], edges)[0].tolist() for mask in (desirable, ~desirable))
    return Histogram(edges=edges.astype(float).tolist(), desirable=good, undesirable=bad)
