"""Commands to copy, and sentences, for records that cannot be read as they stand."""

import shlex
from collections.abc import Sequence

from kto_lightning.data.commands import command
from kto_lightning.data.proposal.mapping import Proposal, name_options
from kto_lightning.data.proposal.propose import propose
from kto_lightning.data.record_settings import RecordSettings


def advice_on(
    rows: Sequence[object],
    settings: RecordSettings,
    files: Sequence[str] | None,
    *,
    labels_needed: bool = True,
) -> list[str]:
    """What to do about files of which no record can be used, a line each.

    Args:
        rows: their first rows.
        settings: with which they were read.
        files: their names; None for objects in the memory of a Python program.
        labels_needed: whether they need judgements, as for `fit`; not for `predict`.
    """
    if not any(isinstance(row, dict) and row for row in rows):
        return []
    proposal = propose(rows, settings, labels_needed=labels_needed)
    lines = [name_options(sentence) for sentence in proposal.missing]
    flags = proposal.flags()
    if proposal.says_more:
        fits = "What can be told of the columns" if lines else "The mapping that fits best"
        if files is None:
            return [
                *lines,
                f"{fits}, for KTODataModule (from kto_lightning import Columns, Labels):",
                *_in_lines(proposal),
            ]
        user = "fit" if labels_needed else "predict"
        lines.append(f"{fits}; look at it, and give `{user}` the same options:")
        lines += command("inspect", [*map(shlex.quote, files), *flags, "--try"])
    return lines


def _in_lines(proposal: Proposal) -> list[str]:
    return [f"  {argument}," for argument in proposal.arguments()]
