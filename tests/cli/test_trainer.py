"""`fit` through the command line: its output, its metrics and the effects of its options."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kto_lightning.data.datamodule import KTODataModule
from kto_lightning.training.metrics_csv import COLUMNS
from tests.support.cli import ROOT, fit, numbers, rows, run_cli, small_data, small_model, weights
from tests.support.comparison import assert_runs_agree
from tests.support.factories import (
    chat_records,
    make_tokenizer,
    plain_records,
    save_model,
    write_jsonl,
)
from tests.support.tolerances import EPS, RELATIVE

# A gradient that is 0 but for rounding, such as a key bias's, would be a full step of AdamW.
SGD = ("--model.optimizer", "sgd")
FIRST_COLUMNS = [
    "step",
    *(f"train/{name}" for name in ("loss", "z0", "z0_raw")),
    *(f"train/reward/{name}" for name in ("desirable", "undesirable", "margin")),
    *(f"train/logps/{name}" for name in ("desirable", "undesirable")),
    *(f"train/{name}" for name in ("grad_norm", "lr", "tokens")),
]


@pytest.fixture(scope="module")
def reference_run(policy: Path, train: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch with the default settings: six steps."""
    return fit(policy, train, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def sgd_run(policy: Path, train: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with SGD, for comparison with runs that differ from it in rounding."""
    return fit(policy, train, tmp_path_factory.mktemp("sgd_run"), *SGD)


def test_records_are_read_before_setup(
    policy: Path, train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In `prepare_data`, which runs once per machine."""
    setup, found = KTODataModule.setup, []

    def note_and_set_up(data: KTODataModule, stage: str) -> None:
        found.append((str(stage.value), data.prepared.train_set is not None))
        setup(data, stage)

    monkeypatch.setattr(KTODataModule, "setup", note_and_set_up)
    fit(policy, train, tmp_path / "run", "--trainer.max_steps", 1)
    assert found == [("fit", True)]


def test_output_holds_the_documented_files_only(reference_run: Path):
    names = {path.name for path in reference_run.iterdir()}
    files = {"config.yaml", "metrics.csv", "data_report.json", "run.json", "report.html"}
    assert names == files | {"checkpoints", "model"}
    assert json.loads((reference_run / "data_report.json").read_text())
    assert [path.name for path in (reference_run / "checkpoints").iterdir()] == ["step=6.ckpt"]


def test_the_last_two_checkpoints_are_kept(policy: Path, train: Path, tmp_path: Path):
    output = fit(policy, train, tmp_path, "--checkpoint.every_n_steps", 1)
    found = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert found == ["step=5.ckpt", "step=6.ckpt"]


def test_checkpoints_are_saved_at_the_interval_and_at_the_end(
    policy: Path, train: Path, tmp_path: Path
):
    output = fit(policy, train, tmp_path, "--checkpoint.every_n_steps", 4)
    found = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert found == ["step=4.ckpt", "step=6.ckpt"]


def test_transformers_opens_the_model_and_generates(reference_run: Path, policy: Path):
    model = AutoModelForCausalLM.from_pretrained(reference_run / "model")
    tokenizer = AutoTokenizer.from_pretrained(reference_run / "model")
    prompt = tokenizer("Question: the river\n", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert answer.shape[1] == prompt["input_ids"].shape[1] + 5
    before = AutoModelForCausalLM.from_pretrained(policy).state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_exported_config_is_the_policys(reference_run: Path, policy: Path):
    exported = json.loads((reference_run / "model" / "config.json").read_text())
    given = json.loads((policy / "config.json").read_text())
    assert exported == given
    assert "packed" not in json.dumps(exported)


def test_metrics_have_the_documented_columns_and_a_row_per_step(reference_run: Path):
    with (reference_run / "metrics.csv").open(newline="") as file:
        header = next(csv.reader(file))
    assert header[: len(FIRST_COLUMNS)] == FIRST_COLUMNS
    assert header == list(COLUMNS)
    assert "val/reward/auc" in header
    assert [row["step"] for row in rows(reference_run)] == [str(step) for step in range(1, 7)]


def test_metrics_are_written_at_full_precision(reference_run: Path):
    cells = [cell for row in rows(reference_run) for cell in row.values() if cell]
    floats = [cell for cell in cells if "." in cell or "e" in cell]
    assert all(repr(float(cell)) == cell for cell in floats)
    assert max(len(cell) for cell in floats) > 15
    assert all(row["train/tokens"].isdigit() for row in rows(reference_run))


def test_the_first_step_matches_the_formulas(reference_run: Path, policy: Path):
    first = numbers(reference_run)[0]
    labels = [record["label"] for record in plain_records(24)]
    num_desirable = sum(labels)
    undesirable_weight = round(num_desirable / (len(labels) - num_desirable), 2)
    assert first["train/z0"] == first["train/z0_raw"] == first["train/reward/margin"] == 0.0
    possible = {(n + undesirable_weight * (4 - n)) / 8 for n in range(5)}
    assert any(first["train/loss"] == pytest.approx(value, rel=1e-6) for value in possible)
    assert first["train/lr"] == 1e-3
    total = sum(row["train/tokens"] for row in numbers(reference_run))
    tokenizer = AutoTokenizer.from_pretrained(policy)
    records = plain_records(24)
    texts = [record["prompt"] + record["completion"] + "<|endoftext|>" for record in records]
    assert total == sum(len(tokenizer(text)["input_ids"]) for text in texts)


def test_an_absent_class_leaves_empty_cells(policy: Path, tmp_path: Path):
    records = [record | {"label": True} for record in plain_records(4)]
    output = fit(policy, write_jsonl(tmp_path / "good.jsonl", records), tmp_path / "run")
    (row,) = rows(output)
    absent = ("train/reward/undesirable", "train/reward/margin", "train/logps/undesirable")
    assert [row[name] for name in absent] == ["", "", ""]
    assert row["train/reward/desirable"]


def test_the_margin_is_the_difference_of_the_classes(reference_run: Path):
    for row in numbers(reference_run):
        difference = row["train/reward/desirable"] - row["train/reward/undesirable"]
        assert row["train/reward/margin"] == pytest.approx(difference, nan_ok=True)
    assert sum(not math.isnan(row["train/reward/margin"]) for row in numbers(reference_run)) > 2


def test_the_same_seed_gives_the_same_bits(
    policy: Path, train: Path, reference_run: Path, tmp_path: Path
):
    again = fit(policy, train, tmp_path)
    assert rows(again) == rows(reference_run)
    expected = weights(reference_run)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(again).items())


def test_another_seed_gives_another_order_of_the_same_examples(
    policy: Path, train: Path, reference_run: Path, tmp_path: Path
):
    other = numbers(fit(policy, train, tmp_path, "--seed_everything", 1))
    tokens = [row["train/tokens"] for row in other]
    expected = [row["train/tokens"] for row in numbers(reference_run)]
    assert tokens != expected
    assert sum(tokens) == sum(expected)


def test_every_epoch_has_its_own_order(
    policy: Path, train: Path, reference_run: Path, tmp_path: Path
):
    output = fit(policy, train, tmp_path, "--trainer.max_epochs", 3)
    tokens = [row["train/tokens"] for row in numbers(output)]
    epochs = [tokens[:6], tokens[6:12], tokens[12:]]
    assert len(tokens) == 18
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({sum(epoch) for epoch in epochs}) == 1
    assert rows(output)[:6] == rows(reference_run)


def test_without_shuffling_every_epoch_has_the_same_order(
    policy: Path, train: Path, tmp_path: Path
):
    output = fit(policy, train, tmp_path, "--trainer.max_epochs", 2, "--data.shuffle", "false")
    tokens = [row["train/tokens"] for row in numbers(output)]
    assert tokens[:6] == tokens[6:]


def test_max_steps_alone_exceeds_an_epoch_and_the_smaller_limit_holds(
    policy: Path, train: Path, tmp_path: Path
):
    beyond = fit(policy, train, tmp_path / "steps", "--trainer.max_steps", 8)
    assert len(rows(beyond)) == 8
    both = ("--trainer.max_steps", 8, "--trainer.max_epochs", 1)
    assert len(rows(fit(policy, train, tmp_path / "both", *both))) == 6


@pytest.mark.parametrize("max_tokens", [1, 150])
def test_max_tokens_changes_memory_only(
    policy: Path, train: Path, sgd_run: Path, tmp_path: Path, max_tokens: int
):
    assert_runs_agree(fit(policy, train, tmp_path, *SGD, "--data.max_tokens", max_tokens), sgd_run)


def test_activation_checkpointing_changes_memory_only(
    policy: Path, train: Path, sgd_run: Path, tmp_path: Path
):
    output = fit(policy, train, tmp_path, *SGD, "--model.activation_checkpointing", "true")
    assert_runs_agree(output, sgd_run)


def test_loader_workers_change_nothing(
    policy: Path, train: Path, reference_run: Path, tmp_path: Path
):
    output = fit(policy, train, tmp_path, "--data.num_workers", 1)
    assert rows(output) == rows(reference_run)


def test_apo_zero_has_no_reference_point(policy: Path, train: Path, tmp_path: Path):
    output = fit(policy, train, tmp_path, "--model.loss", "apo_zero_unpaired")
    assert {row["train/z0"] for row in rows(output)} == {"0.0"}
    assert {row["train/z0_raw"] for row in rows(output)} == {"0.0"}


def test_rotate_runs_in_blocks_and_warns_of_a_last_block_of_one(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = small_data(tmp_path / "nine.jsonl", 9)
    output = fit(policy, data, tmp_path / "run", "--data.pairing", "rotate")
    assert len(rows(output)) == 3
    assert "paired with itself" in capsys.readouterr().out.replace("\n", " ")


def test_dropout_is_off_unless_asked_for(tmp_path: Path, train: Path):
    rates = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}
    noisy = small_model(tmp_path / "noisy", "gpt2", **rates)
    calm = fit(noisy, train, tmp_path / "calm")
    assert numbers(calm)[0]["train/reward/margin"] == 0.0
    dropped = fit(noisy, train, tmp_path / "dropped", "--model.dropout", "true")
    assert numbers(dropped)[0]["train/reward/desirable"] != 0.0


def test_bfloat16_mixed_runs_on_a_cpu(
    policy: Path, train: Path, reference_run: Path, tmp_path: Path
):
    output = fit(policy, train, tmp_path, "--trainer.precision", "bf16-mixed")
    losses = [row["train/loss"] for row in numbers(output)]
    expected = [row["train/loss"] for row in numbers(reference_run)]
    assert losses == pytest.approx(expected, rel=0.1)
    assert {value.dtype for value in weights(output).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("architecture", "route"), [("gpt2", "packed"), ("mamba", "padded"), ("qwen2_moe", "pack")]
)
def test_other_architectures_run(
    architecture: str,
    route: str,
    train: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    policy = small_model(tmp_path / "policy", architecture)
    whole = fit(policy, train, tmp_path / "whole", *SGD)
    printed = capsys.readouterr().out
    assert f"route        {route}" in printed
    assert all(line == line.rstrip() for line in printed.splitlines())
    AutoModelForCausalLM.from_pretrained(whole / "model")
    if architecture != "qwen2_moe":  # its auxiliary loss is a mean over micro-batches
        cut = fit(policy, train, tmp_path / "cut", *SGD, "--data.max_tokens", 150)
        assert_runs_agree(cut, whole)


def _parquet(path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(plain_records(24)), path)
    return path


def _csv(path: Path) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "completion", "label"])
        writer.writeheader()
        writer.writerows(plain_records(24))
    return path


def _json(path: Path) -> Path:
    path.write_text(json.dumps(plain_records(24)), encoding="utf-8")
    return path


@pytest.mark.parametrize("write", [_parquet, _csv, _json])
def test_the_same_records_in_another_format_train_the_same(
    policy: Path, reference_run: Path, tmp_path: Path, write
):
    data = write(tmp_path / f"train.{write.__name__.removeprefix('_')}")
    assert rows(fit(policy, data, tmp_path / "run")) == rows(reference_run)


@pytest.mark.parametrize("as_glob", [True, False])
def test_several_files_train_as_one(
    policy: Path, reference_run: Path, tmp_path: Path, as_glob: bool
):
    records = plain_records(24)
    first = write_jsonl(tmp_path / "part_0.jsonl", records[:10])
    second = write_jsonl(tmp_path / "part_1.jsonl", records[10:])
    source = tmp_path / "part_*.jsonl" if as_glob else json.dumps([str(first), str(second)])
    assert rows(fit(policy, source, tmp_path / "run")) == rows(reference_run)


def test_conversations_train_with_a_template_given(
    train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tokenizer = make_tokenizer(chat_template="qwen2_5")
    policy = save_model(tmp_path / "policy", "qwen2", tokenizer)
    data = write_jsonl(tmp_path / "chat.jsonl", chat_records(8))
    own = fit(policy, data, tmp_path / "own")
    template = tmp_path / "template.jinja"
    template.write_text(tokenizer.chat_template, encoding="utf-8")
    tokenizer.chat_template = None
    (policy / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(policy)
    given = fit(policy, data, tmp_path / "given", "--data.chat_template", template)
    assert rows(given) == rows(own)
    assert AutoTokenizer.from_pretrained(given / "model").chat_template == template.read_text()


def test_a_records_weight_multiplies_its_loss(policy: Path, tmp_path: Path):
    records = plain_records(4)
    plain = fit(policy, write_jsonl(tmp_path / "a.jsonl", records), tmp_path / "plain")
    doubled = [record | {"weight": 2.0} for record in records]
    weighted = fit(policy, write_jsonl(tmp_path / "b.jsonl", doubled), tmp_path / "weighted")
    one, two = numbers(plain)[0], numbers(weighted)[0]
    assert two["train/loss"] == pytest.approx(2 * one["train/loss"])
    assert two["train/grad_norm"] == pytest.approx(2 * one["train/grad_norm"], rel=1e-5)


def test_given_class_weights_enter_the_loss(policy: Path, train: Path, tmp_path: Path):
    given = ("--model.desirable_weight", 2.0, "--model.undesirable_weight", 0.5)
    first = numbers(fit(policy, train, tmp_path, *given, "--trainer.max_steps", 1))[0]
    possible = {(2.0 * n + 0.5 * (4 - n)) / 8 for n in range(5)}
    assert any(first["train/loss"] == pytest.approx(value, rel=1e-6) for value in possible)


def test_truncation_drops_or_keeps_prompts_that_are_too_long(policy: Path, tmp_path: Path):
    records = plain_records(8)
    records[0]["prompt"] = "Question: " + "the river " * 60 + "\n"
    data = write_jsonl(tmp_path / "long.jsonl", records)
    lengths = ("--data.max_length", 64, "--data.batch_size", 8)
    dropped = fit(policy, data, tmp_path / "start", *lengths)
    kept = fit(policy, data, tmp_path / "end", *lengths, "--data.truncation", "keep_end")
    tokens = [numbers(output)[0]["train/tokens"] for output in (dropped, kept)]
    assert tokens[1] == tokens[0] + 64


def test_empty_prompts_and_completions_train(policy: Path, tmp_path: Path):
    records = plain_records(8)
    records[0]["prompt"] = ""
    records[3]["completion"] = ""
    output = fit(policy, write_jsonl(tmp_path / "empty.jsonl", records), tmp_path / "run")
    assert all(math.isfinite(row["train/loss"]) for row in numbers(output))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_end_at_the_runs_end(policy: Path, train: Path, tmp_path: Path, schedule: str):
    options = ("--model.lr_schedule", schedule, "--model.warmup_ratio", 0.5)
    rates = [row["train/lr"] for row in numbers(fit(policy, train, tmp_path, *options))]
    assert rates[:4] == pytest.approx([0.0, 1e-3 / 3, 2e-3 / 3, 1e-3])
    assert rates[3] > rates[4] > rates[5] > 0.0


def test_clipping_bounds_the_step_and_the_norm_is_from_before_clipping(
    policy: Path, train: Path, tmp_path: Path
):
    options = ("--model.optimizer", "sgd", "--trainer.max_steps", 1)
    free = fit(policy, train, tmp_path / "free", *options)
    clipped = fit(policy, train, tmp_path / "clipped", *options, "--model.gradient_clip_norm", 0.1)
    norm = numbers(free)[0]["train/grad_norm"]
    assert norm == numbers(clipped)[0]["train/grad_norm"] > 0.2
    before = AutoModelForCausalLM.from_pretrained(policy).state_dict()
    moves = [
        torch.cat([(value - before[name]).flatten() for name, value in weights(output).items()])
        for output in (free, clipped)
    ]
    # A movement is as exact as the weights that it is a difference of.
    rounding = EPS * max(float(weight.abs().max()) for weight in weights(free).values())
    expected = moves[0] * 0.1 / norm
    torch.testing.assert_close(moves[1], expected, rtol=RELATIVE, atol=rounding)


def test_options_of_a_file_are_overridden_by_those_after_it(
    policy: Path, train: Path, tmp_path: Path
):
    config = tmp_path / "settings.yaml"
    config.write_text("model:\n  beta: 0.2\n  loss: apo_zero_unpaired\n", encoding="utf-8")
    output = tmp_path / "run"
    options = ("--model.policy", policy, "--data.train", train, "--output_dir", output)
    assert run_cli("fit", "--config", config, *options, "--model.beta", 0.3) == 0
    written = (output / "config.yaml").read_text()
    assert "beta: 0.3" in written
    assert "loss: apo_zero_unpaired" in written


def test_the_written_config_reproduces_its_run(reference_run: Path, tmp_path: Path):
    config = reference_run / "config.yaml"
    assert run_cli("fit", "--config", config, "--output_dir", tmp_path) == 0
    assert rows(tmp_path) == rows(reference_run)


def test_settings_come_from_the_environment_too(
    policy: Path, train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("KTO_FIT__MODEL__BETA", "0.35")
    output = fit(policy, train, tmp_path / "environment")
    assert "beta: 0.35" in (output / "config.yaml").read_text()
    output = fit(policy, train, tmp_path / "argument", "--model.beta", 0.4)
    assert "beta: 0.4" in (output / "config.yaml").read_text()


def test_print_config_shows_the_defaults(capsys: pytest.CaptureFixture[str]):
    assert run_cli("fit", "--print_config", "--model.policy", "anywhere") == 0
    shown = capsys.readouterr().out
    for line in ("beta: 0.1", "learning_rate: 1.0e-06", "batch_size: 8", "max_tokens: 16384"):
        assert line in shown


def test_steps_are_printed_as_lines_without_a_terminal(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fit(policy, train, tmp_path)
    printed = capsys.readouterr()
    assert "step 6/6  loss " in printed.out
    assert "z0 " in printed.out
    assert "margin " in printed.out
    for part in ("records", "weights", "dropped", "truncated", "tokens", "reference"):
        assert f"\n{part} " in f"\n{printed.out}"
    assert not any(line.endswith(" ") for line in printed.out.splitlines())
    assert printed.err == ""


def test_a_lightning_logger_gets_the_same_numbers(
    policy: Path, train: Path, reference_run: Path, tmp_path: Path
):
    logger = ("--trainer.logger", "lightning.pytorch.loggers.CSVLogger")
    folder = (
        "--trainer.logger.save_dir",
        tmp_path / "logs",
        "--trainer.logger.flush_logs_every_n_steps",
        1,
    )
    output = fit(policy, train, tmp_path / "run", *logger, *folder)
    assert rows(output) == rows(reference_run)
    (path,) = (tmp_path / "logs").rglob("metrics.csv")
    with path.open(newline="") as file:
        logged = list(csv.DictReader(file))
    assert [row["train/loss"] for row in logged] == [row["train/loss"] for row in rows(output)]


def test_help_and_version_need_no_heavy_imports():
    code = (
        "import sys; from kto_lightning.__main__ import main; "
        "assert main(['--help']) == main(['--version']) == main(['export', '--help']) == 0; "
        "assert main([]) == main(['unknown']) == 2; "
        "assert not {'torch', 'lightning', 'transformers', 'datasets'} & set(sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "predict" in ended.stdout


def test_the_summary_shows_the_examples_of_a_step(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(policy, train, tmp_path / "run", "--data.batch_size", 100)
    assert "1, 24 examples each" in capsys.readouterr().out
