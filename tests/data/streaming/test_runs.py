"""`--data.streaming true`: whole runs, compared with runs on a data set and with resumed ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from kto_lightning.models.reference import FrozenReference
from tests.support.cli import (
    EVERY_STEP,
    TWO_EPOCHS,
    fit,
    rows,
    run_cli,
    small_data,
    small_model,
)
from tests.support.comparison import assert_runs_equal
from tests.support.factories import chat_records, plain_records, write_jsonl
from tests.support.faults import fit_until

WEIGHTS = ("--model.desirable_weight", 1.0, "--model.undesirable_weight", 1.5)
STREAM = ("--data.streaming", "true", *WEIGHTS)
SMALL_BUFFERS = (*STREAM, "--data.buffer_size", 8)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("policy"), "gpt2", attn_pdrop=0.2)


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 records: in buffers of 8 the last one holds 9, and an epoch's last batch one."""
    return small_data(tmp_path_factory.mktemp("data") / "train.jsonl", 25)


@pytest.mark.parametrize(
    "options",
    [
        ("--data.shuffle", "false"),
        ("--data.shuffle", "true", *TWO_EPOCHS),
        ("--data.pairing", "rotate"),
        ("--model.loss", "apo_zero_unpaired"),
        ("--data.num_workers", 2, *TWO_EPOCHS),
    ],
    ids=str,
)
def test_a_stream_in_one_buffer_is_the_data_set(
    options: tuple[Any, ...], policy: Path, train: Path, tmp_path: Path
):
    kept = fit(policy, train, tmp_path / "kept", *WEIGHTS, *options)
    streamed = fit(policy, train, tmp_path / "streamed", *STREAM, *options)
    assert_runs_equal(streamed, kept)
    assert len(rows(streamed)) in (7, 14)


def test_rotated_blocks_do_not_depend_on_the_buffers(policy: Path, train: Path, tmp_path: Path):
    """A buffer holds whole batches, so its blocks are those of the file."""
    options = ("--data.pairing", "rotate", "--data.shuffle", "false")
    kept = fit(policy, train, tmp_path / "kept", *WEIGHTS, *options)
    streamed = fit(policy, train, tmp_path / "streamed", *SMALL_BUFFERS, *options)
    assert_runs_equal(streamed, kept)


SETTINGS: dict[str, tuple[Any, ...]] = {
    "shuffled": ("--model.dropout", "true"),
    "file order, workers": ("--data.shuffle", "false", "--data.num_workers", 2),
    "max_steps": ("--trainer.max_steps", 14, "--model.lr_schedule", "cosine"),
    "shortened epochs": ("--trainer.limit_train_batches", 5),
    "validation": ("--trainer.val_check_interval", 3),
}


@pytest.fixture(scope="module")
def whole_runs(policy: Path, train: Path, tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Path] = {}

    def run(name: str, options: tuple[Any, ...]) -> Path:
        if name not in made:
            made[name] = fit(policy, train, tmp_path_factory.mktemp("whole"), *options)
        return made[name]

    return run


@pytest.mark.parametrize(
    ("name", "step"),  # an epoch has seven steps, the first two buffers two each
    [
        pytest.param("shuffled", 1, marks=pytest.mark.slow),
        ("shuffled", 2),
        ("shuffled", 6),
        ("shuffled", 7),
        pytest.param("shuffled", 10, marks=pytest.mark.slow),
        pytest.param("file order, workers", 3, marks=pytest.mark.slow),
        ("file order, workers", 7),
        ("max_steps", 9),
        ("shortened epochs", 5),
        pytest.param("shortened epochs", 8, marks=pytest.mark.slow),
        pytest.param("validation", 3, marks=pytest.mark.slow),
        ("validation", 7),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(
    name: str, step: int, policy: Path, train: Path, whole_runs, tmp_path: Path
):
    options = (*SMALL_BUFFERS, *TWO_EPOCHS, *SETTINGS[name])
    if name == "validation":
        held_out = small_data(tmp_path / "held_out.jsonl", 6, seed=1)
        options = (*options, "--data.validation", held_out)
    whole = whole_runs(name, options)
    fit_until(step, policy, train, tmp_path, *options, *EVERY_STEP)
    fit(policy, train, tmp_path, *options, *EVERY_STEP, "--ckpt_path", "last")
    assert_runs_equal(tmp_path, whole)


def test_resuming_on_other_records_is_an_error(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = (*SMALL_BUFFERS, *EVERY_STEP)
    fit_until(3, policy, train, tmp_path, *options)
    lines = train.read_text(encoding="utf-8").splitlines(keepends=True)
    other = tmp_path / "other.jsonl"
    other.write_text("".join([lines[1], lines[0], *lines[2:]]), encoding="utf-8")
    short = tmp_path / "short.jsonl"
    short.write_text("".join(lines[:5]), encoding="utf-8")
    for arguments, part in (
        ((other, tmp_path, *options), "are not those that were read then"),
        ((short, tmp_path, *options), "are not those that were read then"),
        ((train, tmp_path, *STREAM, "--data.buffer_size", 16), "buffer_size was 8"),
        ((train, tmp_path, *options, "--data.pairing_seed", 1), "--data.pairing_seed is 1 (was 0)"),
    ):
        fit(policy, *arguments, "--ckpt_path", "last", status=2)
        assert part in capsys.readouterr().err


def test_bad_records_are_skipped_with_a_warning(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lines = train.read_text(encoding="utf-8").splitlines(keepends=True)
    spoilt = tmp_path / "spoilt.jsonl"
    bad = ["{not json\n", '{"prompt": "a", "completion": "b", "label": null}\n', "\ufeff7\n"]
    bad += ['{"prompt": "a", "completion": "b"}\n'] * 4
    spoilt.write_text("".join([*lines[:9], *bad, *lines[9:]]), encoding="utf-8")
    clean = fit(policy, train, tmp_path / "clean", *SMALL_BUFFERS)
    capsys.readouterr()
    left = fit(policy, spoilt, tmp_path / "left", *SMALL_BUFFERS)
    assert rows(left) == rows(clean)
    said = capsys.readouterr()
    warnings = [line for line in said.err.splitlines() if "skipped: " in line]
    assert len(warnings) == 5
    assert f"{spoilt}:10: invalid JSON" in warnings[0]
    assert f"{spoilt}:11: 'label' must be true or false, got null" in warnings[1]
    assert warnings[-1].endswith("Further ones are only counted.")
    assert "bad records skipped: 7" in said.out
    report = json.loads((left / "data_report.json").read_text())
    assert report["streamed"] is True
    assert (report["records"], report["bad"]) == (25, 7)
    assert report["sources"] == [str(spoilt)]


def test_records_that_no_template_renders_are_skipped_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    template = "{% for m in messages %}{{ raise_exception('no') if 'x' in m.content else ''}}"
    template += "{{ m.content }}{% endfor %}"
    policy = small_model(tmp_path / "policy")
    (tmp_path / "template.jinja").write_text(template)
    records = chat_records(9)
    records[4]["prompt"][0]["content"] = "x"
    for record in (*records[:4], *records[5:]):
        for message in (*record["prompt"], *record["completion"]):
            message["content"] = message["content"].replace("x", "")
    data = write_jsonl(tmp_path / "chat.jsonl", records)
    fit(policy, data, tmp_path, *STREAM, "--data.chat_template", tmp_path / "template.jinja")
    said = capsys.readouterr()
    assert f"{data}:5: it cannot be turned into tokens" in said.err
    assert "bad records skipped: 1" in said.out


def test_a_stream_of_bad_records_is_an_error(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = tmp_path / "train.jsonl"
    good = "".join(json.dumps(record) + "\n" for record in plain_records(9))
    data.write_text(good + '{"prompt": "a", "completion": "b"}\n' * 200)
    fit(policy, data, tmp_path, *SMALL_BUFFERS, status=1)
    assert "100 bad records and 9 usable ones so far" in capsys.readouterr().err
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 9)
    fit(policy, data, tmp_path, *SMALL_BUFFERS, status=1)
    assert "None of the 9 records in the stream can be trained on" in capsys.readouterr().err


def test_a_buffer_with_one_prompt_is_named(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    records = plain_records(24)
    records[8:16] = [record | {"prompt": "same"} for record in records[8:16]]
    data = write_jsonl(tmp_path / "train.jsonl", records)
    fit(policy, data, tmp_path, *SMALL_BUFFERS, status=1)
    error = capsys.readouterr().err
    assert f"{data}:9 to {data}:16: KTO compares" in error
    assert "raise --data.buffer_size" in error


REFUSED = {
    "weights": (("--data.streaming", "true"), "--model.desirable_weight and --model.undesirable"),
    "fraction": ((*STREAM, "--data.validation", 0.1), "Give a file of held-out records"),
    "cosine": ((*STREAM, "--model.lr_schedule", "cosine"), "Give --trainer.max_steps"),
    "warmup": ((*STREAM, "--model.warmup_ratio", 0.1), "Give --trainer.max_steps"),
    "share": ((*STREAM, "--trainer.limit_train_batches", 0.5), "Give a number of steps"),
    "interval": ((*STREAM, "--trainer.val_check_interval", 0.5), "Give a number of steps"),
    "answers": ((*STREAM, "--report.generate", 2), "Give --data.validation FILE"),
    "buffer": ((*STREAM, "--data.buffer_size", 1), "--data.buffer_size must be at least 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_a_stream_cannot_support_are_errors(
    name: str, policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options, part = REFUSED[name]
    fit(policy, train, tmp_path, *options, status=2)
    assert part in capsys.readouterr().err


def test_the_reference_cache_serves_a_stream(
    policy: Path, train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cached = (*SMALL_BUFFERS, "--model.reference_cache", tmp_path / "cache")
    plain = fit(policy, train, tmp_path / "plain", *SMALL_BUFFERS)
    first = fit(policy, train, tmp_path / "first", *cached)
    assert rows(first) == rows(plain)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("all log-probs are in the cache")

    monkeypatch.setattr(FrozenReference, "logps", fail)
    assert rows(fit(policy, train, tmp_path / "again", *cached)) == rows(plain)


def test_a_streamed_run_is_validated_and_exported(policy: Path, train: Path, tmp_path: Path):
    held_out = small_data(tmp_path / "held_out.jsonl", 6, seed=1)
    output = fit(policy, train, tmp_path, *SMALL_BUFFERS, "--data.validation", held_out)
    assert rows(output)[-1]["val/loss"]
    card = (output / "model" / "README.md").read_text(encoding="utf-8")
    assert "| held out |" in card
    checkpoint = output / "checkpoints" / "step=7.ckpt"
    assert run_cli("export", checkpoint, tmp_path / "exported") == 0
