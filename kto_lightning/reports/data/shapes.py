"""What the report's pictures are drawn from: a few hundred numbers, of however many records."""

import numpy as np
from jaxtyping import Bool, Int64

from kto_lightning.reports.data.fields import Histogram, Shapes

NUM_BINS = 32
NUM_STRETCHES = 60
LEAST_STRETCH = 8
"""Records in a stretch of the file: the share of fewer says nothing."""

Lengths = Int64[np.ndarray, " records"]
Labels = Bool[np.ndarray, " records"]
FileLabels = Bool[np.ndarray, " file_records"]
"""Of all records in the file: those that `max_length` drops are not measured."""


def shapes_of(prompt: Lengths, completion: Lengths, measured: Labels, labels: FileLabels) -> Shapes:
    """Histograms of lengths, and how the labels are spread over the file.

    Args:
        prompt: length of each measured prompt.
        completion: length of each measured completion.
        measured: whether each of these is desirable.
        labels: whether each record of the file is, in file order.
    """
    num_stretches = max(1, min(NUM_STRETCHES, len(labels) // LEAST_STRETCH))
    stretches = np.array_split(labels, num_stretches)
    return Shapes(
        prompt=histogram(prompt, measured),
        completion=histogram(completion, measured),
        both=histogram(prompt + completion, measured),
        stretch_records=[len(stretch) for stretch in stretches],
        stretch_desirable=[int(stretch.sum()) for stretch in stretches],
    )


def histogram(lengths: Lengths, desirable: Labels) -> Histogram:
    """Counts per class between edges that grow by the same factor: lengths spread over orders of
    magnitude. Edges are whole numbers, so that no bin between two of them stays empty for ever."""
    low, high = max(1, int(lengths.min())), max(2, int(lengths.max()) + 1)
    edges = np.unique(np.geomspace(low, max(high, low + 1), NUM_BINS + 1).round().astype(np.int64))
    inside = np.clip(lengths, low, None)  # a length of 0 has no place on a logarithmic axis
    good, bad = (np.histogram(inside[mask], edges)[0].tolist() for mask in (desirable, ~desirable))
    return Histogram(edges=edges.astype(float).tolist(), desirable=good, undesirable=bad)
