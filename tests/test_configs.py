"""Every file in configs/ is one that the command line takes."""

from pathlib import Path

import pytest
import yaml

from kto_lightning.cli import main

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_parses_and_says_what_it_is_for(path, capsys):
    lines = path.read_text().splitlines()
    comment = " ".join(line for line in lines if line.startswith("#"))
    assert "Needs:" in comment
    assert f"python -m kto_lightning fit --config configs/{path.name}" in comment
    given = yaml.safe_load(path.read_text())
    missing = [] if "policy" in given["model"] else ["--model.policy", "some/model"]
    assert main(["fit", "--config", str(path), *missing, "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    for group in ("model", "data"):
        for key, value in given[group].items():
            assert printed[group][key] == value or isinstance(value, dict)


def test_there_are_configs():
    assert CONFIGS
