"""The run report of finished, killed, resumed and damaged runs."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kto_lightning.cli.report import main as report_main
from kto_lightning.errors import KTOError
from kto_lightning.reports.run import read_run, write_run_report
from kto_lightning.reports.run.run_file import RunFile, read_run_file, write_run_file
from kto_lightning.training.metrics_csv import COLUMNS
from tests.support import cli
from tests.support.pages import Reader, read_page


def page_of(output: Path) -> Reader:
    path, _ = write_run_report(output)
    return read_page(path.read_text(encoding="utf-8"))


def made_run(output: Path, num_steps: int, **cells: str) -> Path:
    """An OUTPUT with these many steps of all columns; some cells as given."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for step in range(1, num_steps + 1):
            row = dict.fromkeys(COLUMNS, f"{0.001 * step + 0.1:.6f}")
            writer.writerow(row | {"step": str(step)} | cells)
    return output


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with held-out records."""
    directory = tmp_path_factory.mktemp("run_report")
    policy = cli.small_model(directory / "policy")
    held_out = cli.small_data(directory / "held_out.jsonl", 10, seed=9)
    train = cli.small_data(directory / "train.jsonl")
    options = ["--data.validation", held_out, "--trainer.val_check_interval", 3]
    return cli.fit(policy, train, directory / "output", *options)


def test_fit_writes_the_page(finished: Path) -> None:
    page = read_page((finished / "report.html").read_text(encoding="utf-8"))
    rows = cli.rows(finished)
    for name in ("val/loss", "val/reward/auc", "val/z0_raw", "val/reward/desirable"):
        assert f"{float(rows[-1][name]):.4g}" in page.text
    assert f"{float(rows[-1]['train/loss']):.3f}" in page.text
    for title in (
        *("Margin", "Rewards of both classes", "Loss", "Held-out AUC", "Reference point z0"),
        *("Gradient left", "Gradient norm", "Learning rate", "Speed", "Memory"),
        *("Length of completions", "Label order along the file"),
        *("Records truncated by max_length", "Verdict", "Held-out records", "Data"),
    ):
        assert title in page.text
    assert "model.learning_rate 0.001" in page.text
    assert "6 steps are too few to judge a run by" in page.text
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    losses = [float(row["train/loss"]) for row in rows]
    assert any(f"first {losses[0]:.4g}, last {losses[-1]:.4g}" in label for label in labels)


def test_the_command_prints_the_verdict(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = finished / "elsewhere" / "page.html"
    assert report_main([str(finished), "--html", str(target)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"report    {target}"
    assert all(len(line) <= 80 and line.isascii() for line in lines[:-1])
    assert lines[0].startswith("6 steps are too few")
    assert read_page(target.read_text(encoding="utf-8")).tags.count("svg") >= 10


def test_the_same_run_gives_the_same_page(finished: Path) -> None:
    first = write_run_report(finished, finished / "first.html")[0].read_text(encoding="utf-8")
    second = write_run_report(finished, finished / "second.html")[0].read_text(encoding="utf-8")
    assert first == second


def test_a_resumed_run_is_one_run(tmp_path: Path) -> None:
    policy = cli.small_model(tmp_path / "policy")
    train, output = cli.small_data(tmp_path / "train.jsonl"), tmp_path / "output"
    cli.fit(policy, train, output, "--trainer.max_steps", 2)
    for steps in (3, 5):
        cli.fit(policy, train, output, "--trainer.max_steps", steps, "--ckpt_path", "last")
    run = read_run(output)
    assert run.steps.tolist() == [1, 2, 3, 4, 5]
    assert (run.file.planned_steps, run.file.finished) == (5, True)
    assert "Steps 5 finished" in page_of(output).text


def test_a_killed_run(tmp_path: Path) -> None:
    """Half a row at the end, no model, no data report."""
    output = made_run(tmp_path / "output", 4)
    with (output / "metrics.csv").open("a", encoding="utf-8") as file:
        file.write("5,0.105,0.1")
    write_run_file(output, RunFile(planned_steps=9, summary=[["model", "tiny"]], warnings=["<b>"]))
    assert read_run(output).steps.tolist() == [1, 2, 3, 4]
    text = page_of(output).text
    assert "The run is at step 4 of 9" in text
    assert "model tiny" in text


def test_an_incomplete_last_row_is_omitted(tmp_path: Path) -> None:
    output = made_run(tmp_path / "output", 4)
    content = (output / "metrics.csv").read_text(encoding="utf-8")
    (output / "metrics.csv").write_text(content[:-3], encoding="utf-8")
    assert read_run(output).steps.tolist() == [1, 2, 3]


@pytest.mark.parametrize("num_steps", [0, 1])
def test_runs_of_zero_and_one_step(tmp_path: Path, num_steps: int) -> None:
    page = page_of(made_run(tmp_path / "output", num_steps))
    expected = "1 step is too few" if num_steps else "No optimizer step has been completed"
    assert expected in page.text
    assert (page.tags.count("svg") > 0) is bool(num_steps)


def test_missing_columns_and_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss\n1,0.5\n2,0.4\n", encoding="utf-8")
    (tmp_path / "config.yaml").write_text("model: [", encoding="utf-8")
    (tmp_path / "data_report.json").write_text('{"examples": 3}', encoding="utf-8")
    (tmp_path / "run.json").write_text("[]", encoding="utf-8")
    page = page_of(tmp_path)
    assert "has no z0, z0_raw, grad_norm, lr, reward/margin" in page.text
    assert "data_report.json is from another version" in page.text
    assert page.tags.count("svg") == 1


def test_a_loss_of_nan(tmp_path: Path) -> None:
    output = made_run(tmp_path / "output", 3, **{"train/loss": "nan", "train/z0": ""})
    run = read_run(output)
    assert run.non_finite == {"train/loss": 1}
    assert np.isnan(run.column("train/z0")).all()
    assert "train/loss is not a finite number at step 1" in page_of(output).text


def test_text_from_files_is_escaped(tmp_path: Path) -> None:
    """Names, prompts and answers come from files and may hold anything."""
    evil = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>&amp;$x^2$"
    output = made_run(tmp_path / "<b onclick='x'>&", 3)
    write_run_file(output, RunFile(summary=[[evil, evil]], warnings=[evil]))
    (output / "config.yaml").write_text(json.dumps({"data": {"train": evil}}), encoding="utf-8")
    sample = {"prompt": evil, "completion": evil, "desirable": True, "before": evil, "after": ""}
    (output / "generations.json").write_text(json.dumps({"samples": [sample]}), encoding="utf-8")
    page = page_of(output)
    # Once as summary's name, value and warning, once as a setting, three times in the sample.
    assert page.text.count(evil) == 7
    assert "(nothing)" in page.text


def test_page_size_does_not_grow_with_steps(tmp_path: Path) -> None:
    sizes = []
    for num_steps in (1_000, 4_000):
        path, _ = write_run_report(made_run(tmp_path / f"{num_steps}", num_steps))
        sizes.append(len(path.read_bytes()))
    assert sizes[1] < 1.1 * sizes[0] < 2_000_000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no directory"),
        (lambda path: path.mkdir(), "holds no metrics.csv"),
        (
            lambda path: (path.mkdir(), (path / "metrics.csv").write_text("a,b\n")),
            "no column 'step'",
        ),
    ],
)
def test_a_directory_without_a_run_exits_1(
    tmp_path: Path, make, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "run")
    assert report_main([str(tmp_path / "run")]) == 1
    assert message in capsys.readouterr().err


def test_wrong_usage_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_main([]) == 2
    assert "usage: python -m kto_lightning report" in capsys.readouterr().err


def test_an_unwritable_page_is_an_error(tmp_path: Path) -> None:
    output = made_run(tmp_path / "output", 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(KTOError, match="cannot be written"):
        write_run_report(output, tmp_path / "file" / "page.html")


def test_missing_matplotlib_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(KTOError, match="pip install matplotlib"):
        write_run_report(made_run(tmp_path / "output", 2))
    assert not (tmp_path / "output" / "report.html").exists()


def test_report_imports_no_framework(tmp_path: Path) -> None:
    output = made_run(tmp_path / "output", 2)
    code = (
        "import sys; from kto_lightning.__main__ import main\n"
        f"status = main(['report', {str(output)!r}])\n"
        "heavy = {'torch', 'lightning', 'transformers', 'datasets'} & set(sys.modules)\n"
        "sys.exit(1 if status or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_run_file_round_trip(tmp_path: Path) -> None:
    content = RunFile(planned_steps=7, finished=True, summary=[["a", "b"]], warnings=["w"])
    write_run_file(tmp_path, content)
    assert read_run_file(tmp_path) == content
    assert read_run_file(tmp_path / "nowhere") == RunFile()


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ("1,0.5\n2,abc\n", ":3: the column 'train/loss' must be a number, got 'abc'. Remove"),
        ("1,0.5\nx,0.5\n", ":3: the column 'step' must be a number, got 'x'"),
        ("1.5,0.5\n", ":2: 'step' must be a number of steps, got '1.5'"),
        (f"{'9' * 30},0.5\n", ":2: 'step' must be a number of steps"),
        ("1,0.5,0.6\n", ":2: 3 cells, not 2"),
        ("1\n", ":2: 1 cells, not 2"),
        ("1,\0\n", ":2: "),
        ('1,"0.5\n', ":2: unexpected end of data"),
        (f"1,{'9' * 200_000}\n", ":2: "),
    ],
)
def test_an_odd_cell_is_named_with_its_line(rows: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(f"step,train/loss\n{rows}", encoding="utf-8")
    with pytest.raises(KTOError) as error:
        read_run(tmp_path)
    assert f"{path}{part}" in str(error.value)
    assert len(str(error.value)) < 500


def test_numbers_without_a_value_are_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,a\n1,nan\n2,1e400\n3,\n4,1", encoding="utf-8")
    run = read_run(tmp_path)
    assert run.steps.tolist() == [1, 2, 3]
    assert run.non_finite == {"a": 1}


@pytest.mark.parametrize("name", ["run.json", "config.yaml", "data_report.json"])
def test_a_file_that_is_nested_too_deeply_is_left_out(name: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,a\n1,1\n", encoding="utf-8")
    (tmp_path / name).write_text("[" * 100_000, encoding="utf-8")
    run = read_run(tmp_path)
    assert (run.settings, run.data) == ({}, None)


@pytest.mark.parametrize("name", ["config.yaml", "data_report.json"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(
    name: str, finished: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(finished, tmp_path / "output"))
    (output / name).unlink()
    os.mkfifo(output / name)
    assert report_main([str(output)]) == 0
