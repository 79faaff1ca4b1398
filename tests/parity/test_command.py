"""`parity`: agreement, differences, and rejected input."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import kto_lightning.loss
from kto_lightning.parity.agreement import (
    MOST_SENSITIVE,
    Movement,
    compare,
    measure_sensitivity,
    movement,
)
from kto_lightning.parity.command import main as parity_main
from kto_lightning.parity.trace import Trace
from tests.architectures.build import save_family
from tests.support.cli import run_cli, small_data, small_model
from tests.support.factories import (
    add_adapter,
    chat_records,
    make_tokenizer,
    plain_records,
    save_adapter,
    save_model,
    write_jsonl,
)
from tests.support.image_text import save_image_text


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parity")
    return {"model": small_model(folder / "model"), "data": small_data(folder / "data.jsonl")}


def parity(files: dict[str, Any], *options: Any) -> int:
    arguments = ["--model", files["model"], "--data", files["data"], "--steps", 3]
    arguments += ["--batch_size", 4, "--learning_rate", 1e-3]
    return run_cli("parity", *arguments, *options)


def test_both_agree_on_all_weights(files, capsys):
    assert parity(files) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[-1] == "They agree."
    assert all(len(line.rstrip()) <= 80 for line in lines)
    assert not [line for line in lines if "DIFFER" in line]
    shown = [line for line in lines if line.rstrip().endswith("agree")]
    assert len(shown) == 11
    assert printed.err == ""


def test_both_agree_on_a_new_adapter_and_its_weights(files, capsys):
    options = ["--lora", 4, "--optimizer", "sgd", "--learning_rate", 0.5, "--json"]
    # Micro-batches are ours alone and must change nothing.
    assert parity(files, *options, "--", "--data.max_tokens", 64) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["agrees"]
    assert report["weights"]["agrees"]
    assert report["weights"]["movement"] >= 1e-3
    assert "Set for `fit` only: --data.max_tokens 64" in report["notes"]


@pytest.mark.parametrize("architecture", ["mistral3", "qwen3_5"])
def test_both_agree_on_the_text_of_an_image_text_model(architecture, files, tmp_path, capsys):
    model = save_image_text(tmp_path / "model", architecture)
    options = ["--optimizer", "sgd", "--learning_rate", 0.02, "--json"]
    assert parity(files | {"model": model}, *options) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["weights"]["agrees"]
    assert report["weights"]["movement"] >= 1e-3


@pytest.mark.parametrize("family", ["phimoe", "granitemoehybrid+dense_attention"])
def test_both_agree_on_experts_of_other_names_or_of_none(family, files, tmp_path):
    assert parity(files | {"model": save_family(tmp_path / "model", family)}) == 0


@pytest.mark.parametrize("family", ["falcon_h1", "phimoe"])
def test_a_new_adapter_leaves_out_what_it_cannot_be_on(family, files, tmp_path):
    model = save_family(tmp_path / "model", family)
    assert parity(files | {"model": model}, "--lora", 4, "--steps", 2) == 0


def test_an_adapter_is_trained_further(files, tmp_path, capsys):
    adapter = save_adapter(tmp_path / "adapter", files["model"])
    assert parity(files | {"model": adapter}, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["columns"]["train/reward/desirable"]["ours"] != 0


def test_a_loss_that_is_off_by_a_thousandth_is_found(files, capsys, monkeypatch):
    right = kto_lightning.loss.kto_loss
    monkeypatch.setattr(
        "kto_lightning.loss.kto_loss", lambda *args, **kw: 1.001 * right(*args, **kw)
    )
    assert parity(files, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    differing = {name for name, column in report["columns"].items() if not column["agrees"]}
    assert differing == {"train/loss", "train/grad_norm"}
    loss = report["columns"]["train/loss"]
    assert loss["ours"] == pytest.approx(1.001 * loss["trl"], rel=1e-4)


def test_other_pairs_give_another_z0(files, capsys):
    # A reference of its own makes z0 large from the first step on.
    assert parity(files, "--beta", 0.3, "--", "--data.pairing", "distinct_prompts") == 1
    last = capsys.readouterr().out.split("They differ in ")[-1]
    assert "z0" in last


def test_another_model_as_reference(files, tmp_path, capsys):
    reference = save_model(tmp_path / "reference", "qwen2", make_tokenizer(), seed=1)
    assert parity(files, "--reference", reference, "--beta", 0.02, "--json") == 0
    assert json.loads(capsys.readouterr().out)["columns"]["train/z0_raw"]["trl"] != 0


def test_trl_gets_records_in_its_own_format(tmp_path, capsys):
    model = save_model(
        tmp_path / "model", "llama", make_tokenizer(chat_template="llama3", bos=True)
    )
    records = [
        {"messages": r["prompt"] + r["completion"], "label": int(r["label"]), "weight": 2.0}
        for r in chat_records(16)
    ]
    data = write_jsonl(tmp_path / "data.jsonl", records)
    assert parity({"model": model, "data": data}) == 0
    assert "Weights of single records were omitted" in capsys.readouterr().out


def test_records_of_both_kinds_are_an_error(files, tmp_path, capsys):
    data = write_jsonl(tmp_path / "data.jsonl", [*chat_records(4), *plain_records(4)])
    assert parity(files | {"data": data}) == 1
    assert "Give one with --chat_template" in capsys.readouterr().err
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}")
    assert parity(files | {"data": data}, "--chat_template", template) == 1
    assert "TRL takes one kind at a time" in capsys.readouterr().err


def test_errors_of_fit_are_printed(files, tmp_path, capsys):
    with (tmp_path / "data.jsonl").open("w") as file:
        file.write("{}\n")
    assert parity(files | {"data": tmp_path / "data.jsonl"}) == 1
    assert f"{tmp_path / 'data.jsonl'}:1: 'prompt' is missing" in capsys.readouterr().err
    assert parity(files, "--", "--data.batchsize", 4) == 2
    assert "Did you mean '--data.batch_size'?" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")  # begins at 0
def test_errors_of_trl_are_printed(files, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(files["model"])
    adapted = add_adapter(model, target_modules=["q_proj", "lm_head"])
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert parity(files | {"model": tmp_path / "adapter"}) == 1
    assert "TRL cannot be run on this (ValueError: Applying a PEFT" in capsys.readouterr().err


def test_models_that_trl_fails_on_are_an_error(files, tmp_path, capsys):
    model = save_family(tmp_path / "model", "llama4_text")
    assert parity(files | {"model": model}) == 1
    assert "TRL cannot be run on this (AttributeError: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--batch_size", 1, "TRL does not accept a batch of one"),
        ("--steps", 0, "--steps must be at least 1, got 0"),
        ("--optimizer", "lion", "invalid choice"),
        ("--desirable_weight", "much", "invalid"),
    ],
)
def test_wrong_usage(files, capsys, option, value, message):
    assert parity(files, option, value) == 2
    assert message in capsys.readouterr().err


def test_without_trl(files, capsys, monkeypatch):
    monkeypatch.setattr("kto_lightning.parity.command.find_spec", lambda name: None)
    assert parity(files) == 2
    assert "pip install 'kto-lightning[trl]'" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    heavy = "torch", "transformers", "lightning", "trl"
    code = (
        "import sys; from kto_lightning.__main__ import main; main(['parity', '--help']); "
        f"print([n for n in {heavy} if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_exits_0(capsys):
    assert parity_main(["--help"]) == 0
    assert "--model DIR --data FILE" in capsys.readouterr().out


def trace(**columns: list[float]) -> Trace:
    """Two steps; what is not given is the same number in each."""
    names = ["loss", "grad_norm", "lr", "tokens", "z0", "z0_raw"]
    names += [f"{kind}/{side}" for kind in ("logps", "reward") for side in ("desirable",)]
    names += ["logps/undesirable", "reward/undesirable", "reward/margin"]
    values: dict[str, list[float]] = {f"train/{name}": [1.0, 1.0] for name in names}
    values |= {"mismatched_logps": [1.0, 1.0]}
    values |= {f"train/{name.replace('__', '/')}": column for name, column in columns.items()}
    return Trace(columns=values, weights={})


def differing(ours: Trace, theirs: Trace) -> list[str]:
    return [c.name for c in compare(ours, theirs, beta=0.1) if not c.agrees]


def test_a_class_must_be_absent_on_both_sides():
    nan = float("nan")
    absent = trace(logps__desirable=[nan, 1.0])
    assert differing(absent, absent) == []
    assert differing(trace(), absent) == ["train/logps/desirable"]
    assert differing(absent, trace()) == ["train/logps/desirable"]


@pytest.mark.parametrize("name", ["loss", "grad_norm", "z0"])
def test_non_finite_values_on_both_sides_differ(name):
    broken = trace(**{name: [1.0, float("nan")]})
    assert differing(broken, broken) == [f"train/{name}"]
    infinite = trace(**{name: [1.0, float("inf")]})
    assert differing(infinite, infinite) == [f"train/{name}"]


def test_token_counts_must_be_equal():
    assert differing(trace(tokens=[1.0, 2.0]), trace()) == ["train/tokens"]


def test_the_step_with_the_largest_excess_is_shown():
    (loss,) = (
        c for c in compare(trace(loss=[1.0, 1.1]), trace(), beta=0.1) if c.name == "train/loss"
    )
    assert (loss.step, loss.ours, loss.theirs, loss.agrees) == (2, 1.1, 1.0, False)


def test_weights_are_compared_by_the_largest_movement():
    initial = {"w": torch.zeros(3)}
    theirs = {"w": torch.tensor([0.0, 0.5, 1.0])}
    near, far = {"w": theirs["w"] + 5e-5}, {"w": theirs["w"] + 2e-4}
    assert movement(near, theirs, initial).agrees
    assert not movement(far, theirs, initial).agrees
    assert not movement(initial, initial, initial).is_enough
    with pytest.raises(ValueError, match="weights other"):
        movement({"other": torch.zeros(3)}, theirs, initial)


def test_tolerances_follow_what_rounding_does_to_trl():
    moved = trace(loss=[1.0, 1.0 + 1e-4], grad_norm=[3.0, 1.0])
    update = Movement(largest=1.0, difference=5e-4)
    found = measure_sensitivity(moved, trace(), update, beta=0.1)
    assert found.columns["train/loss"] == pytest.approx(40)
    assert found.columns["train/grad_norm"] == MOST_SENSITIVE
    assert found.columns["train/z0"] == 1
    assert found.weights == pytest.approx(20)
    for loss, agrees in [(1.0 + 3e-4, True), (1.0 + 5e-4, False)]:
        ours = trace(loss=[1.0, loss])
        compared = {c.name: c for c in compare(ours, trace(), beta=0.1, sensitivity=found)}
        assert compared["train/loss"].agrees == agrees
