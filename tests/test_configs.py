"""configs/: every file says what it is for and needs, parses, and runs with a tiny model."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support.cli import numbers, run_cli, small_data
from tests.support.factories import make_tokenizer, plain_records, save_model, write_jsonl

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
HUB = {
    "quick_start",
    "own_jsonl",
    "own_ratings",
    "kto_mix_14k",
    "claudesidian",
    "lora_24gb",
    "qlora",
    "fsdp2_8gpu",
    "two_machines_slurm",
}
ONE_CPU = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
ONE_CPU += ["--trainer.devices", 1, "--trainer.num_nodes", 1, "--trainer.strategy", "auto"]


def test_the_expected_configs_are_there():
    assert {path.stem for path in CONFIGS} >= HUB


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_parses_and_says_what_it_is_for(path, capsys):
    lines = path.read_text().splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    comment = " ".join(head)
    assert "Needs:" in comment
    assert f"kto_lightning fit --config configs/{path.name}" in comment
    given = yaml.safe_load(path.read_text())
    missing = [] if "policy" in given["model"] else ["--model.policy", "some/model"]
    assert run_cli("fit", "--config", path, *missing, "--print_config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    for group in ("model", "data"):
        for key, value in given[group].items():
            assert printed[group][key] == value or isinstance(value, dict)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("configs")
    model = save_model(folder / "model", "qwen2", make_tokenizer(chat_template="qwen2_5"))
    return {"model": model, "data": small_data(folder / "data.jsonl", 40)}


def renamed(path: Path, data: dict[str, Any]) -> Path:
    """Forty records in the columns that a config names, with ratings at its thresholds."""
    columns, labels = data["columns"], data["labels"]
    records = []
    for record in plain_records(40):
        record["label"] = labels["at_least" if record["label"] else "at_most"]
        records.append({columns[field]: record[field] for field in columns})
    return write_jsonl(path, records)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_runs_shrunk(path, small, tmp_path, capsys):
    """A tiny model, forty records and two steps on one CPU; all settings but sizes are kept."""
    given = yaml.safe_load(path.read_text())
    named = "columns" in given["data"]
    data = renamed(tmp_path / "data.jsonl", given["data"]) if named else small["data"]
    settings = ["--model.policy", small["model"], "--data.train", data]
    settings += ["--trainer.max_steps", 2, "--output_dir", tmp_path / "out", *ONE_CPU]
    quantized = "quantization" in given["model"]
    if quantized and not torch.cuda.is_available():
        assert run_cli("fit", "--config", path, *settings) == 2
        assert "--model.quantization 4bit needs " in capsys.readouterr().err
        settings += ["--model.quantization", "null"]
    assert run_cli("fit", "--config", path, *settings) == 0
    first, second = numbers(tmp_path / "out")[:2]
    assert 0 < first["train/loss"] < 2
    assert second["train/grad_norm"] > 0
    assert (tmp_path / "out/model/model.safetensors").is_file()


def test_the_kubernetes_manifest_fits_together(capsys: pytest.CaptureFixture[str]):
    path = CONFIGS[0].parent / "kubernetes" / "kubeflow_trainjob.yaml"
    runtime, train_job = yaml.safe_load_all(path.read_text())
    assert {one["apiVersion"] for one in (runtime, train_job)} == {"trainer.kubeflow.org/v1alpha1"}
    assert (runtime["kind"], train_job["kind"]) == ("TrainingRuntime", "TrainJob")
    spec = train_job["spec"]
    assert set(spec) == {"runtimeRef", "trainer"}
    assert spec["runtimeRef"] == {"kind": runtime["kind"], "name": runtime["metadata"]["name"]}
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert job["name"] == "node"  # as its container: the trainer looks for both names
    labels = job["template"]["metadata"]["labels"]
    assert labels == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "node"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    trainer = spec["trainer"]
    assert trainer.keys() <= {
        *("image", "command", "args", "env", "numNodes", "numProcPerNode", "resourcesPerNode")
    }
    assert [*trainer["command"], *trainer["args"][:3]] == ["torchrun", "-m", "kto_lightning", "fit"]
    assert run_cli(*trainer["args"][2:], "--print_config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["num_nodes"] == trainer["numNodes"]
    assert printed["trainer"]["num_nodes"] == runtime["spec"]["mlPolicy"]["numNodes"]
    assert int(printed["trainer"]["devices"]) == trainer["numProcPerNode"]
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == trainer["numProcPerNode"]
    (cache,) = [one["value"] for one in trainer["env"] if one["name"] == "HF_HOME"]
    for shared in (printed["data"]["train"], printed["output_dir"], cache):
        assert shared.startswith(f"{mounts['shared']}/")


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (138, True)])
def test_the_slurm_job_is_queued_again_when_its_time_is_up(
    status: int, requeued: bool, tmp_path: Path
):
    script = CONFIGS[0].parent / "two_machines_slurm.sbatch"
    for name, line in (("srun", f"exit {status}"), ("scontrol", f'echo "$@" > {tmp_path}/asked')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    ended = subprocess.run(["bash", script, "records.jsonl"], env=environment, check=False)
    assert ended.returncode == status
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 7\n" if requeued else "")
