"""The cache of the reference's log-probs: records on disk, keys, and runs with it."""

import csv
import os
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kto_lightning.__main__ import main
from kto_lightning.batches.collate import pair_key
from kto_lightning.errors import KTOError
from kto_lightning.models.reference_cache import RECORD, ReferenceCache, reference_fingerprint
from tests.support.cli import LAST, fit
from tests.support.comparison import assert_runs_equal
from tests.support.factories import make_tokenizer, plain_records, save_model, write_jsonl
from tests.support.faults import Killed

NUM_RECORDS = 13


def keys_of(*numbers: int) -> list[bytes]:
    return [pair_key(np.array([number]), np.array([1, 2])) for number in numbers]


def test_records_of_another_process_are_found(tmp_path):
    first, second = ReferenceCache(tmp_path), ReferenceCache(tmp_path)
    first.add(keys_of(1, 2), [-1.5, -2.5])
    second.add(keys_of(3), [-3.5])
    assert second.find(keys_of(1)) is None
    second.refresh()
    assert second.find(keys_of(3, 1, 2)) == [-3.5, -1.5, -2.5]
    assert ReferenceCache(tmp_path).num_known(keys_of(1, 2, 3, 4)) == 3


def test_a_log_prob_is_written_once(tmp_path):
    cache = ReferenceCache(tmp_path)
    cache.add(keys_of(1), [-1.0])
    cache.add(keys_of(1, 2), [-1.0, -2.0])
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == 2 * RECORD.itemsize


def test_an_incomplete_last_record_is_read_once_it_is_complete(tmp_path):
    writer = ReferenceCache(tmp_path)
    writer.add(keys_of(1, 2), [-1.0, -2.0])
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:-3])
    reader = ReferenceCache(tmp_path)
    assert len(reader) == 1
    file.write_bytes(content)
    reader.refresh()
    assert reader.find(keys_of(1, 2)) == [-1.0, -2.0]


@pytest.mark.parametrize("byte", range(RECORD.itemsize))
def test_a_damaged_record_is_ignored(tmp_path, byte):
    ReferenceCache(tmp_path).add(keys_of(1, 2, 3), [-1.0, -2.0, -3.0])
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[RECORD.itemsize + byte] ^= 0x41
    file.write_bytes(bytes(content))
    cache = ReferenceCache(tmp_path)
    assert cache.find(keys_of(1, 3)) == [-1.0, -3.0]
    assert cache.find(keys_of(2)) is None
    assert len(cache) == 2


def test_damage_is_named_in_one_line(tmp_path, capsys):
    ReferenceCache(tmp_path).add(keys_of(*range(9)), [-1.0] * 9)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[2 * RECORD.itemsize] ^= 1
    content[5 * RECORD.itemsize] ^= 1
    file.write_bytes(bytes(content))
    (tmp_path / "a.logps").mkdir()
    os.mkfifo(tmp_path / "b.logps")
    (tmp_path / "c.logps").write_bytes(bytes(1000))
    cache = ReferenceCache(tmp_path)
    cache.refresh()
    assert len(cache) == 7
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    error = "\n".join(lines)
    assert f"{file} is damaged: 2 of its log-probs are computed again." in error
    assert "c.logps is damaged: 35 of its log-probs" in error
    for name in "ab":
        assert f"{name}.logps cannot be read: not a file. Its log-probs are computed" in error


def test_files_of_another_reference_are_not_used(tmp_path, capsys):
    ReferenceCache(tmp_path / "one").add(keys_of(1), [-1.0])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert len(ReferenceCache(tmp_path / "two")) == 0
    assert "is damaged: 1 of its log-probs" in capsys.readouterr().err


def test_a_directory_that_cannot_be_written_is_refused_before_the_reference_is_loaded(
    inputs, tmp_path, capsys
):
    (tmp_path / "file").write_text("")
    command = ["fit", "--model.policy", str(inputs / "model"), "--output_dir", str(tmp_path / "o")]
    command += ["--data.train", str(inputs / "records.jsonl"), "--trainer.accelerator", "cpu"]
    assert main([*command, "--model.reference_cache", str(tmp_path / "file" / "cache")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --model.reference_cache: ")
    assert "cannot be written: Not a directory" in error


def test_a_disk_that_takes_a_part_of_a_record_is_full(tmp_path):
    cache = ReferenceCache(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (RECORD.itemsize + 5, limit[1]))
    try:
        with pytest.raises(KTOError, match=r"cannot be written: File too large\. Make room"):
            cache.add(keys_of(1, 2), [-1.0, -2.0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert ReferenceCache(tmp_path).find(keys_of(1)) == [-1.0]


def test_nan_is_ignored(tmp_path):
    ReferenceCache(tmp_path).add(keys_of(1), [float("nan")])
    assert len(ReferenceCache(tmp_path)) == 0


def test_the_key_depends_on_where_the_prompt_ends():
    tokens = np.arange(5)
    keys = {pair_key(tokens[:cut], tokens[cut:]) for cut in range(6)}
    assert len(keys) == 6
    assert pair_key(tokens[:2].astype(np.int32), tokens[2:]) in keys


def test_the_fingerprint_depends_on_contents_and_settings(tmp_path):
    first, second = (save_model(tmp_path / n, "llama", make_tokenizer()) for n in "ab")
    same = [reference_fingerprint([d], ["float32"]) for d in (first, second)]
    assert same[0] == same[1]
    assert reference_fingerprint([first], ["bfloat16"]) != same[0]
    assert reference_fingerprint([first, second], ["float32"]) != same[0]
    weights = load_file(second / "model.safetensors")
    weights[next(iter(weights))].view(-1)[0] += 1e-3
    save_file(weights, second / "model.safetensors", metadata={"format": "pt"})
    assert reference_fingerprint([second], ["float32"]) != same[0]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("cached")
    save_model(directory / "model", "qwen2", make_tokenizer())
    write_jsonl(directory / "records.jsonl", plain_records(NUM_RECORDS))
    return directory


def run(inputs: Path, output: Path, *options: str) -> list[dict[str, str]]:
    status = main(
        [
            "fit",
            *("--model.policy", str(inputs / "model")),
            *("--data.train", str(inputs / "records.jsonl")),
            *("--output_dir", str(output), "--trainer.accelerator", "cpu"),
            *("--model.learning_rate", "1e-3", "--data.batch_size", "4"),
            *options,
        ]
    )
    assert status == 0
    with (output / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def losses(rows: list[dict[str, str]]) -> list[float]:
    return [float(row["train/loss"]) for row in rows]


def test_a_cache_changes_no_loss_and_is_complete_after_an_epoch(inputs, tmp_path, capsys):
    plain = run(inputs, tmp_path / "plain", "--trainer.max_epochs", "2")
    cached = ["--model.reference_cache", str(tmp_path / "cache"), "--trainer.max_epochs", "2"]
    filling = run(inputs, tmp_path / "filling", *cached)
    capsys.readouterr()
    full = run(inputs, tmp_path / "full", *cached)
    found = capsys.readouterr().out
    assert f"{2 * NUM_RECORDS} of {2 * NUM_RECORDS} log-probs" in found.replace("\n", " ")
    assert "no model is loaded" in found.replace("\n", " ")
    np.testing.assert_allclose(losses(filling), losses(plain), rtol=1e-5)
    np.testing.assert_allclose(losses(full), losses(plain), rtol=1e-5)


def test_other_training_settings_use_the_cache_and_another_model_does_not(inputs, tmp_path, capsys):
    cached = ["--model.reference_cache", str(tmp_path / "cache")]
    run(inputs, tmp_path / "first", *cached)
    other = ["--model.beta", "0.5", "--seed_everything", "7", "--data.batch_size", "5"]
    capsys.readouterr()
    run(inputs, tmp_path / "second", *cached, *other, "--model.undesirable_weight", "2.0")
    assert "26 of 26" in capsys.readouterr().out
    save_model(tmp_path / "other", "qwen2", make_tokenizer(), seed=1)
    run(inputs, tmp_path / "third", *cached, "--model.policy", str(tmp_path / "other"))
    assert "0 of 26" in capsys.readouterr().out


def test_runs_with_micro_batches_use_the_cache(inputs, tmp_path):
    cached = ["--model.reference_cache", str(tmp_path / "cache")]
    whole = run(inputs, tmp_path / "whole", *cached)
    cut = run(inputs, tmp_path / "cut", *cached, "--data.max_tokens", "60")
    np.testing.assert_allclose(losses(cut), losses(whole), rtol=1e-5)


def test_lora_uses_the_log_probs_of_its_base(inputs, tmp_path, capsys):
    cached = ["--model.reference_cache", str(tmp_path / "cache")]
    run(inputs, tmp_path / "full", *cached)
    capsys.readouterr()
    run(inputs, tmp_path / "lora", *cached, "--model.lora.r", "2")
    assert "26 of 26" in capsys.readouterr().out


FIXED = ("--checkpoint.every_n_steps", 1, "--trainer.max_epochs", 2, "--data.max_tokens", 200)


@pytest.fixture(scope="module")
def known(inputs, tmp_path_factory) -> Path:
    """A cache with one log-prob of the third step, from a batch of its own."""
    directory = tmp_path_factory.mktemp("known")
    single = write_jsonl(directory / "single.jsonl", plain_records(NUM_RECORDS)[:2])
    options = ("--model.reference_cache", directory / "cache", "--data.batch_size", 1)
    fit(inputs / "model", single, directory / "run", *options)
    return directory / "cache"


@pytest.fixture(scope="module")
def whole(inputs, known, tmp_path_factory) -> Path:
    """A run that is not killed."""
    directory = tmp_path_factory.mktemp("whole")
    cached = ("--model.reference_cache", shutil.copytree(known, directory / "cache"))
    return fit(inputs / "model", inputs / "records.jsonl", directory / "run", *FIXED, *cached)


@pytest.mark.parametrize("bytes_kept", [0, 1, 3 * RECORD.itemsize, 4 * RECORD.itemsize, 170])
def test_a_run_killed_while_it_fills_the_cache_resumes_bit_for_bit(
    bytes_kept: int, inputs, known, whole, tmp_path, monkeypatch
):
    """Batches of four: records 1 to 4 of an append are matched, 5 to 8 mismatched."""
    model, records = inputs / "model", inputs / "records.jsonl"
    options = (*FIXED, "--model.reference_cache", shutil.copytree(known, tmp_path / "cache"))
    append, num_appends = ReferenceCache._append, 0

    def append_or_end(self: ReferenceCache, content: bytes) -> None:
        nonlocal num_appends
        num_appends += bool(content)
        if num_appends == 3:
            append(self, content[:bytes_kept])
            raise Killed
        append(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(ReferenceCache, "_append", append_or_end)
        with pytest.raises(Killed):
            fit(model, records, tmp_path / "killed", *options)
    fit(model, records, tmp_path / "killed", *options, *LAST)
    assert_runs_equal(tmp_path / "killed", whole)


def test_log_probs_of_validation_are_cached(inputs, tmp_path, capsys):
    held_out = write_jsonl(tmp_path / "held_out.jsonl", plain_records(6, seed=5))
    cached = ["--model.reference_cache", str(tmp_path / "cache")]
    cached += ["--data.validation", str(held_out)]
    first = run(inputs, tmp_path / "first", *cached)
    capsys.readouterr()
    second = run(inputs, tmp_path / "second", *cached)
    assert "no model is loaded" in capsys.readouterr().out.replace("\n", " ")
    assert float(first[-1]["val/loss"]) == pytest.approx(float(second[-1]["val/loss"]), rel=1e-5)
    assert torch.isfinite(torch.tensor(float(second[-1]["val/loss"])))


def test_predict_computes_no_mismatched_log_prob(inputs, tmp_path):
    one_prompt = [
        {"prompt": "What?", "completion": answer, "label": True} for answer in ("This.", "That.")
    ]
    records = write_jsonl(tmp_path / "records.jsonl", one_prompt)
    cache = tmp_path / "cache"
    command = ["predict", "--model.policy", str(inputs / "model"), "--trainer.accelerator", "cpu"]
    command += ["--data.predict", str(records), "--model.reference_cache", str(cache)]
    assert main([*command, "--output_dir", str(tmp_path / "output")]) == 0
    (file,) = cache.glob("*/*.logps")
    assert file.stat().st_size == len(one_prompt) * RECORD.itemsize
