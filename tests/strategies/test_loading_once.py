"""Loading under FSDP2: rank 0 reads the weights, and every rank gets its shards of them."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import dynamic_module_utils

from kto_lightning.models import build, loading, sharding
from kto_lightning.models.loading import load_model
from kto_lightning.module import KTOModule
from kto_lightning.training import resuming
from tests.support.cli import fit_arguments, small_model
from tests.support.ranks import RankResult, run_ranks

CODE = {
    "configuration": """
from transformers import Qwen2Config
class Config(Qwen2Config):
    model_type = "made_up"
""",
    "modeling": """
from transformers import Qwen2ForCausalLM
from .configuration import Config
class Model(Qwen2ForCausalLM):
    config_class = Config
""",
}


def is_rank(rank: int) -> bool:
    return os.environ["RANK"] == str(rank)


def fail(*arguments: Any, **options: Any) -> Any:
    raise RuntimeError("made to fail")


def read_on_first_rank_only() -> None:
    """For `prepare` of a job: on other ranks, what reads weights fails."""
    if not is_rank(0):
        loading.load_causal_lm = build.reference_fingerprint = resuming.model_identity = fail


def compare_with_files() -> None:
    """For `prepare` of a job: rank 0 prints which weights of both models are not their files'."""
    read_on_first_rank_only()
    begin = KTOModule.on_train_start

    def on_train_start(module: KTOModule) -> None:
        begin(module)
        reference = getattr(module.reference, "reference", module.reference)  # in a cached one
        for role, policy in (("policy", module.policy), ("reference", reference)):
            policy: Any = getattr(policy, "policy", policy)
            if hasattr(policy, "causal_lm"):
                found = whole_weights(policy.causal_lm)
                if is_rank(0):
                    name = getattr(module.model_settings, role) or module.model_settings.policy
                    print(f"{role} differs in {different(found, name)}", flush=True)

    KTOModule.on_train_start = on_train_start  # pyright: ignore[reportAttributeAccessIssue]


def whole_weights(model: Any) -> dict[str, torch.Tensor]:
    """The weights of a sharded model by name, a tied one once, without those of adapters."""
    found: dict[str, torch.Tensor] = {}
    for name, value in model.named_parameters():
        assert isinstance(value, DTensor)
        if "lora_" not in name:
            found[name.replace("base_layer.", "")] = value.full_tensor()
    return found


def different(found: dict[str, torch.Tensor], name: str) -> list[str]:
    expected = dict(load_model(name).model.named_parameters())
    same = {k for k in expected if k in found and torch.equal(found[k], expected[k].to(found[k]))}
    return sorted((found.keys() | expected.keys()) - same)


def run(policy: Path, train: Path, output: Path, *options: Any, **job: Any) -> list[RankResult]:
    devices = ("--trainer.devices", 2, "--trainer.max_steps", 1)
    return run_ranks("fit", *fit_arguments(policy, train, output, *devices, *options), **job)


def test_every_rank_has_the_weights_that_the_first_has_read(train: Path, tmp_path: Path) -> None:
    """Tied weights, experts that are one by one in the file, fewer rows than ranks; a cache."""
    policy = small_model(tmp_path / "policy", "qwen2_moe", tie_word_embeddings=True)
    options = ("--trainer.strategy", "fsdp2_offload", "--model.reference_cache", tmp_path / "cache")
    first, second = run(policy, train, tmp_path / "out", *options, prepare=compare_with_files)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert "policy differs in []" in first.out
    assert "reference differs in []" in first.out


def test_a_base_and_another_reference_are_read_once(train: Path, tmp_path: Path) -> None:
    policy = small_model(tmp_path / "policy", "mamba")
    reference = small_model(tmp_path / "reference", "mamba", seed=1)
    options = ("--trainer.strategy", "fsdp2", "--model.reference", reference)
    options += ("--model.lora.r", 2, "--model.dtype", "bfloat16")
    first, second = run(policy, train, tmp_path / "out", *options, prepare=compare_with_files)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert "policy differs in []" in first.out
    assert "reference differs in []" in first.out


def keep_code_apart() -> None:
    """For `prepare` of a job: each rank keeps the code of models where no other looks for it, as on
    several machines."""
    directory = tempfile.mkdtemp(dir=os.environ["APART"])
    dynamic_module_utils.HF_MODULES_CACHE = directory  # pyright: ignore[reportPrivateImportUsage]


def test_code_that_comes_with_a_model_runs_on_every_rank(train: Path, tmp_path: Path) -> None:
    policy = small_model(tmp_path / "policy")
    for name, code in CODE.items():
        (policy / f"{name}.py").write_text(code)
    classes = {"AutoConfig": "configuration.Config", "AutoModelForCausalLM": "modeling.Model"}
    config = json.loads((policy / "config.json").read_text())
    config |= {"auto_map": classes, "model_type": "made_up"}
    (policy / "config.json").write_text(json.dumps(config))
    options = ("--trainer.strategy", "fsdp2", "--model.trust_remote_code", "true")
    apart = {"environment": {"APART": str(tmp_path)}, "prepare": keep_code_apart}
    ended = run(policy, train, tmp_path / "out", *options, **apart)
    assert [rank.status for rank in ended] == [0, 0], ended[0].err + ended[1].err


def fail_to_probe() -> None:
    """For `prepare` of a job."""
    if is_rank(0):
        build.make_policy = fail


def fail_to_restore() -> None:
    """For `prepare` of a job."""
    if is_rank(1):
        sharding.load_skeleton = fail


@pytest.mark.parametrize(
    ("options", "prepare", "status", "says"),
    [
        ((), None, 1, "model.safetensors: its weights are damaged"),
        (("--model.route", "cached"), None, 2, "error: --model.route cached: MambaForCausalLM"),
        ((), fail_to_probe, 1, "RuntimeError: made to fail"),
        ((), fail_to_restore, 1, "RuntimeError: made to fail"),
    ],
    ids=["damaged weights", "a setting", "no error of ours", "on another rank"],
)
def test_an_error_ends_all_ranks_with_one_message(
    options: Any, prepare: Any, status: int, says: str, train: Path, tmp_path: Path
) -> None:
    policy = small_model(tmp_path / "policy", "mamba")
    if "damaged" in says:
        with (policy / "model.safetensors").open("r+b") as file:
            file.truncate(1000)
    options = ("--trainer.strategy", "fsdp2", *options)
    ended = run(policy, train, tmp_path / "out", *options, prepare=prepare)
    assert [rank.status for rank in ended] == [status, status]
    failing = 1 if prepare is fail_to_restore else 0
    assert says in ended[failing].err
    assert "rror" not in ended[1 - failing].err
