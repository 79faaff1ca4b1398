"""The separator of a table in a text file: comma, semicolon, tab or |."""

import csv
import re

from kto_lightning.data.sources.record_columns import COLUMNS

SEPARATORS = (",", ";", "\t", "|")
DECLARED = re.compile(r'"?sep=(.)"?\r?\n?')
"""A first line with which spreadsheets tell each other the separator."""
NUM_LINES = 50
LONGEST_SAMPLE = 1 << 20
_JOINED = re.compile(r"\w[^\w\s.-]+\w|\w\t+\w")


def find_separator(sample: list[str], *, preferred: str) -> str:
    """The separator that cuts the most rows of a sample into as many cells as its header has, and
    of those that fit alike the one with the most cells.

    Args:
        sample: the first lines of the file, the header first.
        preferred: taken where others fit no better, or none cuts the header.
    """
    best, best_score = preferred, (0.0, 0, False)
    for separator in SEPARATORS:
        width, share = _fit(sample, separator)
        score = (share, width, separator == preferred)
        if width > 1 and score > best_score:
            best, best_score = separator, score
    return best


def _fit(sample: list[str], separator: str) -> tuple[int, float]:
    """The cells of the header, and the share of rows with as many, to whole tenths."""
    widths = []
    reader = csv.reader(sample, delimiter=separator, strict=True)
    try:
        widths += (len(cells) for cells in reader if cells)
    except csv.Error:  # also where the sample ends within a cell
        if reader.line_num < len(sample):
            widths.append(0)
    if not widths:
        return 0, 0.0
    return widths[0], round(widths.count(widths[0]) / len(widths), 1)


def looks_joined(name: str) -> bool:
    """Whether the only name in a header seems to be several, joined by an unknown separator."""
    known = set(re.findall(r"\w+", name)) & set(COLUMNS)
    return len(known) > 1 or _JOINED.search(name) is not None
