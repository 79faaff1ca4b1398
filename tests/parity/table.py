"""`python -m tests.parity.table`: how far `fit` is from TRL's `KTOTrainer`, as a Markdown table.

Twenty AdamW steps, and twenty SGD steps for the weights, on chat records of Llama-3's template.
Each number is the largest over all steps: relative differences of loss, log-probs and gradient
norm, absolute ones of z0 (nats) and rewards, and the largest difference of a weight over the
largest movement of a weight. There is no table where the second invariant does not hold.
"""

import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from kto_lightning.parity.agreement import movement
from kto_lightning.parity.our_trace import our_trace
from kto_lightning.parity.run import quiet
from kto_lightning.parity.trace import Inputs, Trace
from kto_lightning.parity.trl_trace import trl_trace
from tests.parity.assertions import assert_traces_agree
from tests.parity.cases import AXES, Case, pairwise_cover, write_inputs

_RELATIVE = {
    "loss": ("train/loss",),
    "log-probs": ("train/logps/desirable", "train/logps/undesirable"),
    "gradient norm": ("train/grad_norm",),
}
_ABSOLUTE = {
    "z0": ("train/z0",),
    "rewards": ("train/reward/desirable", "train/reward/undesirable"),
}


def table() -> Iterator[str]:
    """The table's lines, each as soon as it is known."""
    names = ["model", "tuning", *_RELATIVE, *_ABSOLUTE, "weights"]
    yield _line(names)
    yield _line(["---"] * len(names))
    plainest = replace(pairwise_cover()[0], data="llama3")
    for architecture in AXES["architecture"]:
        for tuning in AXES["tuning"]:
            case = replace(plainest, architecture=architecture, tuning=tuning)
            yield _line([architecture, tuning, *(f"{number:.0e}" for number in _numbers(case))])


def _numbers(case: Case) -> list[float]:
    with tempfile.TemporaryDirectory() as directory:
        inputs = write_inputs(case, Path(directory))
        ours, theirs = _both(case, inputs, Path(directory, "adamw"))
        numbers = [_largest(ours, theirs, columns, True) for columns in _RELATIVE.values()]
        numbers += [_largest(ours, theirs, columns, False) for columns in _ABSOLUTE.values()]
        ours, theirs = _both(replace(case, optimizer="sgd"), inputs, Path(directory, "sgd"))
        moved = movement(ours.weights, theirs.weights, inputs.initial_weights())
        return [*numbers, moved.share]


def _both(case: Case, inputs: Inputs, directory: Path) -> tuple[Trace, Trace]:
    theirs = trl_trace(inputs, case.settings(), directory / "trl")
    ours = our_trace(inputs, case.settings(), directory / "ours")
    assert_traces_agree(ours, theirs, beta=case.beta)
    return ours, theirs


def _largest(ours: Trace, theirs: Trace, columns: tuple[str, ...], relative: bool) -> float:
    largest = 0.0
    for column in columns:
        for a, b in zip(ours.columns[column], theirs.columns[column], strict=True):
            if not math.isnan(b):
                largest = max(largest, abs(a - b) / (abs(b) if relative else 1.0))
    return largest


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    lines = table()
    while True:
        with quiet():
            line = next(lines, None)
        if line is None:
            break
        print(line, flush=True)
