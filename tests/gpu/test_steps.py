"""A training step in half precision on a GPU, on every route and with all that changes memory.

Log-probs and gradients are held against separate plain forwards of the same model: in float64 on
the CPU, which is the truth, and with their products in the same half precision on the CPU, whose
error is the bound.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from lightning.fabric.utilities import move_data_to_device
from packaging.version import Version
from torch import nn

from kto_lightning.batches.types import Logps
from kto_lightning.models.packed_run import CHECKPOINTING
from kto_lightning.models.policy import Policy
from kto_lightning.models.randomness import disable_dropout
from kto_lightning.models.routes.choose import make_policy
from tests.support.factories import ARCHITECTURES, add_adapter, make_model
from tests.support.families import FAMILIES
from tests.support.plain_forwards import Plain, make_triples, pack_triples
from tests.support.plain_step import plain_step, true_step
from tests.support.steps import MIXED, fit_steps, make_module, step_batch
from tests.support.tolerances import FACTOR, ULPS, assert_same_numbers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
]

VOCABULARY = 97
SHORT = [(7, 9, 5), (1, 20, 3), (24, 1, 17)]
"""Tokens of (x, y, y'); windows are 16 tokens."""
LONG = [(100, 60, 90), (40, 30, 120), (3, 50, 1)]
"""Beyond a block of FlexAttention, which has 128 tokens."""
EXPERTS = {"qwen2_moe", "gpt_oss", "phimoe", "mixtral", "granitemoe_swa", "mimo_v2_flash"}
EXPERTS |= {"jetmoe", "llama4_text", "deepseek_v4", "nemotron_h"}
"""Of which half precision may choose others: these are compared in float32."""
NO_POLICY = {"xlnet"}
NEW = {"doge", "flint"}
"""Unknown to transformers before 5.23, or not causal there."""
EVERYDAY = ("llama", "gemma2", "gpt2", "lfm2", "mamba")
"""One of each route and kind of attention; the others of a CPU are slow tests."""


def check_step(
    make: Callable[[], nn.Module],
    device: torch.device,
    *,
    lengths: list[tuple[int, int, int]] = SHORT,
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: bool = False,
    prepare: Callable[[Policy], None] = lambda policy: None,
) -> Policy:
    """Both log-probs and all gradients of a step, another run between forward and backward."""
    model: Any = make().train()
    disable_dropout(model)  # as where models are loaded
    if checkpointing:
        model.gradient_checkpointing_enable(CHECKPOINTING)
    policy, _ = make_policy(model)
    prepare(policy.to(device))
    triples = make_triples(lengths, vocab_size=VOCABULARY)
    half = None if dtype == torch.float32 else dtype
    expected = Plain(make(), triples, autocast=half)

    def run(examples: Any) -> Logps:
        batch = pack_triples(examples, shares_prompts=policy.shares_prompts)
        with torch.autocast(device.type, half, enabled=half is not None):
            return policy(move_data_to_device(batch, device))

    logps = run(triples)
    with torch.no_grad():
        run(make_triples([(5, 4, 3)], vocab_size=VOCABULARY, seed=1))
    expected.assert_logps(move_data_to_device(logps, torch.device("cpu")))
    assert logps.matched is not None
    weights = torch.linspace(-1.0, 1.5, len(triples))
    (logps.matched * weights.to(device)).sum().backward()
    expected.assert_gradients(policy.cpu().model, weights)
    return policy


@pytest.mark.parametrize(
    "family",
    [
        family if family in EVERYDAY else pytest.param(family, marks=pytest.mark.slow)
        for family in ARCHITECTURES | FAMILIES
        if family not in NO_POLICY
    ],
)
def test_every_family(family: str, device: torch.device) -> None:
    if family in NEW and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("needs transformers 5.23")
    dtype = torch.float32 if family in EXPERTS else torch.bfloat16
    check_step(partial(make_model, family, vocab_size=VOCABULARY), device, dtype=dtype)


def with_adapter(family: str, **settings: Any) -> nn.Module:
    return add_adapter(make_model(family, vocab_size=VOCABULARY), **settings)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "lm_head"]], ids=["", "head"])
def test_an_adapter(target: Any, checkpointing: bool, device: torch.device) -> None:
    make = partial(with_adapter, "llama", target_modules=target)
    check_step(make, device, checkpointing=checkpointing)


@pytest.mark.parametrize("family", ["llama", "gemma2", "lfm2"])
def test_activation_checkpointing(family: str, device: torch.device) -> None:
    make = partial(make_model, family, vocab_size=VOCABULARY)
    check_step(make, device, checkpointing=True)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_activation_offloading(
    checkpointing: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kto_lightning.models.offloading.MIN_BYTES", 0)

    def offload(policy: Policy) -> None:
        policy.offloads_activations = True

    make = partial(make_model, "llama", vocab_size=VOCABULARY)
    check_step(make, device, checkpointing=checkpointing, prepare=offload)


@pytest.mark.parametrize("route", ["cached", "padded"])
def test_other_routes(route: Any, device: torch.device) -> None:
    make = partial(make_model, "mistral", vocab_size=VOCABULARY)
    policy = check_step(make, device, prepare=lambda policy: policy.use_route(route))
    assert policy.route == route


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "llama"])
def test_runs_of_more_than_one_block(family: str, device: torch.device) -> None:
    heads = {} if family == "llama" else {"head_dim": 16}
    dtype = torch.float32 if family in EXPERTS else torch.bfloat16
    make = partial(make_model, family, vocab_size=VOCABULARY, **heads)
    check_step(make, device, lengths=LONG, dtype=dtype)


def test_float16(device: torch.device) -> None:
    make = partial(make_model, "llama", vocab_size=VOCABULARY)
    check_step(make, device, dtype=torch.float16)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("max_tokens", [10**6, 30], ids=["one", "several"])
@pytest.mark.parametrize("kind", ["llama", "lora", "padded"])
def test_an_optimizer_step_by_the_trainer(
    kind: str, max_tokens: int, precision: Any, device: torch.device
) -> None:
    """Every number of the step's row: relative errors are at most twice the largest of plain code,
    and two ulps; z0 and rewards those of the log-probs that they are differences of."""
    half = precision == "bf16-mixed"
    module = make_module(kind, beta=0.2)
    expected, _ = true_step(module, MIXED)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        plain, _ = plain_step(module, MIXED)
    eps = torch.finfo(torch.bfloat16 if half else torch.float32).eps
    names = ("train/loss", "train/grad_norm", "train/logps/desirable", "train/logps/undesirable")
    errors = {name: abs(plain[name] - value) for name, value in expected.items()}
    relative = FACTOR * max(errors[n] / abs(expected[n]) for n in names) + ULPS * eps
    size = max(abs(value) for name, value in expected.items() if "logps" in name)
    rounding = FACTOR * max(errors[n] for n in (*names[2:], "train/z0_raw")) + ULPS * eps * size

    accelerator = "gpu" if device.type == "cuda" else "cpu"
    batch = step_batch(max_tokens=max_tokens, packed=kind != "padded")
    row = fit_steps(module, batch, accelerator=accelerator, devices=1, precision=precision).row
    found = {name: row[name] for name in expected}
    assert_same_numbers(found, expected, beta=0.2, relative=relative, rounding=rounding)
