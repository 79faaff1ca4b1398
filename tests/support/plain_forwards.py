"""What packing, padding and prompt sharing are held against: separate plain forwards.

One sequence a forward, unpadded, the model's own attention, `log_softmax` of its own logits; and
the same in float64, which is the truth that both are held against.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kto_lightning.batches.collate import pack
from kto_lightning.batches.types import Logps, PackedBatch
from tests.support.tolerances import (
    FACTOR,
    assert_errs_like_plain,
    assert_gradients_err_like_plain,
)

SIDES = ("matched", "mismatched")


@dataclass(frozen=True, kw_only=True)
class Triple:
    """A prompt x with its completion y and a mismatched completion y'."""

    index: int
    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    mismatched_ids: np.ndarray
    desirable: bool


def make_triples(
    lengths: Sequence[tuple[int, int, int]], *, vocab_size: int, seed: int = 0
) -> list[Triple]:
    """Random tokens; `lengths` are those of (x, y, y')."""
    random = np.random.default_rng(seed)
    return [
        Triple(
            index=index,
            prompt_ids=random.integers(3, vocab_size, prompt),
            completion_ids=random.integers(3, vocab_size, completion),
            mismatched_ids=random.integers(3, vocab_size, mismatched),
            desirable=index % 2 == 0,
        )
        for index, (prompt, completion, mismatched) in enumerate(lengths)
    ]


def pack_triples(triples: list[Triple], *, shares_prompts: bool = True) -> PackedBatch:
    """All of them in one micro-batch."""
    return pack(
        triples,
        [triple.mismatched_ids for triple in triples],
        max_length=None,
        shares_prompts=shares_prompts,
        weights=np.ones(len(triples), dtype=np.float32),
    )


def plain_logp(model: Any, prompt: np.ndarray, completion: np.ndarray) -> Tensor:
    """log π(completion | prompt) in nats; without a prompt the first token is not scored."""
    ids = torch.from_numpy(np.concatenate([prompt, completion]))[None]  # [1, tokens]
    if ids.shape[1] == 0:
        return torch.zeros(())
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]  # [tokens - 1, vocabulary]
    token_logps = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return token_logps[max(len(prompt) - 1, 0) :].sum()


def plain_logps(model: Any, triples: list[Triple]) -> tuple[Tensor, Tensor]:
    """Those of y, with gradient, and those of y', without."""
    matched = [plain_logp(model, t.prompt_ids, t.completion_ids) for t in triples]
    with torch.no_grad():
        mismatched = [plain_logp(model, t.prompt_ids, t.mismatched_ids) for t in triples]
    return torch.stack(matched), torch.stack(mismatched)


class Float64(TorchFunctionMode):
    """Gives float64 where a model asks for float32, as it does in norms, softmax and positions, or
    for no type."""

    def __enter__(self) -> Any:
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(torch.float32)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        args = [_widened(argument) for argument in args]
        return function(*args, **{k: _widened(v) for k, v in (kwargs or {}).items()})


def _widened(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument


def float64_copy(model: Any) -> Any:
    """A copy to be run in `Float64`."""
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")  # the others know no float64
    return exact


def true_logps(model: Any, triples: list[Triple]) -> tuple[Tensor, Tensor]:
    """`plain_logps` of a `float64_copy`."""
    with Float64():
        matched, mismatched = plain_logps(model, triples)
    return matched.double(), mismatched.double()  # where nothing is scored, no model gave a type


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Of every parameter that has one."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Plain:
    """A model by separate plain forwards, in its own type and in float64.

    Args:
        autocast: the type of the products in place of its own, whose rounding then is the bound.
    """

    def __init__(
        self, model: Any, triples: list[Triple], *, autocast: torch.dtype | None = None
    ) -> None:
        self.model, self.exact = model, float64_copy(model)
        self.eps = torch.finfo(autocast or torch.float32).eps
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            self.logps = dict(zip(SIDES, plain_logps(model, triples), strict=True))
        self.truth = dict(zip(SIDES, true_logps(self.exact, triples), strict=True))

    def assert_logps(self, found: Logps, *sides: str, factor: float = FACTOR) -> None:
        """Those of these sides, of both where none is named; the other is None."""
        for side in SIDES:
            values = getattr(found, side)
            assert (values is None) == (side not in (sides or SIDES))
            if values is not None:
                expected, truth = self.logps[side], self.truth[side]
                assert_errs_like_plain(
                    values, expected, truth, name=side, eps=self.eps, factor=factor
                )

    def gradients(self, weights: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Those of a weighted sum of the matched log-probs, and their truth. Once."""
        for matched in (self.logps["matched"], self.truth["matched"]):
            (matched * weights.to(matched)).sum().backward()
        return gradients(self.model), gradients(self.exact)

    def assert_gradients(self, found: torch.nn.Module, weights: Tensor) -> None:
        """That of a weighted sum of the matched log-probs."""
        assert_gradients_err_like_plain(gradients(found), *self.gradients(weights), eps=self.eps)
