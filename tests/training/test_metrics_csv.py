"""`metrics.csv` and Lightning's loggers beside it: the same numbers at the same steps."""

import csv
import importlib.util
import logging
import math
from pathlib import Path

import pytest

from kto_lightning.errors import KTOError
from kto_lightning.training.metrics_csv import COLUMNS, DETAIL_METRICS, MetricsFile
from tests.support.cli import fit, numbers, rows
from tests.support.steps import LENGTHS, Examples, fit_steps, make_module, step_batch


@pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")
def test_columns_of_the_file_keep_their_order(tmp_path: Path) -> None:
    few = step_batch(Examples(LENGTHS[:2], [True, False]))
    file = MetricsFile(tmp_path)
    file.begin(after_step=0)
    fit_steps(make_module(), few, logger=file)
    with (tmp_path / "metrics.csv").open(newline="") as opened:
        (row,) = csv.DictReader(opened)
    names = list(row)
    assert names == list(COLUMNS)
    train = [f"train/{name}" for name in DETAIL_METRICS]
    measured = ["train/tokens_per_second", "train/peak_memory_mib"]
    assert names[-12:] == [*train, *measured, *(f"val/{name}" for name in DETAIL_METRICS)]
    assert row["train/reward/desirable_std"] == ""  # of one
    assert float(row["train/z0_se"]) > 0
    assert float(row["train/tokens_per_second"]) > 0
    assert 50 < float(row["train/peak_memory_mib"]) < 10**6


def test_tensorboard_gets_every_metric_with_its_step(
    policy: Path, train: Path, tmp_path: Path
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = ("--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", tmp_path / "tb")
    held_out = ("--data.validation", train)
    output = fit(policy, train, tmp_path / "run", *logger, *held_out)
    (events,) = (tmp_path / "tb").rglob("events.out.tfevents.*")
    log = accumulator.EventAccumulator(str(events.parent))
    log.Reload()
    found = {name: [(e.step, e.value) for e in log.Scalars(name)] for name in log.Tags()["scalars"]}
    table = rows(output)
    for name in table[0]:
        cells = [(int(row["step"]), float(row[name])) for row in table if row[name]]
        if name != "step" and cells:
            assert [step for step, _ in found[name]] == [step for step, _ in cells], name
            assert [v for _, v in found[name]] == pytest.approx([v for _, v in cells], rel=1e-6)
    assert len(found["train/tokens_per_second"]) == len(table)
    assert [step for step, _ in found["val/reward/auc"]] == [len(table)]


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX")),
    reason="TensorBoard is installed",
)
def test_a_missing_tensorboard_is_reported_before_data_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = tmp_path / "absent"
    logger = ("--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", tmp_path / "tb")
    fit(absent, absent, tmp_path / "run", *logger, status=2)
    error = capsys.readouterr().err
    assert error.startswith("error: --trainer.logger or --trainer.callbacks: ")
    assert "`pip install -U 'tensorboard" in error


def test_a_logger_without_its_directory_is_refused(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = ("--trainer.logger", "TensorBoardLogger")
    fit(policy, train, tmp_path / "run", *logger, status=2)
    error = capsys.readouterr().err
    assert error.startswith("error: --trainer.logger needs save_dir. Its settings are save_dir, ")


def test_a_custom_logger_gets_the_numbers_of_the_file(
    policy: Path, train: Path, tmp_path: Path
) -> None:
    """Metrics of an absent class are not sent."""
    log = tmp_path / "lines.txt"
    logger = ("--trainer.logger", "tests.support.loggers.LineLogger", "--trainer.logger.path", log)
    output = fit(policy, train, tmp_path / "run", *logger)
    lines = [line.split() for line in log.read_text().splitlines()]
    sent = {(int(step), name): float(value) for step, name, value in lines}
    for step, row in enumerate(numbers(output), 1):
        for name, value in row.items():
            assert sent.get((step, name)) == (None if math.isnan(value) else value)
    assert (1, "train/tokens_per_second") in sent


def test_log_every_n_steps_applies_to_loggers_but_not_to_the_file(
    policy: Path, train: Path, tmp_path: Path
) -> None:
    log = tmp_path / "lines.txt"
    logger = ("--trainer.logger", "tests.support.loggers.LineLogger", "--trainer.logger.path", log)
    options = ("--trainer.log_every_n_steps", 4, "--data.validation", train)
    output = fit(policy, train, tmp_path / "run", *logger, *options)
    assert len(rows(output)) == 6
    lines = [line.split() for line in log.read_text().splitlines()]
    assert {int(step) for step, name, _ in lines if name.startswith("train/")} == {4}
    assert {int(step) for step, name, _ in lines if name.startswith("val/")} == {6}


@pytest.mark.parametrize("name", ["LearningRateMonitor", "DeviceStatsMonitor"])
def test_the_file_has_no_rows_of_other_callbacks(
    policy: Path, train: Path, tmp_path: Path, name: str
) -> None:
    callback = ("--trainer.callbacks+", f"lightning.pytorch.callbacks.{name}")
    table = rows(fit(policy, train, tmp_path / "run", *callback))
    assert [row["step"] for row in table] == ["1", "2", "3", "4", "5", "6"]
    assert all(row["train/loss"] for row in table)


def test_one_callback_needs_no_list(policy: Path, train: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    kind = "lightning.pytorch.callbacks.LearningRateMonitor"
    settings.write_text(f"trainer:\n  callbacks:\n    class_path: {kind}\n", encoding="utf-8")
    assert len(rows(fit(policy, train, tmp_path / "run", "--config", settings))) == 6


def test_a_profile_is_printed(policy: Path, train: Path, tmp_path: Path) -> None:
    shown: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())
    log = logging.getLogger("lightning.pytorch.profilers")
    log.addHandler(handler)
    try:
        fit(policy, train, tmp_path / "run", "--trainer.profiler", "simple")
    finally:
        log.removeHandler(handler)
    assert "run_training_batch" in "".join(shown)


def test_a_file_that_cannot_be_replaced_leaves_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").mkdir()
    with pytest.raises(KTOError, match=r"metrics\.csv cannot be written"):
        MetricsFile(str(tmp_path)).begin(after_step=0)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
