"""Hybrid sharding: two groups of two ranks, a whole model in each, give the numbers of one rank."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from kto_lightning.module import KTOModule
from kto_lightning.strategies.fsdp2 import FSDP2
from kto_lightning.training.checkpoints import list_checkpoints
from tests.support.cli import fit, small_model, weights
from tests.support.comparison import assert_runs_agree, assert_weights_agree
from tests.support.ranks import fit_on_ranks

CLASS = f"{FSDP2.__module__}.{FSDP2.__name__}"
TWO_REPLICAS = ("--trainer.strategy.replicas", 2)
SEVERAL = ("--model.optimizer", "sgd", "--model.learning_rate", 0.1, "--data.max_tokens", 60)
FOUR_STEPS = ("--trainer.max_steps", 4)
CLIPPED = ("--model.gradient_clip_norm", 0.5)


def as_two_machines() -> None:
    """For `prepare` of a job of four ranks: the variables of two machines with two ranks each."""
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = str(rank % 2)
    os.environ["GROUP_RANK"] = str(rank // 2)
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    check_placements()


def check_placements() -> None:
    """For `prepare` of a job: every rank checks that it holds half of the model after a step."""

    def on_train_end(module: KTOModule) -> None:
        assert module.policy is not None
        parts: list[Any] = list(module.policy.parameters())
        assert all(isinstance(part, DTensor) for part in parts)
        assert {part.placements for part in parts} == {(Replicate(), Shard(0))}
        own = sum(part.to_local().numel() for part in parts)
        assert own == pytest.approx(sum(part.numel() for part in parts) / 2, rel=0.1)

    KTOModule.on_train_end = on_train_end  # pyright: ignore[reportAttributeAccessIssue]


def test_a_model_on_each_of_two_machines_gives_the_numbers_of_one_rank(
    policy: Path, train: Path, tmp_path: Path
):
    options = (*SEVERAL, *CLIPPED, *FOUR_STEPS, "--data.validation", 0.4)
    machines = ("--trainer.num_nodes", 2, "--trainer.devices", 2)
    four = fit_on_ranks(
        *(policy, train, tmp_path / "four", *options, *machines),
        strategy="fsdp2_hybrid",
        ranks=4,
        prepare=as_two_machines,
    )
    assert_runs_agree(four, fit(policy, train, tmp_path / "one", *options), held_out=True)


def test_offloaded_shards_of_two_replicas_give_the_numbers_of_one_rank(train: Path, tmp_path: Path):
    policy = small_model(tmp_path / "policy", "lfm2")
    options = (*SEVERAL, *CLIPPED, *FOUR_STEPS, "--model.activation_checkpointing", "true")
    offloaded = (*TWO_REPLICAS, "--trainer.strategy.offload", "true")
    four = fit_on_ranks(
        *(policy, train, tmp_path / "four", *options, *offloaded),
        strategy=CLASS,
        ranks=4,
        prepare=check_placements,
    )
    assert_runs_agree(four, fit(policy, train, tmp_path / "one", *options))


LORA = ("--model.lora.r", 4, "--model.lora.use_dora", "true", "--data.validation", 0.4)
FOLLOWING = ("--model.follow.every_n_steps", 2)


@pytest.mark.slow
@pytest.mark.parametrize("options", [LORA, FOLLOWING, ()], ids=["lora", "follows", "adamw"])
def test_two_replicas_give_the_numbers_of_one_rank(
    options: tuple[Any, ...], policy: Path, train: Path, tmp_path: Path
):
    optimizer = () if options == () else SEVERAL
    options = (*optimizer, *options, *FOUR_STEPS)
    four = fit_on_ranks(
        *(policy, train, tmp_path / "four", *options, *TWO_REPLICAS), strategy=CLASS, ranks=4
    )
    one = fit(policy, train, tmp_path / "one", *options)
    assert_runs_agree(four, one, held_out="--data.validation" in options)


@pytest.mark.slow
def test_a_run_resumes_with_replicas_and_without(policy: Path, train: Path, tmp_path: Path):
    options = ("--checkpoint.every_n_steps", 3, "--model.lr_schedule", "cosine")
    replicated: dict[str, Any] = {"strategy": CLASS, "ranks": 4}
    whole = fit_on_ranks(policy, train, tmp_path / "four", *options, *TWO_REPLICAS, **replicated)
    one = fit(policy, train, tmp_path / "one", *options)
    (_, of_four), _ = list_checkpoints(whole)
    (_, of_one), _ = list_checkpoints(one)

    def resumed(name: str, checkpoint: Path) -> Path:
        given = (*options, *TWO_REPLICAS, "--ckpt_path", checkpoint)
        return fit_on_ranks(policy, train, tmp_path / name, *given, **replicated)

    expected, found = weights(whole), weights(resumed("again", of_four))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert_weights_agree(resumed("from_one", of_one), one)
    back = fit(policy, train, tmp_path / "back", *options, "--ckpt_path", of_four)
    assert_weights_agree(back, one)


@pytest.mark.parametrize("name", ["fsdp2_hybrid", "fsdp2_hybrid_offload"])
def test_one_machine_is_refused_without_replicas(
    name: str, policy: Path, train: Path, tmp_path: Path, capsys
):
    fit(policy, train, tmp_path / "output", "--trainer.strategy", name, status=2)
    assert "Use fsdp2 (or fsdp2_offload)" in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(("replicas", "message"), [(3, "Use a divisor of 4"), (0, "at least 1")])
def test_replicas_that_the_ranks_cannot_be_divided_into_are_refused(
    replicas: int, message: str, policy: Path, train: Path, tmp_path: Path, capsys
):
    options = ("--trainer.strategy", CLASS, "--trainer.strategy.replicas", replicas)
    machines = ("--trainer.num_nodes", 2, "--trainer.devices", 2)
    fit(policy, train, tmp_path / "output", *machines, *options, status=2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "output").exists()
