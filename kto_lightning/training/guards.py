"""Guard rails of a step: numbers that are not finite, and memory that runs out."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from lightning import Trainer

from kto_lightning.batches.types import PackedBatch, StepBatch
from kto_lightning.distributed import gathered, warn
from kto_lightning.errors import ModelError, StoppedRun, check_one_of
from kto_lightning.training.scoring import BatchScorer, MicroLogps

NON_FINITE = ("stop", "skip")
GUARDED = {"loss": "loss", "z0_raw": "raw z0", "grad_norm": "gradient norm"}
"""What decides whether a step is taken. An infinite z0 gives a finite loss without a gradient."""
MOST_IN_A_ROW = 10
"""Skipped steps in a row after which a run stops: then it is not a few records any more."""
_MOST_WARNED = 3
_MOST_SHOWN = 64

Finding = tuple[int, str, str]
"""An example, its place (`file:line`) and what of it is not finite; empty where all is."""


def is_finite(metrics: Mapping[str, float | None]) -> bool:
    """Whether an optimizer step may be taken on these numbers (`GUARDED`)."""
    return all(math.isfinite(metrics[name] or 0.0) for name in GUARDED)


def examine(
    batch: StepBatch, scored: Sequence[MicroLogps | None], location: Callable[[int], str]
) -> list[Finding]:
    """This rank's examples, and which of their log-probs are not finite.

    Args:
        batch: the step's.
        scored: the log-probs of its micro-batches.
        location: tells `file:line` of an example.
    """
    findings: list[Finding] = []
    for micro_batch, logps in zip(batch.micro_batches, scored, strict=True):
        is_filler = micro_batch.is_filler.tolist()
        wrong = _wrong_logps(logps) if logps is not None else {}
        for place, index in enumerate(micro_batch.indices):
            if not is_filler[place]:
                findings.append((index, location(index), ", ".join(wrong.get(place, []))))
    return findings


def _wrong_logps(logps: MicroLogps) -> dict[int, list[str]]:
    """Of a micro-batch: place of an example → its log-probs that are not finite."""
    wrong: dict[int, list[str]] = defaultdict(list)
    for whose, known in (("policy", logps.policy), ("reference", logps.reference)):
        for which, values in (
            ("", known.matched),
            (" with its partner's answer", known.mismatched),
        ):
            if values is not None:
                for place in (~torch.isfinite(values)).nonzero().flatten().tolist():
                    wrong[place].append(f"{whose}{which}")
    return wrong


class NonFiniteGuard:
    """Stops a run, or skips a step, whose loss, z0 or gradient is not finite.

    It judges numbers that are sums over all ranks, so that all decide alike.

    Args:
        action: stop or skip.

    Raises:
        ConfigError: if it is neither.
    """

    def __init__(self, action: str) -> None:
        check_one_of("non_finite", action, NON_FINITE)
        self._action = action
        self._num_skipped = self._num_in_a_row = 0

    def allows(
        self,
        trainer: Trainer,
        metrics: Mapping[str, float | None],
        batch: StepBatch,
        scored: Sequence[MicroLogps | None],
    ) -> bool:
        """Whether the step may be taken; warns of the first few that may not.

        Args:
            trainer: the run's, before the step.
            metrics: the step's numbers, `GUARDED` among them, the same on all ranks.
            batch: this rank's part of the step's batch.
            scored: the log-probs of its micro-batches.

        Raises:
            StoppedRun: if a step may not be taken and the guard was asked to stop, or after
                `MOST_IN_A_ROW` skipped steps. On all ranks alike.
        """
        if is_finite(metrics):
            self._num_in_a_row = 0
            return True
        findings = sorted(gathered(examine(batch, scored, partial(_location, trainer))))
        warning = self._judge(trainer.global_step + 1, metrics, findings)
        if warning is not None:
            warn(trainer, warning)
        return False

    def _judge(
        self, step: int, metrics: Mapping[str, float | None], findings: Sequence[Finding]
    ) -> str | None:
        what = _describe(step, metrics, findings)
        if self._action == "stop":
            raise StoppedRun(
                f"{what} The step was not taken: the weights are those of step {step - 1}. Look at "
                "these records, lower --model.learning_rate, set --model.gradient_clip_norm, or "
                "leave such steps out with --model.non_finite skip."
            )
        self._num_skipped += 1
        self._num_in_a_row += 1
        if self._num_in_a_row == MOST_IN_A_ROW:
            raise StoppedRun(
                f"{what} {MOST_IN_A_ROW} steps in a row were skipped, so these are not a few "
                "records any more. Check the model's own weights, or lower --model.learning_rate."
            )
        if self._num_skipped > _MOST_WARNED:
            return None
        last = " More of them are only counted." if self._num_skipped == _MOST_WARNED else ""
        return f"{what} The step is skipped.{last}"

    def conclude(self, trainer: Trainer) -> None:
        """Say how many steps were skipped, if any."""
        if self._num_skipped:
            warn(
                trainer,
                f"{self._num_skipped} steps were skipped because their loss or gradient was not "
                "finite; metrics.csv tells which.",
            )


def _location(trainer: Trainer, index: int) -> str:
    locate = getattr(trainer.datamodule, "location", None)  # pyright: ignore[reportAttributeAccessIssue]
    return locate(index) if locate is not None else f"example:{index}"


def _describe(step: int, metrics: Mapping[str, float | None], findings: Sequence[Finding]) -> str:
    numbers = [f"{shown} {metrics[name]:.6g}" for name, shown in GUARDED.items() if metrics[name]]
    wrong = [f"{place} ({what})" for _, place, what in findings if what]
    cause = "All its log-probs are finite, so the gradient alone is not."
    if wrong:
        more = f" and {len(wrong) - _MOST_SHOWN} more" if len(wrong) > _MOST_SHOWN else ""
        cause = f"Log-probs that are not finite: {'; '.join(wrong[:_MOST_SHOWN])}{more}."
    elif any(not math.isfinite(metrics[name] or 0.0) for name in ("loss", "z0_raw")):
        cause = "All its log-probs are finite, but not what is computed from them."
    places = by_file(place for _, place, _ in findings)
    return f"step {step} is not finite: {', '.join(numbers)}. {cause} Its batch: {places}."


def by_file(places: Iterable[str]) -> str:
    """`train.jsonl:3,7` for `train.jsonl:3` and `train.jsonl:7`; at most `_MOST_SHOWN` of them."""
    lines: dict[str, list[str]] = defaultdict(list)
    places = list(places)
    for place in places[:_MOST_SHOWN]:
        file, _, line = place.rpartition(":")
        lines[file].append(line)
    shown = "; ".join(f"{file}:{','.join(numbers)}" for file, numbers in lines.items())
    more = len(places) - _MOST_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


@contextmanager
def explain_out_of_memory(scorer: BatchScorer, trainer: Trainer) -> Iterator[None]:
    """Turn running out of memory into an error that names the micro-batch and what to try.

    Args:
        scorer: knows the micro-batch at hand.
        trainer: the run's.

    Raises:
        StoppedRun: on one rank, which can still save what it has.
        ModelError: on several: the others wait for this one.
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
    """Of a device, or of the CPU, whose allocator raises a plain RuntimeError."""
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
