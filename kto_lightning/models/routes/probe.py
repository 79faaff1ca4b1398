"""A few random tokens, scored by a route as training would, and by the model's own forward.

No list of architectures would stay complete: they differ in position biases, attention sinks,
soft-capping, state spaces and masks. So log-probs are compared, and the gradient that comes back to
the embeddings of the tokens.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from kto_lightning.batches.collate import pack
from kto_lightning.batches.types import PackedBatch
from kto_lightning.models.policy import Policy
from kto_lightning.models.rope import limits_of
from kto_lightning.models.text_part import own_logits

# In one example y' is shorter than y, in the next longer: rows that are off by a segment, or that
# see another sequence, change a log-prob. The last is as long as others but for a few tokens, with
# which it shares padded rows.
SHORT = ((5, 14, 3), (9, 3, 14), (6, 15, 13))
"""Tokens of x, y and y' of each example."""
# For a log-prob summed over about ten tokens. Rounding makes 1e-6 in float32, 5e-3 in bfloat16.
_LOGPS_TOLERANCES = {True: 1e-4, False: 0.05}
# Of the norm of the gradient. Rounding makes 1e-5 in float32, some percent in bfloat16.
_GRADIENT_TOLERANCES = {True: 1e-3, False: 0.3}
_LIMITS = re.compile("window|chunk|block_size|topk|local_attention")
"""In the names of a config's settings that may be such a length."""


@dataclass(frozen=True)
class _Example:
    index: int
    """Of no record: negative."""
    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    desirable: bool


@dataclass(kw_only=True)
class Probe:
    """Examples of random tokens, and what the model's own forward makes of them."""

    examples: list[_Example]
    others: list[np.ndarray]
    """The mismatched completions."""
    device: torch.device
    full_precision: bool
    matched: Float[Tensor, " batch"] | None = None
    mismatched: Float[Tensor, " batch"] | None = None
    gradient: Float[Tensor, "ids width"] | None = None
    """Of the sum of the matched log-probs, by token id; None: not compared."""

    @classmethod
    def of(cls, model: PreTrainedModel, lengths: Sequence[tuple[int, int, int]]) -> "Probe":
        """Random tokens for a model.

        Args:
            lengths: tokens of x, y and y' of each example.
        """
        weight = model.get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]  # checked by `choose.py`
        assert isinstance(weight, Tensor)
        known = np.setdiff1d(np.arange(weight.shape[0]), list(_special_ids(model)))
        random = np.random.default_rng(0)
        drawn = [[random.choice(known, n) for n in triple] for triple in lengths]
        return cls(
            examples=[_Example(-1 - i, x, y, bool(i)) for i, (x, y, _) in enumerate(drawn)],
            others=[other for _, _, other in drawn],
            device=weight.device,
            full_precision=model.dtype == torch.float32,
        )

    @property
    def first_sequence(self) -> Int[Tensor, " tokens"]:
        """The first prompt with its completion."""
        return self._ids(self.examples[0].prompt_ids, self.examples[0].completion_ids)

    def batch(self, *, shares_prompts: bool) -> PackedBatch:
        """All examples, with their mismatched completions."""
        return self._pack(self.examples, self.others, shares_prompts=shares_prompts)

    def run_own_forward(self, model: PreTrainedModel) -> None:
        """Score each sequence by a forward of the whole model, with gradient."""
        with torch.enable_grad(), _embeddings_recorded(model) as embedded:
            self.matched = torch.stack(
                [
                    _own_logp(model, self._ids(e.prompt_ids, e.completion_ids), e)
                    for e in self.examples
                ]
            )
            # Reformer has a backward in training mode only.
            with suppress(AssertionError):
                self.gradient = self._gradient(self.matched, embedded)
        self.matched = self.matched.detach()
        with torch.no_grad():
            pairs = zip(self.examples, self.others, strict=True)
            self.mismatched = torch.stack(
                [_own_logp(model, self._ids(e.prompt_ids, other), e) for e, other in pairs]
            )

    @torch.no_grad()
    def run_one_by_one(self, padded: Policy) -> None:
        """Score each sequence alone on the padded route, which then has no padding. Unlike the
        model's own forward it makes no logits of prompts, which long ones have no room for."""
        self.matched, self.mismatched = (
            torch.stack([self._score_alone(padded, e, ids) for e, ids in pairs])
            for pairs in (
                [(e, e.completion_ids) for e in self.examples],
                list(zip(self.examples, self.others, strict=True)),
            )
        )

    def difference(self, policy: Policy) -> str | None:
        """What differs on the policy's route: its log-probs or its gradients; None: nothing."""
        batch, gradient = self.batch(shares_prompts=policy.shares_prompts), None
        if self.gradient is None:
            with torch.no_grad():
                logps = policy(batch)
        else:
            with torch.enable_grad(), _embeddings_recorded(policy.causal_lm) as embedded:
                logps = policy(batch)
                gradient = self._gradient(logps.matched, embedded)
        found, expected = (logps.matched, logps.mismatched), (self.matched, self.mismatched)
        if not all(self._close(*pair) for pair in zip(found, expected, strict=True)):
            return "log-probs"
        if self.gradient is None or gradient is None:
            return None
        allowed = _GRADIENT_TOLERANCES[self.full_precision] * self.gradient.norm()
        return None if (gradient - self.gradient).norm() <= allowed else "gradients"

    def _close(self, found: Tensor | None, expected: Tensor | None) -> bool:
        assert found is not None
        assert expected is not None
        return close(found, expected, full_precision=self.full_precision)

    def _gradient(
        self, logps: Tensor | None, embedded: list[tuple[Tensor, Tensor]]
    ) -> Tensor | None:
        """The gradient of summed log-probs by the embedding of each token id, `[ids, width]`.

        By id and not by position, because routes place tokens differently.
        """
        assert logps is not None
        if not embedded:
            return None
        known = self._ids(
            *(np.concatenate([e.prompt_ids, e.completion_ids]) for e in self.examples)
        )
        known = known.unique()
        outputs = [output for _, output in embedded]
        gradients = torch.autograd.grad(logps.sum(), outputs, allow_unused=True)
        total = torch.zeros(len(known), outputs[0].shape[-1], device=self.device)
        for (ids, _), gradient in zip(embedded, gradients, strict=True):
            if gradient is not None:
                rows = torch.searchsorted(known, ids.flatten()).clamp(max=len(known) - 1)
                is_known = known[rows] == ids.flatten()  # others are padding
                flat = gradient.flatten(0, -2).float()
                total.index_add_(0, rows[is_known], flat[is_known])
        return total

    def _score_alone(self, padded: Policy, example: _Example, completion: np.ndarray) -> Tensor:
        alone = _Example(example.index, example.prompt_ids, completion, example.desirable)
        logps = padded(self._pack([alone], None, shares_prompts=False)).matched
        assert logps is not None
        return logps[0]

    def _pack(
        self, examples: list[_Example], others: list[np.ndarray] | None, *, shares_prompts: bool
    ) -> PackedBatch:
        batch = pack(
            examples,
            others,
            max_length=None,
            shares_prompts=shares_prompts,
            weights=np.ones(len(examples), dtype=np.float32),
        )
        return move_data_to_device(batch, self.device)

    def _ids(self, *pieces: np.ndarray) -> Tensor:
        return torch.from_numpy(np.concatenate(pieces)).to(self.device)


def _special_ids(model: PreTrainedModel) -> set[int]:
    """Tokens that a text does not have in its middle: padding, whose embedding can be 0, where not
    every model has a gradient (Gemma 3n); those of images."""
    configs = model.config.to_dict(), model.config.get_text_config().to_dict()
    return {
        value
        for config in configs
        for name, value in config.items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }


def close(found: Tensor, expected: Tensor, *, full_precision: bool) -> bool:
    """Whether log-probs differ by rounding alone."""
    tolerance = _LOGPS_TOLERANCES[full_precision]
    return torch.allclose(found.to(expected), expected, rtol=tolerance, atol=tolerance)


def own_token_logps(model: PreTrainedModel, input_ids: Tensor) -> Float[Tensor, " tokens"]:
    """Log-probs of all tokens but the first, by the model's own forward."""
    logits = own_logits(model, input_ids)[:-1]
    return logits.float().log_softmax(-1).gather(1, input_ids[1:, None]).squeeze(1)


def long_example(model: PreTrainedModel, longest: int | None) -> list[tuple[int, int, int]]:
    """Examples of which one is longer than all limits of a model that sequences can cross; with
    short neighbours. Empty if there is no such limit.

    Args:
        model: any.
        longest: most tokens of a sequence; None: unlimited.
    """
    settings = model.config.get_text_config().to_dict()
    found = [value for name, value in settings.items() if _LIMITS.search(name)]
    found += limits_of(model).all
    crossed = [
        limit
        for limit in found
        if isinstance(limit, int) and SHORT[0][0] < limit and (longest is None or limit < longest)
    ]
    if not crossed:
        return []
    beyond = max(crossed) + max(max(crossed) // 2, 16)
    prompt = beyond if longest is None else min(beyond, longest - 7)
    return [SHORT[0], (prompt, 4, 7), SHORT[1]]


def _own_logp(model: PreTrainedModel, input_ids: Tensor, example: _Example) -> Tensor:
    return own_token_logps(model, input_ids)[len(example.prompt_ids) - 1 :].sum()


@contextmanager
def _embeddings_recorded(model: PreTrainedModel) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Token ids and embeddings of the block's forwards that have a gradient."""
    embedded: list[tuple[Tensor, Tensor]] = []

    def record(module: nn.Module, arguments: tuple, options: dict, output: Tensor) -> Tensor | None:
        if torch.is_grad_enabled():
            # A copy that is no leaf: GIT adds to it in place.
            zero = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            output = output + zero
            embedded.append(((*arguments, *options.values())[0], output))
            return output
        return None

    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(record, with_kwargs=True)
    try:
        yield embedded
    finally:
        handle.remove()
