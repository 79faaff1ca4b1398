"""Guards of a step: numbers that are not finite, and running out of memory."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from lightning import Trainer

from kto_lightning.batches.types import PackedBatch, StepBatch
from kto_lightning.distributed import gathered, warn
from kto_lightning.errors import ModelError, StoppedRun, check_one_of
from kto_lightning.training.scoring import BatchScorer, MicroBatchLogps

NON_FINITE = ("stop", "skip")
GUARDED_METRICS = {"loss": "loss", "z0_raw": "raw z0", "grad_norm": "gradient norm"}
"""Metrics that must be finite, and their names in messages; z0 among them, as an infinite one makes
the gradient 0 and leaves the loss finite."""
MAX_SKIPPED_IN_A_ROW = 10
"""The run stops when so many steps in a row are skipped: a few bad records do not explain that."""
_MAX_WARNINGS = 3
_MAX_SHOWN = 64


class ExampleCheck(NamedTuple):
    """An example of the step's batch, and its log-probs that are not finite."""

    index: int
    location: str
    """`file:line`"""
    non_finite: str
    """For a message; empty where all are finite."""


def is_finite(metrics: Mapping[str, float | None]) -> bool:
    """Whether the optimizer step may be taken: all `GUARDED_METRICS` are finite."""
    return all(math.isfinite(metrics[name] or 0.0) for name in GUARDED_METRICS)


def find_non_finite(
    batch: StepBatch, scored: Sequence[MicroBatchLogps | None], location: Callable[[int], str]
) -> list[ExampleCheck]:
    """This rank's examples, each with its log-probs that are not finite.

    Args:
        batch: the step's.
        scored: the log-probs of its micro-batches.
        location: tells `file:line` of an example.
    """
    checks: list[ExampleCheck] = []
    for micro_batch, logps in zip(batch.micro_batches, scored, strict=True):
        is_filler = micro_batch.is_filler.tolist()
        non_finite = _non_finite_logps(logps) if logps is not None else {}
        for position, index in enumerate(micro_batch.indices):
            if not is_filler[position]:
                names = ", ".join(non_finite.get(position, []))
                checks.append(ExampleCheck(index, location(index), names))
    return checks


def _non_finite_logps(logps: MicroBatchLogps) -> dict[int, list[str]]:
    """Names of the log-probs that are not finite, by position in the micro-batch."""
    names: dict[int, list[str]] = defaultdict(list)
    for model, scored in (("policy", logps.policy), ("reference", logps.reference)):
        for suffix, values in (
            ("", scored.matched),
            (" with its partner's answer", scored.mismatched),
        ):
            if values is not None:
                for position in (~torch.isfinite(values)).nonzero().flatten().tolist():
                    names[position].append(f"{model}{suffix}")
    return names


class NonFiniteGuard:
    """Stops a run, or skips a step, whose loss, z0 or gradient is not finite.

    The numbers are sums over all ranks, so that all ranks decide alike.

    Args:
        action: stop or skip.

    Raises:
        ConfigError: if it is neither.
    """

    def __init__(self, action: str) -> None:
        check_one_of("--model.non_finite", action, NON_FINITE)
        self._action = action
        self._num_skipped = self._num_skipped_in_a_row = 0

    def allows(
        self,
        trainer: Trainer,
        metrics: Mapping[str, float | None],
        batch: StepBatch,
        scored: Sequence[MicroBatchLogps | None],
    ) -> bool:
        """Whether the step may be taken; warns of the first few skipped steps.

        Args:
            trainer: of the run, before the step.
            metrics: of the step, `GUARDED_METRICS` among them, the same on all ranks.
            batch: this rank's part of the step's batch.
            scored: the log-probs of its micro-batches.

        Raises:
            StoppedRun: on all ranks alike, if a step may not be taken and the action is stop, or
                after `MAX_SKIPPED_IN_A_ROW` skipped steps in a row.
        """
        if is_finite(metrics):
            self._num_skipped_in_a_row = 0
            return True
        own = find_non_finite(batch, scored, partial(_location, trainer))
        warning = self._stop_or_warn(trainer.global_step + 1, metrics, sorted(gathered(own)))
        if warning is not None:
            warn(trainer, warning)
        return False

    def _stop_or_warn(
        self, step: int, metrics: Mapping[str, float | None], examples: Sequence[ExampleCheck]
    ) -> str | None:
        problem = _describe(step, metrics, examples)
        if self._action == "stop":
            raise StoppedRun(
                f"{problem} The step was not taken: the weights are those of step {step - 1}. Look "
                "at these records; lower --model.learning_rate, set --model.gradient_clip_norm, or "
                "skip such steps with --model.non_finite skip, each of which --ckpt_path last can "
                "resume with."
            )
        self._num_skipped += 1
        self._num_skipped_in_a_row += 1
        if self._num_skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise StoppedRun(
                f"{problem} {MAX_SKIPPED_IN_A_ROW} steps in a row were skipped, which a few bad "
                "records do not explain. Check the model's own weights, or lower "
                "--model.learning_rate."
            )
        if self._num_skipped > _MAX_WARNINGS:
            return None
        is_last = self._num_skipped == _MAX_WARNINGS
        note = " Further skipped steps are only counted." if is_last else ""
        return f"{problem} The step is skipped.{note}"

    def warn_of_skipped(self, trainer: Trainer) -> None:
        """Warn of the number of skipped steps, if any."""
        if self._num_skipped:
            warn(
                trainer,
                f"{self._num_skipped} steps were skipped because their loss or gradient was not "
                "finite; metrics.csv shows which.",
            )


def _location(trainer: Trainer, index: int) -> str:
    # Lightning sets `datamodule` without declaring it; one of another kind has no `location`.
    locate = getattr(trainer.datamodule, "location", None)  # pyright: ignore[reportAttributeAccessIssue]
    return locate(index) if locate is not None else f"example:{index}"


def _describe(
    step: int, metrics: Mapping[str, float | None], examples: Sequence[ExampleCheck]
) -> str:
    values = [(label, metrics[name]) for name, label in GUARDED_METRICS.items()]
    numbers = [f"{label} {value:.6g}" for label, value in values if value]
    bad = [f"{one.location} ({one.non_finite})" for one in examples if one.non_finite]
    cause = "All its log-probs are finite, so the gradient alone is not."
    if bad:
        more = f" and {len(bad) - _MAX_SHOWN} more" if len(bad) > _MAX_SHOWN else ""
        cause = f"Log-probs that are not finite: {'; '.join(bad[:_MAX_SHOWN])}{more}."
    elif any(not math.isfinite(metrics[name] or 0.0) for name in ("loss", "z0_raw")):
        cause = "All its log-probs are finite, but not what is computed from them."
    places = group_by_file(example.location for example in examples)
    return f"step {step} is not finite: {', '.join(numbers)}. {cause} Its batch: {places}."


def group_by_file(locations: Iterable[str]) -> str:
    """`train.jsonl:3,7` for `train.jsonl:3` and `train.jsonl:7`; at most `_MAX_SHOWN` of them."""
    lines: dict[str, list[str]] = defaultdict(list)
    locations = list(locations)
    for location in locations[:_MAX_SHOWN]:
        file, _, line = location.rpartition(":")
        lines[file].append(line)
    shown = "; ".join(f"{file}:{','.join(numbers)}" for file, numbers in lines.items())
    more = len(locations) - _MAX_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


@contextmanager
def explain_out_of_memory(scorer: BatchScorer, trainer: Trainer) -> Iterator[None]:
    """Turn an out-of-memory error into one that names the size of the micro-batch and what to try.

    Args:
        scorer: has the current micro-batch.
        trainer: of the run.

    Raises:
        StoppedRun: on a single rank, so that the run is saved.
        ModelError: on several, of which the others wait for this one, so that none can save.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        assert scorer.current_micro_batch is not None
        message = _memory_advice(scorer.current_micro_batch)
        reason = str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
        kind = StoppedRun if trainer.world_size == 1 else ModelError
        raise kind(f"out of memory ({reason}): {message}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host is out of memory; the host's allocator raises a RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _memory_advice(micro_batch: PackedBatch) -> str:
    lengths = _planned_lengths(micro_batch)
    tokens, longest = sum(lengths), max(lengths)
    if len(lengths) == 1:
        return (
            f"a single example of {tokens} tokens does not fit. Lower --data.max_length, or save "
            "memory with --model.activation_checkpointing true, --model.lora.r 16 or, for a frozen "
            "base, --model.dtype bfloat16."
        )
    return (
        f"a micro-batch of {len(lengths)} examples with {tokens} tokens does not fit. Try "
        f"--data.max_tokens {max(tokens // 2, longest)}, which changes no result, or save memory "
        "with --model.activation_checkpointing true or --model.lora.r 16."
    )


def _planned_lengths(micro_batch: PackedBatch) -> list[int]:
    """Tokens of each example as `--data.max_tokens` counts them: its prompt and the longer of its
    two completions."""
    lengths = micro_batch.matched.lengths
    if micro_batch.mismatched is None:
        return lengths
    others = micro_batch.mismatched.lengths
    if micro_batch.shares_prompts:
        prompts = micro_batch.prompt_lengths
        others = [prompt + other for prompt, other in zip(prompts, others, strict=True)]
    return [max(pair) for pair in zip(lengths, others, strict=True)]
