"""Operations and memory of a packed micro-batch that holds one long record, by its length.

    python benchmarks/long_sequences.py                                  # Qwen2.5-0.5B and 7B
    python benchmarks/long_sequences.py --shape qwen2.5-7b --tokens 32768 --prompt 0.5
    python benchmarks/long_sequences.py --real 2048                      # the same counts, computed

The record has a mismatched completion as long as its own. The parts of its step are run in turn:

- forward: of [x y], and without gradient of y' on top of the keys and values of x. What it leaves
  for backward is *kept*;
- backward;
- reference: the same forward without gradient.

Tensors have shapes and types but no data (PyTorch's `FakeTensorMode`), so that lengths are counted
that no CPU would run. Operations and bytes are those that the dispatcher sees, on its CPU path in
bfloat16 autocast. There attention of y' needs a mask, which it does not on CUDA: it is listed by
itself and left out of the other numbers. Memory is given beyond the weights, their gradients and
what a record of two tokens takes (autocast's copies of the weights). With `--real` a small model is
run with data and without, and the exit status is 1 unless operations are
equal and peaks within 1%.

With `--divided` it computes instead what each rank would send if the record's tokens were divided
over ranks, in bfloat16 and per forward of all layers: by Ulysses (arXiv:2309.14509), which
turns tokens into heads around attention, or in a ring (arXiv:2310.01889), which passes keys and
values on. Backward sends twice that.
"""

import argparse
import gc
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import describe, print_header, print_table, write_result
from inputs import SHAPES, Shape, make_model
from lightning_utilities.core.apply_func import apply_to_collection
from operations import counter
from silence import quiet
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from tracked_memory import TrackedMemory

from kto_kernels.linear_logps import function
from kto_lightning.batches.collate import StepBatches
from kto_lightning.batches.packing import MicroBatch
from kto_lightning.batches.sampler import StepPlan
from kto_lightning.batches.types import PackedBatch
from kto_lightning.data.examples import Example
from kto_lightning.models.packed_run import CHECKPOINTING, PackedRun
from kto_lightning.models.policy import Policy

TOKENS = (32768, 65536, 131072)
SHORT = 1024
RANKS = (2, 4, 8)
BYTES = 2
"""Of a number in bfloat16."""
DEFAULT_SHAPES = "qwen2.5-0.5b", "qwen2.5-7b"
GIB = 2**30


@dataclass(kw_only=True, slots=True)
class Part:
    """One part of the step."""

    operations: int = 0
    peak_bytes: int = 0
    """At most alive during the part, beyond what was alive before the step."""
    kept_bytes: int = 0
    """Alive at its end."""


class LongExamples:
    """Two records of the same lengths, each the other's partner."""

    def __init__(self, prompt: int, completion: int) -> None:
        self.prompt_lengths = np.array([prompt, prompt])
        self.completion_lengths = np.array([completion, completion])
        self.desirable = np.array([True, False])
        self.weights = np.ones(2, dtype=np.float32)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Example:
        return Example(
            index=index,
            prompt_ids=np.ones(self.prompt_lengths[index], dtype=np.int32),
            completion_ids=np.ones(self.completion_lengths[index], dtype=np.int32),
            desirable=bool(self.desirable[index]),
            weight=1.0,
        )


def long_batch(num_tokens: int, prompt_share: float) -> PackedBatch:
    """The micro-batch of one record."""
    prompt = max(1, round(num_tokens * prompt_share))
    examples: Any = LongExamples(prompt, num_tokens - prompt)
    batches = StepBatches(
        examples=examples,
        desirable_weight=1.0,
        undesirable_weight=1.0,
        max_length=None,
        can_share_prompts=True,
    )
    plan = StepPlan(
        examples=np.array([0]),
        partners=np.array([1]),
        micro_batches=[MicroBatch([0])],
        step_in_epoch=0,
    )
    return batches[plan].micro_batches[0]


def make_policy(shape: Shape, *, checkpointing: bool) -> Policy:
    policy = Policy(make_model(shape, max_position_embeddings=max(TOKENS)), route="packed")
    if checkpointing:
        policy.causal_lm.gradient_checkpointing_enable(CHECKPOINTING)
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return policy.train()


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Leave out what a CPU needs and CUDA does not: masks, and the kernel's look at its targets."""
    mask, check = PackedRun.mask, function._check

    def no_mask(
        self: PackedRun, q_length: int, kv_length: int, window: int | None, like: Tensor
    ) -> Tensor:
        return like.new_zeros(1, 1).expand(q_length, kv_length)

    PackedRun.mask, function._check = no_mask, lambda *_: None
    try:
        yield
    finally:
        PackedRun.mask, function._check = mask, check


def mask_bytes(batch: PackedBatch, precision: torch.dtype) -> int:
    """The peak while the mask for y' is made on a CPU."""
    assert batch.mismatched is not None
    length = batch.mismatched.lengths[0]
    with TrackedMemory() as memory:
        like = torch.empty(0, dtype=precision)
        PackedRun([length]).mask(length, batch.prompt_lengths[0] + length, None, like)
    return memory.peak


def measure(policy: Policy, batch: PackedBatch, precision: torch.dtype) -> dict[str, Part]:
    """The parts of the micro-batch's step, in the order in which they are run.

    They are run twice: what counts operations keeps tensors alive.
    """
    parts = {name: Part() for name in ("forward", "backward", "reference")}
    # Under `FakeTensorMode` tensors that have lost their data; else copies.
    batch = apply_to_collection(batch, Tensor, torch.clone)
    with as_on_cuda():
        with TrackedMemory() as memory:
            for name in _run_parts(policy, batch, precision):
                gc.collect()
                parts[name].peak_bytes, parts[name].kept_bytes = memory.peak, memory.alive
                memory.reset_peak()
        before = 0
        with counter() as counted:
            for name in _run_parts(policy, batch, precision):
                parts[name].operations = counted.get_total_flops() - before
                before = counted.get_total_flops()
    return parts


def _run_parts(policy: Policy, batch: PackedBatch, precision: torch.dtype) -> Iterator[str]:
    """Run the parts in turn; yields the name of each after it has ended."""
    with autocast(precision):
        loss = _matched_sum(policy, batch)
    yield "forward"
    loss.backward()
    del loss
    yield "backward"
    with torch.no_grad(), autocast(precision):
        _matched_sum(policy, batch)
    yield "reference"


def _matched_sum(policy: Policy, batch: PackedBatch) -> Tensor:
    logps = policy(batch)
    assert logps.matched is not None
    return logps.matched.sum()


def autocast(precision: torch.dtype) -> AbstractContextManager[Any]:
    if precision == torch.float32:
        return nullcontext()
    return torch.autocast("cpu", precision)


def count(
    shape: Shape, num_tokens: int, prompt_share: float, *, checkpointing: bool
) -> dict[str, Part]:
    """The parts of one record's step, and of making a mask for it on a CPU."""
    with quiet(), FakeTensorMode(allow_non_fake_inputs=True):
        policy = make_policy(shape, checkpointing=checkpointing)
        smallest = measure(policy, long_batch(2, 0.5), torch.bfloat16)
        batch = long_batch(num_tokens, prompt_share)
        parts = measure(policy, batch, torch.bfloat16)
        for name, part in parts.items():
            part.peak_bytes -= smallest[name].peak_bytes
            part.kept_bytes -= smallest[name].kept_bytes
        parts["mask"] = Part(peak_bytes=mask_bytes(batch, torch.bfloat16))
    return parts


def results_of(
    names: list[str], tokens: list[int], prompt_share: float
) -> Iterator[dict[str, Any]]:
    for name in names:
        for checkpointing in (False, True):
            for length in (SHORT, *tokens):
                parts = count(SHAPES[name], length, prompt_share, checkpointing=checkpointing)
                yield {
                    "shape": name,
                    "checkpointing": checkpointing,
                    "tokens": length,
                    "parts": {part: asdict(found) for part, found in parts.items()},
                }


def table_of(results: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The rows of the printed table, with operations per token beside those of a short record."""
    rows, short = [], 1.0
    for result in results:
        parts = result["parts"]
        steps = [parts[name]["operations"] for name in ("forward", "backward", "reference")]
        per_token = sum(steps) / result["tokens"]
        if result["tokens"] == SHORT:
            short = per_token
        rows.append(
            {
                "shape": result["shape"],
                "checkpointing": "yes" if result["checkpointing"] else "no",
                "tokens": str(result["tokens"]),
                "PFLOP": f"{sum(steps) / 1e15:.3f}",
                f"per token, of {SHORT}": f"{per_token / short:.2f}",
                "kept GiB": f"{parts['forward']['kept_bytes'] / GIB:.1f}",
                "forward peak GiB": f"{parts['forward']['peak_bytes'] / GIB:.1f}",
                "backward peak GiB": f"{parts['backward']['peak_bytes'] / GIB:.1f}",
                "reference peak GiB": f"{parts['reference']['peak_bytes'] / GIB:.1f}",
                "CPU mask GiB": f"{parts['mask']['peak_bytes'] / GIB:.1f}",
            }
        )
    return rows


def sent_bytes(shape: Shape, num_tokens: int, ranks: int) -> dict[str, float]:
    """Bytes that a rank sends in the forward of all layers, by the way tokens are divided."""
    head_size = shape.hidden_size // shape.num_heads
    others = (ranks - 1) / ranks
    token_heads = {
        # Queries, keys and values of its own tokens, and the result of its own heads back.
        "ulysses": num_tokens / ranks * 2 * (shape.num_heads + shape.num_kv_heads),
        "ring": num_tokens * 2 * shape.num_kv_heads,
    }
    per_head = BYTES * head_size * shape.num_layers * others
    return {name: count * per_head for name, count in token_heads.items()}


def divided_table(names: list[str], tokens: list[int]) -> list[dict[str, str]]:
    rows = []
    for name in names:
        for length in tokens:
            for ranks in RANKS:
                sent = sent_bytes(SHAPES[name], length, ranks)
                rows.append(
                    {"shape": name, "tokens": str(length), "ranks": str(ranks)}
                    | {f"{way} GiB": f"{count / GIB:.2f}" for way, count in sent.items()}
                )
    return rows


def compare_with_real(num_tokens: int, prompt_share: float) -> bool:
    """Print what a small model counts with data and without; whether it is the same."""
    batch, same = long_batch(num_tokens, prompt_share), True
    rows = []
    for checkpointing in (False, True):
        with quiet():
            policy = make_policy(SHAPES["small"], checkpointing=checkpointing)
            real = measure(policy, batch, torch.bfloat16)
            with FakeTensorMode(allow_non_fake_inputs=True):
                policy = make_policy(SHAPES["small"], checkpointing=checkpointing)
                fake = measure(policy, batch, torch.bfloat16)
        for name, part in real.items():
            close = abs(part.peak_bytes - fake[name].peak_bytes) <= part.peak_bytes / 100
            same &= close and part.operations == fake[name].operations
            rows.append(
                {
                    "part": name,
                    "checkpointing": "yes" if checkpointing else "no",
                    "GFLOP": f"{part.operations / 1e9:.3f}",
                    "without data": f"{fake[name].operations / 1e9:.3f}",
                    "peak MiB": f"{part.peak_bytes / 2**20:.1f}",
                    "peak without data": f"{fake[name].peak_bytes / 2**20:.1f}",
                }
            )
    print_table(rows)
    return same


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(DEFAULT_SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--prompt", type=float, default=0.875, help="share of the prompt")
    parser.add_argument("--real", type=int, metavar="TOKENS", help="compare with a real step")
    parser.add_argument("--divided", action="store_true", help="bytes sent over several ranks")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args(given)
    if not 0 < arguments.prompt < 1 or min(arguments.tokens) < 2:
        parser.error("--prompt must lie between 0 and 1, --tokens be at least 2")
    header = describe(torch.device("cpu")) | {"prompt": arguments.prompt, "precision": "bfloat16"}
    print_header(header)
    if arguments.divided:
        print_table(divided_table(arguments.shape, arguments.tokens))
        return 0
    if arguments.real is not None:
        return 0 if compare_with_real(arguments.real, arguments.prompt) else 1
    results = list(results_of(arguments.shape, arguments.tokens, arguments.prompt))
    print_table(table_of(results))
    if arguments.json is not None:
        write_result(arguments.json, header, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
