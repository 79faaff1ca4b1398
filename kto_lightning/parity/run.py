"""One comparison: inputs for both sides, both runs, and the result."""

import contextlib
import io
import json
import logging
import shlex
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers.utils import logging as transformers_logging

from kto_lightning.batches.class_weights import resolve_weights
from kto_lightning.data.dataset import load_records
from kto_lightning.data.tokenize import tokenize_records
from kto_lightning.errors import DataError, KTOError, printable
from kto_lightning.models.loading import load_causal_lm
from kto_lightning.models.lora import LoRA
from kto_lightning.models.lora_layers import add_adapter
from kto_lightning.models.model_files import adapter_base, is_adapter
from kto_lightning.models.randomness import disable_dropout
from kto_lightning.models.tokenizer import load_tokenizer
from kto_lightning.parity.agreement import (
    WEIGHTS,
    Comparison,
    Movement,
    compare,
    measure_sensitivity,
    movement,
)
from kto_lightning.parity.our_trace import our_trace
from kto_lightning.parity.trace import Inputs, Settings, Trace
from kto_lightning.parity.trl_trace import trl_trace

MIN_LOSS = 1e-2
"""Loss below which the rounding of TRL's 1 − σ(u) exceeds the tolerance of the first steps."""

_OTHER_PADDING = 8
"""Tokens of which row lengths are a multiple in the run that shows rounding."""


@dataclass(kw_only=True, slots=True)
class ParityResult:
    """The result of a comparison."""

    settings: Settings
    num_records: int
    comparisons: list[Comparison]
    weights: Movement
    notes: list[str] = field(default_factory=list)
    """Differences to expect from this model, data or settings."""

    @property
    def compares_weights(self) -> bool:
        """Whether the weights are compared: not after AdamW, see `agreement`."""
        return self.settings.optimizer == "sgd" and self.weights.is_enough

    @property
    def agrees(self) -> bool:
        columns = all(comparison.agrees for comparison in self.comparisons)
        return columns and (self.weights.agrees or not self.compares_weights)


def run_parity(
    model: str,
    data: str,
    settings: Settings,
    *,
    desirable_weight: float | None = None,
    undesirable_weight: float | None = None,
    reference: str | None = None,
    chat_template: str | None = None,
    lora_rank: int | None = None,
    options: tuple[str, ...] = (),
) -> ParityResult:
    """Train with `fit` and with TRL on the same records, from the same weights, in float32.

    Args:
        model: a model, or an adapter directory, which is then trained further on both sides.
        data: records in any form that `fit` reads; TRL gets them as prompt, completion and label.
        settings: its class weights are replaced by those below.
        desirable_weight, undesirable_weight: None: as `fit` chooses from all labels in `data`.
        reference: another model as the reference; None: the initial policy.
        chat_template: a file with a chat template instead of the tokenizer's.
        lora_rank: rank of a new adapter on `model`, the same for both sides; None: no new adapter.
        options: further arguments of `fit` only.

    Raises:
        KTOError: if a side cannot be run.
    """
    with quiet(), tempfile.TemporaryDirectory(prefix="kto_lightning_parity_") as folder:
        directory = Path(folder)
        records = load_records(data)
        weights = _class_weights(records["desirable"], desirable_weight, undesirable_weight)
        settings = replace(settings, **weights)
        records = records.select(range(min(len(records), settings.steps * settings.batch_size)))
        # Tokenization errors name file and line here, not in the records written for both sides.
        tokenizer = load_tokenizer(model, chat_template=chat_template)
        tokenize_records(records, tokenizer, max_length=settings.max_length)
        inputs = _inputs(model, records, lora_rank, directory)
        inputs.reference, inputs.chat_template = reference, chat_template
        # Ours first, for its error messages.
        ours = our_trace(inputs, settings, directory / "ours", *options)
        theirs = _run_trl(inputs, settings, directory / "trl")
        result = ParityResult(
            settings=settings,
            num_records=len(records),
            comparisons=compare(ours, theirs, beta=settings.beta),
            weights=movement(ours.weights, theirs.weights, inputs.initial_weights()),
            notes=[
                *([f"Set for `fit` only: {shlex.join(options)}"] if options else []),
                *_notes_on_records(records),
                *_notes_on_loss(theirs.columns["train/loss"]),
            ],
        )
        if not result.agrees:
            _allow_for_sensitivity(result, ours, theirs, inputs, directory / "moved")
    return result


def _allow_for_sensitivity(
    result: ParityResult, ours: Trace, theirs: Trace, inputs: Inputs, directory: Path
) -> None:
    """Compare again, with the tolerances that the model needs for its rounding."""
    settings, initial = result.settings, inputs.initial_weights()
    moving = replace(inputs, moves_weights=True)
    moved = _run_trl(moving, settings, directory, pad_to_multiple_of=_OTHER_PADDING)
    unmoved = {
        name: moved.weights[name].double() - start.double() + initial[name].double()
        for name, start in moving.initial_weights().items()
    }
    found = measure_sensitivity(
        moved, theirs, movement(unmoved, theirs.weights, initial), beta=settings.beta
    )
    result.comparisons = compare(ours, theirs, beta=settings.beta, sensitivity=found)
    result.weights = replace(result.weights, tolerance=WEIGHTS * found.weights)
    largest = max(found.weights * result.compares_weights, *found.columns.values())
    if largest > 1.0:
        result.notes.append(
            "This model is sensitive to rounding: TRL's own numbers change by more than the usual "
            "tolerances when every weight is moved by 1e-7 of itself and sequences are padded "
            f"further. Tolerances are up to {largest:.0f} times the usual ones."
        )


def _class_weights(
    labels: Any, desirable: float | None, undesirable: float | None
) -> dict[str, float]:
    num_desirable = sum(labels)
    weights = resolve_weights(
        num_desirable,
        len(labels) - num_desirable,
        desirable="auto" if desirable is None else desirable,
        undesirable="auto" if undesirable is None else undesirable,
    )
    return {"desirable_weight": weights.desirable, "undesirable_weight": weights.undesirable}


def _inputs(
    model: str,
    records: datasets.Dataset,
    lora_rank: int | None,
    directory: Path,
) -> Inputs:
    base, adapter = (adapter_base(model), model) if is_adapter(model) else (model, None)
    if lora_rank is not None:
        if adapter is not None:
            raise KTOError(f"--lora makes an adapter, but {model} already is one. Remove --lora.")
        adapter = str(_new_adapter(base, lora_rank, directory / "adapter"))
    train = _write_records(records, directory / "train.jsonl")
    return Inputs(model=base, adapter=adapter, train=str(train))


def _new_adapter(base: str, rank: int, directory: Path) -> Path:
    """Save a new adapter, from which both sides start."""
    model = load_causal_lm(base)
    disable_dropout(model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted: Any = add_adapter(model, LoRA(r=rank, alpha=2.0 * rank))
    adapted.save_pretrained(str(directory))
    return directory


def _write_records(records: datasets.Dataset, path: Path) -> Path:
    """Write records in TRL's format, in file order, without weights of single records."""
    kinds = set()
    with path.open("w", encoding="utf-8") as file:
        for row in map(dict, records):
            content = json.loads(row["record"])
            kinds.add(type(content["prompt"]))
            line = {"prompt": content["prompt"], "completion": content["completion"]}
            line["label"] = row["desirable"]
            if content["tools"]:
                line["tools"] = json.dumps(content["tools"], ensure_ascii=False)
            if content["chat_template_kwargs"]:
                line["chat_template_kwargs"] = content["chat_template_kwargs"]
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    if len(kinds) > 1:
        raise DataError(
            "some records are plain text and some are chat messages; TRL takes one kind at a time. "
            "Split the file and compare both parts."
        )
    return path


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the output of both trainers."""
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    trl_logger = logging.getLogger("trl")
    level = trl_logger.level
    trl_logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        trl_logger.setLevel(level)


def _run_trl(inputs: Inputs, settings: Settings, directory: Path, **padding: int) -> Trace:
    try:
        return trl_trace(inputs, settings, directory, **padding)
    except Exception as error:  # of any class, as from a model that TRL was not written for
        message = f"{type(error).__name__}: {printable(str(error))}"
        raise KTOError(f"TRL cannot be run on this ({message}). `fit` ran.") from error


def _notes_on_records(records: datasets.Dataset) -> list[str]:
    notes = []
    if any(weight != 1.0 for weight in records["weight"]):
        notes.append("Weights of single records were omitted on both sides: TRL has none.")
    if any('"tool_calls"' in record for record in records["record"]):
        notes.append(
            "There are tool calls. `datasets`, through which TRL reads records, adds the arguments "
            "of all other calls to each call as null. If the template prints them, `tokens` differ "
            "and everything else with them. `fit` keeps records as they were written."
        )
    return notes


def _notes_on_loss(losses: list[float]) -> list[str]:
    if min(losses) >= MIN_LOSS:
        return []
    return [
        f"The loss of a batch fell below {MIN_LOSS:g}. TRL's 1 − σ(u) is a multiple of 6e-8 in "
        "float32, which then exceeds the tolerance; `fit` computes σ(−u)."
    ]
