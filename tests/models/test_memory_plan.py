"""The memory plan, against what runs hold: exact for states, within a bound for activations."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from transformers import AutoConfig

from kto_lightning.models.lora import LoRA
from kto_lightning.models.lora_layers import add_adapter as add_new_adapter
from kto_lightning.models.memory_plan import RunShape, optimizer_bytes, plan_memory
from kto_lightning.models.model_shape import ModelShape, ParameterShape, policy_on_meta
from kto_lightning.models.packed_run import CHECKPOINTING
from kto_lightning.models.policy import Policy
from kto_lightning.module import KTOModule
from kto_lightning.training.optimizers import make_optimizer
from tests.support.factories import add_adapter, make_model
from tests.support.ranks import fit_on_ranks
from tests.support.steps import Examples, step_batch

WIDE = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 8}
LONG = Examples([(40, 60), (30, 50), (50, 40), (30, 60)], [True, False, True, False])
MATRIX = ParameterShape(shape=(1000, 300), itemsize=4, is_trained=True)
VECTOR = ParameterShape(shape=(300,), itemsize=4, is_trained=True)


def make_policy(kind: str, *, lora: bool = False) -> Policy:
    model = make_model(kind, vocab_size=97, **WIDE)
    return Policy(add_adapter(model) if lora else model).train()


def step_with(policy: Policy, optimizer: str) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state after a step."""
    made = make_optimizer(
        optimizer, policy.named_parameters(), learning_rate=1e-3, weight_decay=0.0
    )
    logps = policy(step_batch(LONG).micro_batches[0]).matched
    logps.sum().backward()
    made.step()
    states = [value for state in made.state.values() for value in state.values()]
    return {
        "weights": sum(p.nbytes for p in policy.parameters()),
        "gradients": sum(p.grad.nbytes for p in policy.parameters() if p.grad is not None),
        "optimizer": sum(value.nbytes for value in states if isinstance(value, Tensor)),
    }


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor"])
@pytest.mark.parametrize(("kind", "lora"), [("qwen2", False), ("llama", True)])
def test_weights_gradients_and_optimizer_state_are_exact(kind: str, lora: bool, optimizer: str):
    policy = make_policy(kind, lora=lora)
    planned = plan_memory(ModelShape.of(policy), RunShape(optimizer=optimizer)).device
    measured = step_with(policy, optimizer)
    assert {name: getattr(planned, name) for name in measured} == measured


Numerics = Literal["float32", "autocast", "rounded"]
"""Products in float32; in bfloat16 of float32 weights; of bfloat16 weights, as under FSDP2."""


def saved_bytes(policy: Policy, *, half: bool) -> int:
    """Bytes that a matched and a mismatched run leave for backward, without weights."""
    known = {t.untyped_storage().data_ptr() for t in (*policy.parameters(), *policy.buffers())}
    found: dict[int, Tensor] = {}  # keeps each alive, so that no other takes its address

    def note(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
    with autocast, saved_tensors_hooks(note, lambda tensor: tensor):
        policy(step_batch(LONG).micro_batches[0])
    kept = [t for address, t in found.items() if address not in known and not is_weight(t, policy)]
    return sum(t.untyped_storage().nbytes() for t in kept)


def is_weight(tensor: Tensor, policy: Policy) -> bool:
    """Whether a tensor is autocast's copy of a weight, which the plan counts as `gathered`."""
    shapes = {tuple(p.shape) for p in policy.parameters()}
    return tuple(tensor.shape) in shapes or tuple(tensor.shape[::-1]) in shapes


def planned_to_be_saved(model: ModelShape, run: RunShape) -> int:
    """What a plan keeps until backward: what offloading moves to the host, and the head's part
    without its tile."""
    plan = plan_memory(model, replace(run, offloads_activations=True))
    tile = 4 * round(run.max_tokens * (1 - run.prompt_share)) * model.vocabulary
    return plan.host.activations + plan.device.logits - tile


@pytest.mark.parametrize("numerics", ["float32", "autocast", "rounded"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(
    ("kind", "lora"), [("llama", False), ("qwen2", False), ("llama", True)], ids=str
)
def test_activations_are_within_a_tenth(
    kind: str, lora: bool, checkpointing: bool, numerics: Numerics
):
    policy = make_policy(kind, lora=lora)
    if checkpointing:
        policy.causal_lm.gradient_checkpointing_enable(CHECKPOINTING)
    model, half = ModelShape.of(policy), numerics != "float32"
    if numerics == "rounded":
        for parameter in policy.parameters():
            parameter.data = parameter.data.bfloat16()
    run = RunShape(
        half=half,
        is_sharded=numerics == "rounded",
        max_tokens=LONG.num_tokens,
        prompt_share=sum(LONG.prompt_lengths) / LONG.num_tokens,
        checkpoints_activations=checkpointing,
    )
    assert planned_to_be_saved(model, run) == pytest.approx(saved_bytes(policy, half=half), rel=0.1)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "qwen2_moe", "mamba"])
@pytest.mark.parametrize("lora", [None, LoRA(r=2)], ids=["full", "lora"])
def test_a_config_gives_the_shape_of_its_model(kind: str, lora: LoRA | None):
    model: Any = make_model(kind, vocab_size=97)
    config = AutoConfig.for_model(**model.config.to_dict())
    if lora is not None:
        model = add_new_adapter(model, lora)
    found = policy_on_meta(config, lora=lora)
    assert all(p.is_meta for p in found.parameters())
    assert ModelShape.of(found) == ModelShape.of(Policy(model, route="padded"))
    assert ModelShape.of(found).num_parameters == sum(p.numel() for p in model.parameters())


def check_plan() -> None:
    """For `prepare` of a job with FSDP2: rank 0 compares its shards with the plan."""
    update, seen = KTOModule._update, {}

    def measuring_update(module: KTOModule) -> float:
        assert module.policy is not None
        seen["gradients"] = local_bytes(p.grad for p in module.policy.parameters())
        return update(module)

    def on_train_end(module: KTOModule) -> None:
        reference: Any = module.reference
        assert module.policy is not None
        states = module.trainer.optimizers[0].state.values()
        seen["weights"] = local_bytes(module.policy.parameters())
        seen["optimizer"] = local_bytes(value for state in states for value in state.values())
        seen["reference"] = local_bytes(reference.policy.parameters())
        run = RunShape(num_ranks=module.trainer.world_size, is_sharded=True)
        other = ModelShape.of(reference.policy)
        planned = plan_memory(ModelShape.of(module.policy), run, other).device
        if module.global_rank == 0:
            assert {name: getattr(planned, name) for name in seen} == seen
            print("as planned", flush=True)

    KTOModule._update = measuring_update  # pyright: ignore[reportAttributeAccessIssue]
    KTOModule.on_train_end = on_train_end  # pyright: ignore[reportAttributeAccessIssue]


def local_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of this rank's shards; others that are no tensors count nothing."""
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(t.nbytes for t in local if isinstance(t, Tensor))


def test_the_shards_of_two_ranks_are_exact(policy: Path, train: Path, tmp_path: Path):
    options = ("--trainer.max_steps", 1)
    fit_on_ranks(policy, train, tmp_path, *options, strategy="fsdp2", prepare=check_plan)


QWEN = AutoConfig.for_model(
    "qwen2",
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
    tie_word_embeddings=False,
)
"""Of Qwen2.5-7B: 7.616 billion parameters in 28 layers of 233,057,792."""
HEAD_AND_EMBEDDINGS = 2 * 152064 * 3584
LAYER = 233_057_792


@pytest.fixture(scope="module")
def seven() -> ModelShape:
    return ModelShape.of(policy_on_meta(QWEN))


def test_numbers_of_seven_billion_parameters_worked_by_hand(seven: ModelShape):
    assert seven.num_parameters == 28 * LAYER + HEAD_AND_EMBEDDINGS + 3584 == 7_615_616_512
    run = RunShape(num_ranks=8, is_sharded=True, half=True, device_memory=80 * 2**30)
    device = plan_memory(seven, run, seven).device
    assert device.weights == device.gradients == device.reference == 4 * 7_615_616_512 // 8
    assert device.optimizer == pytest.approx(2 * device.weights, rel=1e-5)
    assert device.gathered == 2 * (HEAD_AND_EMBEDDINGS + 3584) + 2 * 2 * LAYER
    # The gradients of head and embeddings in bfloat16, and all of them once more as they are sent.
    assert device.reduced == (2 + 4) * (HEAD_AND_EMBEDDINGS + 3584)


def test_strategies_move_and_divide_the_parts(seven: ModelShape):
    one = plan_memory(seven, RunShape()).device
    ddp = plan_memory(seven, RunShape(num_ranks=16)).device
    assert (ddp.weights, ddp.optimizer) == (one.weights, one.optimizer)
    assert (one.reduced, ddp.reduced) == (0, one.gradients)
    sharded = RunShape(num_ranks=16, is_sharded=True)
    whole = plan_memory(seven, sharded)
    hybrid = plan_memory(seven, replace(sharded, num_replicas=2))
    assert hybrid.device.weights == 2 * whole.device.weights == one.weights // 8
    offloaded = plan_memory(seven, replace(sharded, is_offloaded=True))
    assert offloaded.host.total + offloaded.device.total == whole.device.total
    assert offloaded.host.optimizer == whole.device.optimizer
    assert offloaded.device.weights == 0


def test_an_offloaded_reference_takes_what_it_needs_beyond_a_step(seven: ModelShape):
    run = RunShape(num_ranks=2, offloads_reference=True)
    plan = plan_memory(seven, run, seven)
    assert plan.host.reference == 4 * seven.num_parameters
    assert plan.device.reference == 0  # gradients, buckets and activations take more than it
    adapter = ModelShape.of(policy_on_meta(QWEN, lora=LoRA(r=8)))
    small = replace(run, max_tokens=16)
    device = plan_memory(adapter, small, seven).device
    assert 0 < device.reference < plan.host.reference


def test_optimizer_states_worked_by_hand():
    assert optimizer_bytes("adamw", MATRIX) == 8 * 300_000 + 4
    assert optimizer_bytes("adafactor", MATRIX) == 4 * (1000 + 300) + 4
    assert optimizer_bytes("adamw_8bit", MATRIX) == 2 * (300_000 + 4 * 1172)
    assert optimizer_bytes("adamw_8bit", VECTOR) == optimizer_bytes("adamw", VECTOR)
    assert optimizer_bytes("adamw", MATRIX, num_shards=16) == 8 * 63 * 300 + 4
