"""The protocol of the three routes from a micro-batch to the hidden states of its tokens.

- packed: sequences end to end in one row; y' on top of the stored keys and values of the prompts;
- cached: prompts once as rows, y and y' as rows on top of transformers' own cache;
- padded: whole sequences as rows, so that every prompt is computed twice.

All three give the same hidden states, in the order of the batch's tokens, up to rounding.
"""

import inspect
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor
from transformers import PreTrainedModel

from kto_lightning.batches.types import PackedBatch
from kto_lightning.models.architecture import auxiliary_coefficient, decoder
from kto_lightning.models.rope import SequenceLengths, rotating
from kto_lightning.models.row_indices import interleaved_ranges, starts_of, to_device

RouteName = Literal["packed", "cached", "padded"]
ROUTES: tuple[RouteName, ...] = get_args(RouteName)
"""By their cost, the lowest first."""


@dataclass(kw_only=True, slots=True)
class MatchedRun:
    """What a matched run gives."""

    hidden: Float[Tensor, "tokens width"]
    """The last hidden state of each token of `batch.matched`."""
    router_logits: list[Float[Tensor, "tokens experts"]]
    """Each layer's, of the same tokens in any order; empty without an auxiliary loss."""
    prompts: Any = None
    """What the route keeps of the prompts for the mismatched run; None: nothing."""


@runtime_checkable
class Runner(Protocol):
    """A route, bound to one model."""

    shares_prompts: bool
    """Whether it takes batches that share prompts."""
    offloads_activations: bool
    """Whether activations are in host memory between forward and backward."""

    def run_matched(self, batch: PackedBatch, *, keeps_prompts: bool) -> MatchedRun:
        """Run the matched sequences.

        Args:
            batch: one micro-batch.
            keeps_prompts: whether a mismatched run on top of the prompts follows.
        """
        ...

    def run_mismatched(
        self, batch: PackedBatch, matched: MatchedRun | None
    ) -> tuple[Float[Tensor, "rows width"], Int[Tensor, " scored"]]:
        """Run the mismatched completions; called without gradient.

        Args:
            batch: one micro-batch with mismatched completions.
            matched: its matched run, which has kept the prompts; None: there was none, and the
                prompts are run alone.

        Returns:
            hidden states, and the row among them of each of `batch.mismatched.scored.targets`.
        """
        ...


def call_decoder(model: PreTrainedModel, sequences: SequenceLengths, **inputs: Any) -> Any:
    """The output of a model without its head, as its class returns it.

    Args:
        sequences: those that the inputs are of.
        inputs: of the model's forward.
    """
    options: dict[str, Any] = {"use_cache": False}
    if auxiliary_coefficient(model):
        options["output_router_logits"] = True
    with rotating(sequences):
        return decoder(model)(**(options | inputs))


def positions_for(
    model: PreTrainedModel, positions: Int64[np.ndarray, "rows width"], device: torch.device
) -> dict[str, Tensor]:
    """The positions of padded rows for `call_decoder`, where a model takes them.

    Some that do not get them count the mask, or compute those of images too.
    """
    if "position_ids" not in inspect.signature(decoder(model).forward).parameters:
        return {}
    return {"position_ids": to_device(positions, device)}


def router_logits(outputs: Any, rows: Int[Tensor, " tokens"] | None) -> list[Tensor]:
    """The router logits of a decoder's output, `[tokens, experts]` for each layer.

    Args:
        outputs: of `call_decoder`.
        rows: which of the positions to take, flattened; None: all.
    """
    found = getattr(outputs, "router_logits", None) or ()
    flat = [logits.flatten(0, -2) for logits in found]
    return flat if rows is None else [logits.index_select(0, rows) for logits in flat]


def prompt_rows(batch: PackedBatch) -> Int[Tensor, " rows"]:
    """The tokens of `batch.matched` that are prompts."""
    starts = starts_of(batch.matched.lengths)
    rows = interleaved_ranges(starts, batch.prompt_lengths)
    return to_device(rows, batch.matched.input_ids.device)


def rows_after_prompts(batch: PackedBatch, rows: Int[Tensor, " scored"]) -> Int[Tensor, " scored"]:
    """Map rows of `[matched run | mismatched run]` to rows of `[prompt run | mismatched run]`."""
    num_matched, num_prompt_rows = len(batch.matched.input_ids), sum(batch.prompt_lengths)
    prompt_run_rows = torch.zeros(num_matched, dtype=torch.int64, device=rows.device)
    prompt_run_rows[prompt_rows(batch)] = torch.arange(num_prompt_rows, device=rows.device)
    return torch.where(
        rows < num_matched,
        prompt_run_rows[rows.clamp(max=num_matched - 1)],
        rows - num_matched + num_prompt_rows,
    )
