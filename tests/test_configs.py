"""configs/: every file says what it is for and needs, parses, and runs with a tiny model."""

from pathlib import Path

import pytest
import torch
import yaml

from tests.support.cli import numbers, run_cli, small_data, small_model

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
HUB = {
    "quick_start",
    "own_jsonl",
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
    return {"model": small_model(folder / "model"), "data": small_data(folder / "data.jsonl", 40)}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_runs_shrunk(path, small, tmp_path, capsys):
    """A tiny model, forty records and two steps on one CPU; all settings but sizes are kept."""
    settings = ["--model.policy", small["model"], "--data.train", small["data"]]
    settings += ["--trainer.max_steps", 2, "--output_dir", tmp_path / "out", *ONE_CPU]
    quantized = "quantization" in yaml.safe_load(path.read_text())["model"]
    if quantized and not torch.cuda.is_available():
        assert run_cli("fit", "--config", path, *settings) == 2
        assert "--model.quantization 4bit needs " in capsys.readouterr().err
        settings += ["--model.quantization", "null"]
    assert run_cli("fit", "--config", path, *settings) == 0
    first, second = numbers(tmp_path / "out")[:2]
    assert 0 < first["train/loss"] < 2
    assert second["train/grad_norm"] > 0
    assert (tmp_path / "out/model/model.safetensors").is_file()
