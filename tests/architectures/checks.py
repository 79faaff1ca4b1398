"""One family through loading, probe, policy and export, against separate plain forwards."""

import copy
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from kto_lightning.errors import ConfigError
from kto_lightning.models.build import BuiltModels
from kto_lightning.models.in_memory import causal_lm_of
from kto_lightning.models.lora import LoRA
from kto_lightning.models.lora_layers import expected_warnings_ignored
from tests.architectures.exports import check_export
from tests.architectures.loading import Outcome, build, outcome_of, reopened, route_of
from tests.architectures.shrink import VOCABULARY, WINDOW
from tests.support.plain_forwards import (
    Float64,
    Plain,
    Triple,
    gradients,
    make_triples,
    pack_triples,
)
from tests.support.tolerances import (
    FACTOR_OF_MANY,
    assert_errs_like_plain,
    assert_gradients_err_like_plain,
)

LENGTHS = [(7, 9, 5), (1, 20, 3), (24, 1, 17), (50, 45, 30), (8, 19, 4)]
"""Of (x, y, y'): prompts and completions on both sides of `WINDOW`, and some of similar length,
which share a group of padded rows."""
assert any(prompt > WINDOW for prompt, _, _ in LENGTHS)
NOT_COMPARED = {"reformer"}
"""Its backward asks for training mode, in which its hashes are drawn at random."""
_ADAPTER_DEVIATION = 0.1
_LORA = LoRA(r=4)


def check_family(family: str, directory: Path, *, checkpointing: bool) -> Outcome:
    """Compare a family's log-probs, gradients and exports with those of plain forwards, all weights
    trained and with an adapter.

    Args:
        checkpointing: also with activation checkpointing.

    Raises:
        AssertionError: if a number or a weight differs by more than rounding.
    """
    model = directory / "model"
    found = route_of(family, model)
    if found.outcome in ("refused", "not built") or family in NOT_COMPARED:
        return found
    _check_tuning(model, directory / "full", None, found.outcome, checkpointing)
    _check_tuning(model, directory / "lora", _LORA, found.outcome, checkpointing)
    return found


def _check_tuning(
    directory: Path, output: Path, lora: LoRA | None, route: str, checkpointing: bool
) -> None:
    built = build(directory, lora=lora)
    assert outcome_of(directory, lambda: built).outcome == route
    if lora is not None:
        _draw_adapter(built)
    triples = make_triples(LENGTHS, vocab_size=VOCABULARY)
    base = Plain(reopened(directory), triples)
    plain = base if lora is None else Plain(_adapted(reopened(directory), built), triples)
    weights = torch.linspace(-1.0, 1.5, len(triples))
    expected = plain.gradients(weights)
    _check_step(built, plain, base, expected, weights, triples)
    if checkpointing:
        for again in _built_with_checkpointing(directory, lora):
            if lora is not None:
                _copy_adapter(built, again)
            _check_step(again, plain, base, expected, weights, triples)
    check_export(built, plain, triples, directory, output)


def _built_with_checkpointing(directory: Path, lora: LoRA | None) -> Iterator[BuiltModels]:
    """One, or none where the model cannot checkpoint its activations, which is refused."""
    try:
        yield build(directory, lora=lora, activation_checkpointing=True)
    except ConfigError as error:
        if "activation_checkpointing" not in str(error):
            raise


def _check_step(
    built: BuiltModels,
    plain: Plain,
    base: Plain,
    expected: tuple[dict[str, Tensor], dict[str, Tensor]],
    weights: Tensor,
    triples: list[Triple],
) -> None:
    """Log-probs of y and y', the reference's in between, gradients, and y' without a run of y."""
    policy = built.policy
    batch = pack_triples(triples, shares_prompts=policy.shares_prompts)
    logps = policy(batch)
    base.assert_logps(built.reference.logps(batch), factor=FACTOR_OF_MANY)
    plain.assert_logps(logps, factor=FACTOR_OF_MANY)
    assert logps.matched is not None
    if logps.auxiliary_loss is not None:
        _check_auxiliary_loss(logps.auxiliary_loss, plain, triples)
    (logps.matched * weights).sum().backward()
    found = gradients(policy.model)
    assert all(p.requires_grad for p in policy.model.parameters() if p.grad is not None)
    assert_gradients_err_like_plain(found, *expected, factor=FACTOR_OF_MANY)
    with torch.no_grad():
        plain.assert_logps(policy(batch, matched=False), "mismatched", factor=FACTOR_OF_MANY)
        plain.assert_logps(policy(batch), factor=FACTOR_OF_MANY)


def _check_auxiliary_loss(found: Tensor, plain: Plain, triples: list[Triple]) -> None:
    """Compare the routers' load-balancing loss with that of the model's own forward."""
    rows = [torch.from_numpy(np.concatenate([t.prompt_ids, t.completion_ids])) for t in triples]
    inputs = {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "output_router_logits": True,
        "use_cache": False,
    }
    if "position_ids" in signature(causal_lm_of(plain.model).forward).parameters:
        # Qwen3-Omni would count those of images, for which its config lacks a token.
        inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).expand(len(rows), -1)
    with torch.no_grad():
        expected = getattr(plain.model(**inputs), "aux_loss", None)
        if expected is None:
            return  # its class in transformers computes none
        with Float64():
            truth = plain.exact(**inputs).aux_loss
    assert_errs_like_plain(
        found, expected, truth.double(), name="auxiliary loss", factor=FACTOR_OF_MANY
    )


def _draw_adapter(built: BuiltModels) -> None:
    """An adapter far from zero, where training reaches it."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in built.policy.model.parameters():
            if parameter.requires_grad:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(_ADAPTER_DEVIATION * drawn)


def _copy_adapter(source: BuiltModels, target: BuiltModels) -> None:
    _copy_trained(source.policy.model, target.policy.model)


def _copy_trained(source: torch.nn.Module, target: torch.nn.Module) -> None:
    theirs = dict(target.named_parameters())
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if parameter.requires_grad:
                theirs[name].copy_(parameter)


def _adapted(model: PreTrainedModel, built: BuiltModels) -> torch.nn.Module:
    """peft's own model with the policy's adapter."""
    peft_model: Any = built.policy.model
    config = copy.deepcopy(peft_model.peft_config["default"])
    with expected_warnings_ignored():
        adapted = get_peft_model(model, config)
    _copy_trained(peft_model, adapted)
    return adapted.eval()
