"""Rows of the summary on sharding, offloading and memory."""

import json
from pathlib import Path
from typing import Any

import pytest

from kto_lightning.callbacks.memory import _sharding, describe
from kto_lightning.models.memory_plan import MemoryParts, MemoryPlan, RunShape
from tests.support.cli import fit
from tests.support.ranks import fit_on_ranks

GIB = 2**30
ON_DEVICE = MemoryParts(weights=3 * GIB, optimizer=6 * GIB, logits=GIB // 10)


def summary(output: Path) -> dict[str, str]:
    """The rows of a run's summary, by their names."""
    return dict(json.loads((output / "run.json").read_text())["summary"])


def test_one_process_is_told_its_memory(policy: Path, train: Path, tmp_path: Path):
    options = ("--trainer.max_steps", 1, "--model.activation_checkpointing", "true")
    rows = summary(fit(policy, train, tmp_path, *options))
    assert rows["activations"] == "computed again in backward"
    assert rows["memory"].startswith("about ")
    assert "MiB a process (from shapes): " in rows["memory"]
    assert not rows.keys() & {"sharding", "offload"}


def test_a_sharded_and_offloaded_run_says_so(policy: Path, train: Path, tmp_path: Path):
    options: tuple[Any, ...] = ("--trainer.max_steps", 1)
    fit_on_ranks(policy, train, tmp_path, *options, strategy="fsdp2_offload")
    rows = summary(tmp_path)
    assert rows["sharding"] == "policy and reference over 2 processes"
    assert rows["offload"] == "shards and the optimizer step, in host memory"
    assert " a process (from shapes): " in rows["memory"]


@pytest.mark.parametrize(
    ("replicas", "num_nodes", "text"),
    [
        (1, 1, "policy over 16 devices"),
        (2, 2, "policy within 8 devices, replicated on 2 machines"),
        (4, 2, "policy within 4 devices, replicated in 4 groups"),
    ],
)
def test_sharding_is_told_in_words(replicas: int, num_nodes: int, text: str):
    run = RunShape(num_ranks=16, num_replicas=replicas, is_sharded=True)
    assert _sharding("policy", run, num_nodes, "devices") == text


def test_small_parts_are_summed():
    plan = MemoryPlan(device=ON_DEVICE, host=MemoryParts())
    text = "about 9.1 GiB a device (from shapes): weights 3.0, optimizer 6.0, others 0.1"
    assert describe(plan, on_gpu=True) == text
    host = MemoryPlan(device=ON_DEVICE, host=MemoryParts(reference=GIB))
    assert describe(host, on_gpu=True) == (
        f"{text}; about 1.0 GiB of host memory a process (from shapes): reference 1.0"
    )
    assert describe(host, on_gpu=False).startswith("about 10.1 GiB a process (from shapes): ")
