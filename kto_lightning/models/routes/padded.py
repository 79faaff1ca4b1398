"""The padded route: whole sequences as right-padded rows, each completion with its prompt."""

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from kto_lightning.batches.types import PackedBatch, Sequences
from kto_lightning.models.rope import SequenceLengths
from kto_lightning.models.routes.padded_rows import PaddedOutputs, PaddedRows
from kto_lightning.models.routes.row_groups import row_groups
from kto_lightning.models.routes.runner import MatchedRun, call_decoder, positions_for
from kto_lightning.models.row_indices import interleaved_ranges, starts_of, to_device


class PaddedRunner:
    """See `Runner`. The model runs with its original attention, on rows of similar length.

    Args:
        model: a model without peft's wrapper.
        single_group: run all rows in one call, whatever the padding: where every rank must call the
            model equally often (FSDP2).
        gives_positions: give the rows' positions to a model that takes them.
    """

    shares_prompts = False

    def __init__(
        self, model: PreTrainedModel, *, single_group: bool = False, gives_positions: bool = False
    ) -> None:
        self._model, self._single_group = model, single_group
        self._gives_positions = gives_positions
        self.offloads_activations = False

    def run_matched(self, batch: PackedBatch, *, keeps_prompts: bool) -> MatchedRun:
        return self._run(batch.matched)

    def run_mismatched(
        self, batch: PackedBatch, matched: MatchedRun | None
    ) -> tuple[Float[Tensor, "rows width"], Int[Tensor, " scored"]]:
        assert batch.mismatched is not None
        return self._run(batch.mismatched).hidden, batch.mismatched.scored.rows

    def _run(self, sequences: Sequences) -> MatchedRun:
        input_ids, lengths = sequences.input_ids, np.array(sequences.lengths)
        starts, found = np.array(starts_of(sequences.lengths)), np.zeros_like(lengths)
        outputs = PaddedOutputs()
        groups = [np.arange(len(lengths))] if self._single_group else row_groups(lengths)
        for group in groups:
            width = max(1, int(lengths[group].max()))
            rows = PaddedRows.of(starts[group], lengths[group], width=width, left=False)
            places = to_device(rows.tokens, input_ids.device)
            positions = {}
            if self._gives_positions:
                positions = positions_for(self._model, rows.places, input_ids.device)
            found[group] = outputs.add(
                call_decoder(
                    self._model,
                    SequenceLengths(lengths[group].tolist()),
                    input_ids=input_ids[places] if len(input_ids) else places,
                    attention_mask=to_device(rows.is_real, input_ids.device).long(),
                    **positions,
                )
            )
        hidden, logits = outputs.take(interleaved_ranges(found, lengths))
        return MatchedRun(hidden=hidden, router_logits=logits)
