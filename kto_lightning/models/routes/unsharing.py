"""From a batch that shares prompts to one that does not."""

from dataclasses import replace

import numpy as np
import torch

from kto_lightning.batches.types import PackedBatch, Sequences
from kto_lightning.models.row_indices import interleaved_ranges, starts_of, to_device


def unshare_prompts(batch: PackedBatch) -> PackedBatch:
    """The batch with whole mismatched sequences, `[x1 y'1 | x2 y'2 | …]`, as `pack` makes it."""
    others, prompts = batch.mismatched, batch.prompt_lengths
    assert others is not None
    device, num_matched = others.input_ids.device, len(batch.matched.input_ids)
    lengths = [p + n for p, n in zip(prompts, others.lengths, strict=True)]
    starts = starts_of(lengths)
    other_starts = [num_matched + start for start in starts_of(others.lengths)]
    pieces = interleaved_ranges(
        starts_of(batch.matched.lengths), prompts, other_starts, others.lengths
    )
    gathered = to_device(pieces, device)
    tokens = interleaved_ranges(np.add(starts, prompts), others.lengths)
    # No row predicts the first token of a sequence.
    rows = tokens[~np.isin(tokens, starts)] - 1
    boundaries = torch.tensor([*starts, len(pieces)], dtype=torch.int32)
    mismatched = Sequences(
        input_ids=torch.cat([batch.matched.input_ids, others.input_ids])[gathered],
        position_ids=torch.cat([batch.matched.position_ids, others.position_ids])[gathered],
        boundaries=boundaries.to(device, non_blocking=True),
        lengths=lengths,
        scored=replace(others.scored, rows=to_device(rows, device)),
    )
    return replace(batch, mismatched=mismatched, shares_prompts=False)
