"""One optimizer step in plain PyTorch, which the module's step is held against."""

import copy
from typing import Any

import torch
from torch import Tensor

from kto_lightning.models.reference import FrozenReference
from kto_lightning.module import KTOModule
from tests.support.plain_forwards import Float64, plain_logp
from tests.support.steps import DESIRABLE_WEIGHT, UNDESIRABLE_WEIGHT, Examples


def true_step(module: KTOModule, examples: Examples) -> tuple[dict[str, float], dict[str, Tensor]]:
    """`plain_step` in float64."""
    with Float64():
        return plain_step(module, examples, torch.float64)


def plain_step(
    module: KTOModule, examples: Examples, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The step's numbers and gradients in plain PyTorch: one sequence a forward, the paper's form
    of the loss. Each y' is the completion of the example before."""
    assert module.policy is not None
    assert isinstance(module.reference, FrozenReference)
    policy, reference = copy.deepcopy((module.policy, module.reference.policy))
    for scorer in (policy, reference):
        scorer.use_route("padded")  # their own attention
        scorer.to(dtype)
    count = len(examples)

    def logps(model: Any, shift: int) -> Tensor:
        pairs = [(examples[i].prompt_ids, examples[i - shift].completion_ids) for i in range(count)]
        return torch.stack([plain_logp(model, *pair) for pair in pairs])

    matched = logps(policy.model, 0)
    with torch.no_grad():
        old = logps(reference.model, 0)
        raw = (logps(policy.model, 1) - logps(reference.model, 1)).mean()
    beta, loss_name = module.objective.beta, module.objective.loss
    z0 = raw.clamp(min=0) if loss_name == "kto" else torch.zeros(())
    losses = []
    for i in range(count):
        gain = matched[i] - old[i] - z0 if examples.desirable[i] else z0 - (matched[i] - old[i])
        weight = DESIRABLE_WEIGHT if examples.desirable[i] else UNDESIRABLE_WEIGHT
        losses.append(weight * examples.weights[i] * (1 - torch.sigmoid(beta * gain)))
    loss = torch.stack(losses).mean()
    loss.backward()
    gradients = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    row = {"loss": loss, "z0": z0, "grad_norm": norm}
    if loss_name == "kto":
        row["z0_raw"] = raw
    for name, chosen in (("desirable", examples.desirable), ("undesirable", ~examples.desirable)):
        if chosen.any():
            row[f"reward/{name}"] = beta * (matched - old)[torch.from_numpy(chosen)].mean()
            row[f"logps/{name}"] = matched[torch.from_numpy(chosen)].mean()
    return {f"train/{name}": value.item() for name, value in row.items()}, gradients
