"""A reference that follows the policy: its weights, checkpoints and reports."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from trl.trainer.callbacks import SyncRefModelCallback

from kto_lightning.errors import ConfigError
from kto_lightning.models.following import (
    Follow,
    FollowingReference,
    reference_state,
    restore_reference,
)
from kto_lightning.models.lora import LoRA
from kto_lightning.models.policy import Policy
from kto_lightning.models.reference import FrozenReference
from kto_lightning.models.routes.choose import make_policy
from kto_lightning.module import KTOModule
from kto_lightning.sharded_checkpoint import read_checkpoint, read_header, write_directory
from tests.support.cli import (
    EVERY_STEP,
    TWO_EPOCHS,
    fit,
    numbers,
    rows,
    run_cli,
    small_model,
    weights,
)
from tests.support.comparison import assert_runs_equal
from tests.support.factories import make_model
from tests.support.faults import fit_until
from tests.support.steps import VOCABULARY, FitResult, fit_steps, make_module, step_batch
from tests.support.tolerances import EPS, RELATIVE, SIX_DIGITS, assert_same_numbers

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")


def make_pair(architecture: str = "llama", **follow: Any) -> tuple[Policy, FollowingReference]:
    """A policy, and a reference that follows it and starts with other weights."""
    policy, start = (
        make_policy(make_model(architecture, vocab_size=VOCABULARY, seed=seed))[0]
        for seed in (0, 1)
    )
    frozen = FrozenReference(start, "another model", name="another")
    return policy, FollowingReference(frozen, Follow(**follow), policy)


def state(policy: Policy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # qwen2 ties its head
def test_updates_match_hand_computed_values(architecture: str) -> None:
    """α = 1/4 from 1 towards 3: 1 + 2/4 = 1.5, then 1.5 + 1.5/4 = 1.875, exact in binary."""
    policy, reference = make_pair(architecture, every_n_steps=2, alpha=0.25)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.fill_(3.0)
        for parameter in reference.policy.parameters():
            parameter.fill_(1.0)
    buffers = {name: b.clone() for name, b in reference.policy.named_buffers()}
    assert buffers
    for step, expected in ((1, 1.0), (2, 1.5), (3, 1.5), (4, 1.875)):
        reference.after_step(step, policy)
        assert all((p == expected).all() for p in reference.policy.parameters())
    assert all((p == 3.0).all() for p in policy.parameters())
    assert all(torch.equal(b, buffers[n]) for n, b in reference.policy.named_buffers())


@pytest.mark.parametrize("alpha", [0.6, 0.1, 1.0])
def test_updates_match_trl(alpha: float) -> None:
    policy, reference = make_pair(alpha=alpha, every_n_steps=1)
    theirs = copy.deepcopy(reference.policy)
    generator = torch.Generator().manual_seed(0)
    for step in (1, 2, 3):
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        reference.after_step(step, policy)
        SyncRefModelCallback._sync_target_model(policy, theirs, alpha)
        for own, their, new in zip(
            reference.policy.parameters(), theirs.parameters(), policy.parameters(), strict=True
        ):
            # Both round several times.
            bound = 2 * step * EPS * torch.maximum(own.abs(), new.abs()).clamp(min=1.0)
            assert ((own - their).abs() <= bound).all()
            assert alpha < 1.0 or torch.equal(own, new)


class Recorded(FollowingReference):
    """Records policy and reference after each step."""

    def after_step(self, step: int, policy: Policy) -> None:
        super().after_step(step, policy)
        self.steps: list[int] = [*getattr(self, "steps", []), step]
        self.states: list[tuple[dict, dict]] = [
            *getattr(self, "states", []),
            (state(policy), state(self.policy)),
        ]


def fit_following(num_steps: int, **follow: Any) -> tuple[FitResult, Recorded, KTOModule]:
    module = make_module()
    assert isinstance(module.reference, FrozenReference)
    assert module.policy is not None
    module.reference = Recorded(module.reference, Follow(**follow), module.policy)
    result = fit_steps(module, *[step_batch(max_tokens=40)] * num_steps)
    return result, module.reference, module


def test_the_reference_is_updated_every_n_steps_and_never_trained() -> None:
    module = make_module()
    assert isinstance(module.reference, FrozenReference)
    expected = {n: p.double() for n, p in state(module.reference.policy).items()}
    result, reference, module = fit_following(5, every_n_steps=2, alpha=0.6)
    assert reference.steps == [1, 2, 3, 4, 5]
    for step, (policy, followed) in zip(reference.steps, reference.states, strict=True):
        if step % 2 == 0:
            expected = {n: 0.4 * p + 0.6 * policy[n].double() for n, p in expected.items()}
        for name, value in followed.items():
            torch.testing.assert_close(value.double(), expected[name], rtol=4 * EPS, atol=4 * EPS)
    plain = fit_steps(make_module(), *[step_batch(max_tokens=40)] * 5)
    assert result.rows[:2] == plain.rows[:2]
    assert all(a != b for a, b in zip(result.rows[2:], plain.rows[2:], strict=True))
    trained = {id(p) for group in module.optimizers().param_groups for p in group["params"]}  # pyright: ignore[reportAttributeAccessIssue]
    assert trained == {id(p) for p in module.parameters()}
    assert not any(p.requires_grad for p in reference.policy.parameters())
    assert not any(id(p) in trained for p in reference.policy.parameters())
    assert all(name.startswith("policy.") for name in module.state_dict())


def test_a_copy_at_every_step_makes_rewards_zero() -> None:
    result, _, _ = fit_following(4, every_n_steps=1, alpha=1.0)
    first, *rest = result.rows
    assert abs(first["train/reward/desirable"]) > 1e-3
    for row in rest:
        for name in ("z0_raw", "reward/desirable", "reward/undesirable"):
            assert abs(row[f"train/{name}"]) < 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, r"--model\.follow\.every_n_steps must be at least 1, got 0"),
        ({"alpha": 0.0}, r"--model\.follow\.alpha must be above 0 and at most 1, got 0"),
        ({"alpha": 1.5}, r"--model\.follow\.alpha must be above 0 and at most 1, got 1\.5"),
        ({"alpha": float("nan")}, r"--model\.follow\.alpha .* got nan"),
    ],
)
def test_invalid_settings_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Follow(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": LoRA()}, r"--model\.follow is for full fine-tuning"),
        ({"reference_cache": "somewhere"}, r"--model\.reference_cache keeps the log-probs of a"),
    ],
)
def test_incompatible_settings_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KTOModule("unused", follow=Follow(), **settings)


def test_a_reference_of_another_shape_is_rejected() -> None:
    policy, _ = make_pair()
    for architecture, overrides in (("llama", {"intermediate_size": 32}), ("gpt2", {})):
        other = make_policy(make_model(architecture, vocab_size=VOCABULARY, **overrides))[0]
        with pytest.raises(ConfigError, match=r"reference other has others than the policy \(\d+"):
            FollowingReference(FrozenReference(other, "", name="other"), Follow(), policy)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A process group of one process."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def shard(policy: Policy, mesh: DeviceMesh) -> None:
    for layer in policy.causal_lm.base_model.layers:  # pyright: ignore[reportGeneralTypeIssues]
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)


def test_sharded_weights(mesh: DeviceMesh, tmp_path: Path) -> None:
    policy, whole = make_pair(every_n_steps=1, alpha=0.6)
    start = state(whole.policy)
    sharded = copy.deepcopy(whole)
    for model in (policy, sharded.policy):
        shard(model, mesh)
    (micro_batch,) = step_batch().micro_batches
    sharded.logps(micro_batch)
    assert all(isinstance(p, DTensor) for p in sharded.policy.parameters())  # nothing is gathered
    sharded.after_step(1, policy)
    assert all(isinstance(p, DTensor) for p in sharded.policy.parameters())
    followed = {name: p.full_tensor() for name, p in sharded.policy.named_parameters()}  # pyright: ignore[reportCallIssue]
    plain, _ = make_pair()
    whole.after_step(1, plain)
    assert all(torch.equal(followed[name], p) for name, p in whole.policy.named_parameters())
    assert not any(torch.equal(followed[name], start[name]) for name in start)
    saved = reference_state(sharded)
    assert all(isinstance(value, DTensor) for value in saved["reference"].values())
    origin = {"kto": {"reference": "policy", "follow": {}}}
    write_directory(saved | origin, tmp_path / "step=1.ckpt")
    for read in (read_header, read_checkpoint):
        _, other = make_pair()
        shard(other.policy, mesh)
        checkpoint = read(tmp_path / "step=1.ckpt")
        restore_reference(checkpoint, other, requested=None, resuming=True)
        for name, p in other.policy.named_parameters():
            assert torch.equal(p.full_tensor(), followed[name])  # pyright: ignore[reportCallIssue]


FOLLOW = ("--model.follow.every_n_steps", 4, "--model.follow.alpha", 0.75)


@pytest.fixture(scope="module")
def whole(policy: Path, train: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps without a stop, with checkpoints of the eighth and the last."""
    options = (*TWO_EPOCHS, *FOLLOW, "--checkpoint.every_n_steps", 4)
    return fit(
        policy, train, tmp_path_factory.mktemp("whole"), *options, "--data.validation", train
    )


def checkpoint_of(output: Path, step: int = 12) -> dict[str, Any]:
    path = output / "checkpoints" / f"step={step}.ckpt"
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("step", [3, 4, 6])  # between updates, at one, at an epoch's end
def test_a_killed_run_resumes_bit_for_bit(
    step: int, policy: Path, train: Path, whole: Path, tmp_path: Path
) -> None:
    options = (*TWO_EPOCHS, *FOLLOW, *EVERY_STEP, "--data.validation", train)
    fit_until(step, policy, train, tmp_path, *options)
    fit(policy, train, tmp_path, *options, "--ckpt_path", "last")
    assert_runs_equal(tmp_path, whole)
    found, expected = (checkpoint_of(output)["reference"] for output in (tmp_path, whole))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_steps_differ_from_those_with_a_fixed_reference_after_the_update(
    policy: Path, train: Path, whole: Path, tmp_path: Path
) -> None:
    plain = fit(policy, train, tmp_path, *TWO_EPOCHS, "--data.validation", train)
    assert rows(plain)[:4] == rows(whole)[:4]
    assert all(a != b for a, b in zip(rows(plain)[4:], rows(whole)[4:], strict=True))


def test_checkpoints_hold_the_reference_and_exports_do_not(policy: Path, whole: Path) -> None:
    """At step 12 the reference moves 3/4 of the way from its weights of step 8 to the policy's."""
    earlier, last = checkpoint_of(whole, 8), checkpoint_of(whole, 12)
    trained = {n.removeprefix("policy."): w.double() for n, w in last["state_dict"].items()}
    assert trained.keys() == last["reference"].keys()
    for name, followed in last["reference"].items():
        expected = 0.25 * earlier["reference"][name].double() + 0.75 * trained[name]
        torch.testing.assert_close(followed.double(), expected, rtol=4 * EPS, atol=4 * EPS)
        assert not torch.equal(followed.double(), trained[name])
    for name, exported in weights(whole).items():
        assert torch.equal(exported.double(), trained[f"model.{name}"])
    recorded = json.loads((whole / "model" / "kto_lightning.json").read_text())
    assert recorded["reference"] == str(policy)
    assert recorded["follow"] == last["kto"]["follow"] == {"every_n_steps": 4, "alpha": 0.75}


def test_the_summary_describes_the_reference(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--trainer.max_steps", 2)
    fit(policy, train, tmp_path / "one", *few, *FOLLOW)
    printed = capsys.readouterr()
    assert "a copy that follows the policy: every 4 steps, alpha 0.75" in printed.out
    assert "--model.follow.every_n_steps 4 is more than the 2 steps of this run" in printed.out
    other = small_model(tmp_path / "other", seed=1)
    named = ("--model.reference", other, "--model.follow.every_n_steps", 1)
    fit(policy, train, tmp_path / "two", *few, *named)
    printed = "".join(capsys.readouterr().out.split())
    assert f"{other},whichfollowsthepolicy:everystep,alpha0.6" in printed
    assert "ismorethan" not in printed


def predict(policy: Path, train: Path, output: Path, *options: Any) -> list[dict[str, Any]]:
    command = ("predict", "--model.policy", policy, "--data.predict", train)
    command += ("--output_dir", output, "--trainer.accelerator", "cpu")
    assert run_cli(*command, *options) == 0
    path = output / f"{train.name}.rewards.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rewards_of_a_checkpoint_use_its_reference(
    policy: Path, train: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = ("--ckpt_path", whole / "checkpoints" / "step=12.ckpt")
    found = predict(policy, train, tmp_path, *checkpoint)
    model = AutoModelForCausalLM.from_pretrained(policy)
    followed = checkpoint_of(whole)["reference"]
    model.load_state_dict({n.removeprefix("model."): w for n, w in followed.items()})
    saved = tmp_path / "followed"
    model.save_pretrained(saved)
    expected = predict(policy, train, tmp_path, *checkpoint, "--model.reference", saved)
    assert [line["reward"] for line in found] == [line["reward"] for line in expected]
    against_start = predict(whole / "model", train, tmp_path)
    for line, other in zip(found, against_start, strict=True):
        assert line["policy_logps"] == pytest.approx(other["policy_logps"], rel=1e-6)
        assert line["reference_logps"] != pytest.approx(other["reference_logps"], rel=1e-4)
    capsys.readouterr()
    held_out = ("--data.validation", train, *checkpoint, "--trainer.accelerator", "cpu")
    held_out += ("--data.batch_size", 4)
    assert run_cli("validate", "--model.policy", policy, *held_out, *FOLLOW) == 0
    printed = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines())
    last = numbers(whole, "val")[-1]
    names = ("val/loss", "val/z0_raw", "val/reward/margin", "val/logps/desirable")
    sides = ({name: float(side[name]) for name in names} for side in (printed, last))
    assert_same_numbers(*sides, relative=RELATIVE + SIX_DIGITS)


def test_settings_that_do_not_fit_the_checkpoint_are_rejected(
    policy: Path, train: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = small_model(tmp_path / "other", seed=1)
    checkpoint = ("--ckpt_path", whole / "checkpoints" / "step=8.ckpt")
    options = (*FOLLOW, "--model.reference", other)
    fit(policy, train, tmp_path, *TWO_EPOCHS, *checkpoint, *options, status=2)
    assert "other does not hold the weights of" in capsys.readouterr().err
    cached = ("--model.reference_cache", tmp_path / "cache", "--data.validation", train)
    assert run_cli("validate", "--model.policy", policy, *checkpoint, *cached) == 2
    assert "Remove --model.reference_cache." in capsys.readouterr().err
    fit(policy, train, tmp_path, *FOLLOW, "--model.reference", train.parent, status=1)
    narrow = small_model(tmp_path / "narrow", intermediate_size=32)
    fit(policy, train, tmp_path, *FOLLOW, "--model.reference", narrow, status=2)
    assert "narrow has others than the policy" in capsys.readouterr().err
