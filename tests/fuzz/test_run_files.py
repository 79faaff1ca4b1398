"""Files of a run, damaged or written by somebody else, through `report`."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.cli import fit
from tests.support.fuzz import (
    ODD_NUMBERS,
    ODD_TEXT,
    fuzz,
    mutated_bytes,
    mutated_json,
    run_within_bounds,
    to_json,
)


@pytest.fixture(scope="module")
def run(policy: Path, train: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run of six steps with held-out records."""
    output = tmp_path_factory.mktemp("run") / "output"
    return fit(policy, train, output, "--data.validation", 0.25)


@fuzz(8)
@given(data=st.data())
def test_damaged_files_of_a_run_are_reported_or_named(
    run: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    output = _copy(run, tmp_path_factory)
    names = sorted(path.name for path in output.iterdir() if path.is_file())
    file = output / data.draw(st.sampled_from(names))
    file.write_bytes(data.draw(mutated_bytes(file.read_bytes())))
    run_within_bounds("report", output, names=file.name)


@fuzz(5)
@given(data=st.data())
def test_a_run_file_with_other_values_is_reported_or_named(
    run: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    output = _copy(run, tmp_path_factory)
    file = output / "run.json"
    file.write_bytes(to_json(data.draw(mutated_json(json.loads(file.read_text("utf-8"))))))
    run_within_bounds("report", output, names="run.json")


@fuzz(7)
@given(data=st.data())
def test_metrics_with_odd_cells_are_reported_or_named(
    run: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    output = _copy(run, tmp_path_factory)
    file = output / "metrics.csv"
    lines = [line.split(",") for line in file.read_text("utf-8").splitlines()]
    for _ in range(data.draw(st.integers(1, 4))):
        line = data.draw(st.sampled_from(lines))
        cell = data.draw(st.one_of(ODD_TEXT, ODD_NUMBERS.map(str)))
        line[data.draw(st.integers(0, len(line) - 1))] = cell
    file.write_text("".join(",".join(line) + "\n" for line in lines), "utf-8", "replace")
    run_within_bounds("report", output, names="metrics.csv")


def _copy(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("report") / "output"
    shutil.copytree(run, output, ignore=shutil.ignore_patterns("checkpoints", "model"))
    return output
