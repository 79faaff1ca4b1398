"""The documentation says what there is: keys, TRL's fields, links and commands."""

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments
from trl import KTOConfig

from kto_lightning.metrics_file import COLUMNS
from tests.cli import ROOT, run_cli

PAGES = sorted((ROOT / "docs").glob("*.md"))
COMING = (ROOT / "docs/coming_from_trl.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def known_keys() -> set[str]:
    """Every option of `fit`, as `--print_config` with all groups has them."""
    settings = ["--model.policy", "m", "--data.train", "d"]
    settings += ["--model.lora.r", "4", "--model.follow.alpha", "0.6"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run_cli("fit", *settings, "--print_config") == 0
    return set(_flat(yaml.safe_load(printed.getvalue())))


def _flat(group: dict, prefix: str = "") -> Iterator[str]:
    for key, value in group.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda path: path.stem)
def test_keys_exist(page: Path, known_keys: set[str]):
    named = set(re.findall(r"--((?:model|data|trainer|checkpoint)\.[\w.]*\w)", page.read_text()))
    assert named <= known_keys


def test_every_field_of_trl_has_its_row_once():
    table = COMING.split("## Metrics")[0]
    rows = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    named = [row for row in rows if row != "KTOConfig"]
    inherited = {field.name for field in fields(TrainingArguments)}
    own = {field.name for field in fields(KTOConfig)} - inherited
    assert len(named) == len(set(named))
    assert own <= set(named)
    assert set(named) <= own | inherited


def test_our_metrics_exist():
    named = set(re.findall(r"`((?:train|val)/[\w/]+)`", "".join(p.read_text() for p in PAGES)))
    assert named
    assert named <= set(COLUMNS)


def test_pages_are_all_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert {target for entry in nav for target in entry.values()} == {p.name for p in PAGES}
