"""A probe for whether a model can run packed, with prompts shared, and has a plain linear head.

No list of architectures would stay complete: they differ in position biases, attention sinks,
soft-capping, state spaces and masks. So the probe scores a few random tokens twice, as training
would and by the model's own forward, and compares the log-probs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from kto_lightning.batches.collate import pack
from kto_lightning.batches.types import PackedBatch
from kto_lightning.errors import ModelError
from kto_lightning.models.attention import UnsupportedAttentionError
from kto_lightning.models.loading_errors import explain_loading
from kto_lightning.models.policy import Policy

# In one example y' is shorter than y, in the other longer: rows that are off by a segment, or that
# see another sequence, change a log-prob.
PROMPT_LENGTHS = [5, 9]
MATCHED_LENGTHS = [14, 3]
MISMATCHED_LENGTHS = [3, 14]
# For a log-prob summed over about ten tokens. Rounding makes 1e-6 in float32, 5e-3 in bfloat16.
FULL_PRECISION_TOLERANCE, HALF_PRECISION_TOLERANCE = 1e-4, 0.05
KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}


def make_policy(model: nn.Module) -> tuple[Policy, str | None]:
    """Wrap a model as a policy: packed if it can run packed, else padded.

    Returns:
        the policy, and why it has to be padded: None where it is packed.

    Raises:
        ModelError: if the model's log-probs are not those of a linear head on its last hidden
            state, or would no longer be in training. Then both paths would be wrong.
    """
    padded = Policy(model, packed=False)
    _check_head_kind(padded.causal_lm)
    batch = _probe_batch(padded.causal_lm)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = _plain_logps(padded, batch)
            _check_head(padded, batch, expected)
            padding_reason = _padding_reason(padded, batch, expected)
    finally:
        model.train(training)
    return (Policy(model), None) if padding_reason is None else (padded, padding_reason)


def _padding_reason(
    padded: Policy, batch: PackedBatch, expected: tuple[Tensor, Tensor]
) -> str | None:
    """Why the model cannot run packed; None: it can.

    An attention that ignores the segments raises no error. So the log-probs of y and y' are
    compared with `expected`, those of separate forwards.
    """
    causal_lm = padded.causal_lm
    unknown = set(getattr(causal_lm.config.get_text_config(), "layer_types", None) or ())
    unknown -= KNOWN_LAYER_TYPES
    if unknown:
        return f"it has layers of type {', '.join(sorted(unknown))}"
    if not causal_lm._can_set_attn_implementation():
        return "its attention cannot be replaced"
    try:
        logps = Policy(padded.model)(batch)
    except UnsupportedAttentionError as error:
        return str(error)
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        return f"it does not take packed attention ({type(error).__name__}: {error})"
    finally:
        causal_lm.set_attn_implementation(padded.original_attention)
    found = logps.matched, logps.mismatched
    if not all(_close(*pair, causal_lm.dtype) for pair in zip(found, expected, strict=True)):
        return "its packed log-probs differ from those of its own forward"
    return None


def _check_head_kind(causal_lm: PreTrainedModel) -> None:
    """Check that the head is a weight with at most a low-rank update.

    The other adapters change no log-prob before the first update, so that comparing log-probs does
    not find them.
    """
    head: Any = causal_lm.get_output_embeddings()  # or peft's layer around it
    name = type(causal_lm).__name__
    if getattr(head, "weight", None) is None:
        raise ModelError(f"{name} has no output embeddings. Train a causal language model.")
    adapters = list(getattr(head, "lora_A", {}))
    extras = {
        "DoRA or another variant of LoRA": any(a in head.lora_variant for a in adapters),
        "a LoRA bias": any(head.lora_bias[a] for a in adapters),
        "dropout": any(getattr(head.lora_dropout[a], "p", 0.0) > 0 for a in adapters),
    }
    for extra, present in extras.items():
        if present:
            raise ModelError(
                f"{name}: the adapter on its head has {extra}, which is not supported. Leave "
                "the head out of the adapter's target_modules, or make the adapter without it."
            )


def _check_head(padded: Policy, batch: PackedBatch, expected: tuple[Tensor, Tensor]) -> None:
    """Compare the padded path with the model's own forward.

    Both use the model's original attention, so that a difference can only come from the head: the
    log-prob kernel in the one, the model's own logits in the other.
    """
    matched = padded(batch, mismatched=False).matched
    if not _close(matched, expected[0], padded.causal_lm.dtype):
        raise ModelError(
            f"{type(padded.causal_lm).__name__}: its log-probs are not those of its output "
            f"embeddings over its last hidden state (got {_listed(matched)}, its own forward gives "
            f"{_listed(expected[0])}). Train a causal language model with a plain head."
        )


def _close(found: Tensor | None, expected: Tensor, dtype: torch.dtype) -> bool:
    assert found is not None
    full = dtype == torch.float32
    tolerance = FULL_PRECISION_TOLERANCE if full else HALF_PRECISION_TOLERANCE
    return torch.allclose(found.to(expected), expected, rtol=tolerance, atol=tolerance)


def _listed(logps: Tensor | None) -> str:
    assert logps is not None
    return ", ".join(f"{value:.4f}" for value in logps.tolist())


def _plain_logps(padded: Policy, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Log-probs of y and y', one forward of the whole model per sequence, unpadded."""
    assert batch.mismatched is not None
    matched, mismatched, start, second_start = [], [], 0, 0
    for prompt, length, other in zip(
        PROMPT_LENGTHS, MATCHED_LENGTHS, MISMATCHED_LENGTHS, strict=True
    ):
        sequence = batch.matched.input_ids[start : start + prompt + length]
        tail = batch.mismatched.input_ids[second_start : second_start + other]
        matched.append(_plain_logp(padded, sequence, prompt))
        mismatched.append(_plain_logp(padded, torch.cat([sequence[:prompt], tail]), prompt))
        start, second_start = start + prompt + length, second_start + other
    return torch.stack(matched), torch.stack(mismatched)


def _plain_logp(padded: Policy, sequence: Tensor, prompt_length: int) -> Tensor:
    model = padded.causal_lm
    name = model.config._name_or_path or type(model).__name__
    # The first forward: settings that no check of the config finds fail here.
    with explain_loading(name, f"the model {name} cannot run"):
        logits = model(input_ids=sequence[None], use_cache=False).logits[0, :-1]
    logps = logits.float().log_softmax(-1).gather(1, sequence[1:, None]).squeeze(1)
    return logps[prompt_length - 1 :].sum()


@dataclass(frozen=True)
class _Example:
    index: int
    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    desirable: bool


def _probe_batch(causal_lm: PreTrainedModel) -> PackedBatch:
    """Two examples of random tokens, in the layout that shares prompts."""
    weight = causal_lm.get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]  # `_check_head_kind`
    assert isinstance(weight, Tensor)
    random = np.random.default_rng(0)
    prompts, matched, mismatched = (
        [random.integers(0, weight.shape[0], length) for length in lengths]
        for lengths in (PROMPT_LENGTHS, MATCHED_LENGTHS, MISMATCHED_LENGTHS)
    )
    batch = pack(
        [_Example(i, prompts[i], matched[i], bool(i)) for i in range(len(prompts))],
        mismatched,
        max_length=None,
        shares_prompts=True,
        weights=np.ones(len(prompts), dtype=np.float32),
    )
    return move_data_to_device(batch, weight.device)
