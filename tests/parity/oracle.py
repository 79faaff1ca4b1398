"""KTO with plain PyTorch, in float64, one sequence a forward: a third party between TRL and us.

It knows nothing of either: it tokenizes by itself, pads and packs nothing, takes the logits of the
model's own forward, writes the loss as the paper does, and descends by p ← p − η ∇p.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kto_lightning.parity.trace import Settings, Trace, trained_weights


@dataclass(kw_only=True, slots=True)
class _Example:
    prompt: list[int]
    completion: list[int]
    desirable: bool


def oracle_trace(
    policy: Any,
    reference: Any,
    tokenizer: Any,
    records: list[dict[str, Any]],
    settings: Settings,
) -> Trace:
    """Train `policy` in place by plain gradient descent and return every step's numbers.

    Args:
        policy: a causal language model or `PeftModel`, float64, in evaluation mode.
        reference: another of the same kind.
        records: `prompt`, `completion` (texts or messages) and `label`.
        settings: of plain gradient descent with a constant learning rate.
    """
    max_length, batch_size = settings.max_length, settings.batch_size
    assert max_length is not None
    examples = [_tokenize(record, tokenizer) for record in records]
    examples = [example for example in examples if len(example.prompt) < max_length]
    blocks = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    weights = {True: settings.desirable_weight, False: settings.undesirable_weight}
    parameters = [p for p in policy.parameters() if p.requires_grad]
    columns = defaultdict(list)
    for step in range(settings.steps):
        block = blocks[step % len(blocks)]
        value, row = _batch_loss(policy, reference, block, settings, weights)
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        squares = [gradient.square().sum() for gradient in gradients if gradient is not None]
        row |= {
            "train/grad_norm": torch.stack(squares).sum().sqrt(),
            "train/lr": settings.learning_rate,
        }
        for name, number in row.items():
            columns[name].append(float(number))
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter -= settings.learning_rate * gradient
    return Trace(columns=dict(columns), weights=trained_weights(policy))


def _batch_loss(
    policy: Any,
    reference: Any,
    block: list[_Example],
    settings: Settings,
    weights: dict[bool, float],
) -> tuple[Tensor, dict[str, Any]]:
    loss, beta, max_length = settings.loss, settings.beta, settings.max_length
    assert max_length is not None
    matched, routers = [], []
    for example in block:
        logp, router = _logp(policy, example.prompt, example.completion, max_length)
        matched.append(logp)
        routers += router
    with torch.no_grad():
        old = [_logp(reference, e.prompt, e.completion, max_length)[0] for e in block]
        # The completion of the example before; the first takes the last one's.
        pairs = [(e.prompt, block[i - 1].completion) for i, e in enumerate(block)]
        mismatched = torch.stack([_logp(policy, *pair, max_length)[0] for pair in pairs])
        old_mismatched = torch.stack([_logp(reference, *pair, max_length)[0] for pair in pairs])
    raw = (mismatched - old_mismatched).mean()
    z0 = raw.clamp(min=0) if loss == "kto" else torch.zeros_like(raw)

    ratios = [new - before for new, before in zip(matched, old, strict=True)]
    terms = []
    for example, ratio in zip(block, ratios, strict=True):
        gain = ratio - z0 if example.desirable else z0 - ratio
        terms.append(weights[example.desirable] * (1 - torch.sigmoid(beta * gain)))
    value = torch.stack(terms).mean()
    if routers:
        value = value + policy.config.router_aux_loss_coef * _load_balance(policy.config, routers)

    labels = [example.desirable for example in block]
    good, bad = (_class_mean(ratios, labels, label) * beta for label in (True, False))
    return value, {
        "train/loss": value.detach(),
        "train/z0": z0,
        "train/z0_raw": raw if loss == "kto" else math.nan,
        "train/reward/desirable": good,
        "train/reward/undesirable": bad,
        "train/reward/margin": good - bad,
        "train/logps/desirable": _class_mean(matched, labels, True),
        "train/logps/undesirable": _class_mean(matched, labels, False),
        "train/tokens": sum(min(len(e.prompt + e.completion), max_length) for e in block),
        "mismatched_logps": mismatched.abs().mean() if loss == "kto" else 0.0,
    }


def _logp(
    model: Any, prompt: list[int], completion: list[int], max_length: int
) -> tuple[Tensor, list[Tensor]]:
    """Σ_t log π(y_t | x, y_<t), and the router's logits of every layer if the model has one."""
    ids = torch.tensor([(prompt + completion)[:max_length]])
    routed = hasattr(model.config, "output_router_logits")
    output = model(ids, use_cache=False, **({"output_router_logits": True} if routed else {}))
    # logits [1, T, V]: row t predicts token t + 1.
    token_logps = output.logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return token_logps[max(len(prompt) - 1, 0) :].sum(), list(
        output.router_logits if routed else ()
    )


def _load_balance(config: Any, routers: list[Tensor]) -> Tensor:
    """Eqs. 4-6 of arXiv:2101.03961 over all tokens and layers, top-k instead of top-1."""
    probabilities = torch.cat(routers).softmax(-1)  # [tokens × layers, experts]
    chosen = torch.zeros_like(probabilities)
    chosen.scatter_(1, probabilities.topk(config.num_experts_per_tok).indices, 1.0)
    return config.num_experts * (chosen.mean(0) * probabilities.mean(0)).sum()


def _class_mean(values: list[Tensor], labels: list[bool], label: bool) -> float:
    chosen = [
        value.item() for value, is_label in zip(values, labels, strict=True) if is_label is label
    ]
    return sum(chosen) / len(chosen) if chosen else math.nan


def _tokenize(record: dict[str, Any], tokenizer: Any) -> _Example:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str):
        if not completion.endswith(tokenizer.eos_token):
            completion += tokenizer.eos_token
        start, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + completion)["input_ids"]
    else:
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template(prompt + completion)["input_ids"]
    common = 0
    while common < len(start) and start[common] == whole[common]:
        common += 1
    return _Example(prompt=whole[:common], completion=whole[common:], desirable=record["label"])
