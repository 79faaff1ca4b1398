"""Four-bit quantization: invalid settings, and a run if bitsandbytes is installed."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.cli import fit, numbers, run_cli, small_data, small_model
from tests.support.tolerances import EPS

FOUR_BITS = ["--model.quantization", "4bit"]
ADAPTER = ["--model.lora.r", 4]
OPTIONS = [*FOUR_BITS, *ADAPTER, "--model.lora.target_modules", '["q_proj","lm_head"]']
OPTIONS += ["--model.dtype", "float32"]  # so that policy and reference begin exactly alike


@pytest.mark.parametrize(
    ("missing", "options", "message"),
    [
        ("bitsandbytes", ADAPTER, "needs bitsandbytes, which is not installed. `pip install"),
        ("accelerate", ADAPTER, "needs accelerate, which is not installed. `pip install"),
        ("CUDA", ADAPTER, "needs a CUDA device, and there is none here. Use --model.dtype"),
        (None, [], "is for a frozen base: weights of four bits cannot be trained. Add --model.lor"),
    ],
)
def test_rejected_where_it_cannot_run(missing, options, message, tmp_path, capsys, remove):
    remove(missing)
    absent = tmp_path / "absent"
    settings = ["--model.policy", absent, "--data.train", absent, "--output_dir", tmp_path / "o"]
    assert run_cli("fit", *settings, *options, *FOUR_BITS) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def remove(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """A machine that meets every requirement except one."""

    def remove_requirement(missing: str | None) -> None:
        for package in ("bitsandbytes", "accelerate"):
            if package == missing:
                monkeypatch.setitem(sys.modules, package, None)
            else:
                monkeypatch.delitem(sys.modules, package, raising=False)
                (tmp_path / f"{package}.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: missing != "CUDA")

    return remove_requirement


def test_unknown_values_are_rejected(tmp_path, capsys):
    settings = ["--model.policy", tmp_path, "--data.train", tmp_path, *ADAPTER]
    assert run_cli("fit", *settings, "--model.quantization", "8bit") == 2
    assert "--model.quantization must be 4bit or null, got 8bit." in capsys.readouterr().err


@pytest.fixture(scope="module", autouse=True)
def _on_a_cpu() -> Iterator[None]:
    """Make bitsandbytes' layers trainable on a CPU: with AVX-512 they change to an inference format
    in the first forward in eval mode, which is why `fit` rejects CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("bitsandbytes") is not None:
            patch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A short run with an adapter on the head too."""
    pytest.importorskip("bitsandbytes", minversion="0.50")
    folder = tmp_path_factory.mktemp("quantized")
    model = small_model(folder / "base", "llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kto_lightning.models.settings.check_quantization", lambda *_, **__: None)
        train = small_data(folder / "data.jsonl", 12)
        fit(model, train, folder / "out", *OPTIONS, "--trainer.max_steps", 3)
        yield folder


def test_checkpoints_hold_the_trained_adapter_alone(run):
    margins = [row["train/reward/margin"] for row in numbers(run / "out")]
    assert margins[0] == 0.0
    assert margins[-1] != 0.0
    checkpoint = torch.load(run / "out/checkpoints/step=3.ckpt", weights_only=False)
    assert checkpoint["state_dict"]
    assert all("lora_" in name for name in checkpoint["state_dict"])
    assert {value.dtype for value in checkpoint["state_dict"].values()} == {torch.float32}


def test_the_update_is_merged_into_the_original_base(run):
    base = AutoModelForCausalLM.from_pretrained(run / "base", dtype=torch.float32)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    expected = PeftModel.from_pretrained(base, run / "out/adapter").merge_and_unload().state_dict()
    merged = load_file(run / "out/model/model.safetensors")
    assert merged.keys() == expected.keys()
    for name, weight in merged.items():
        atol = EPS * float(weight.abs().max())  # one rounding of a sum on either side
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=atol)
    moved = [name for name in merged if not torch.equal(merged[name], before[name])]
    assert "lm_head.weight" in moved
    assert all("q_proj" in name or "lm_head" in name for name in moved)
    assert "quantization_config" not in (run / "out/model/config.json").read_text()


def test_export_writes_the_same_model_as_fit(run, tmp_path):
    assert run_cli("export", run / "out/checkpoints/step=3.ckpt", tmp_path / "m", "--merge") == 0
    exported = load_file(tmp_path / "m/model.safetensors")
    for name, weight in load_file(run / "out/model/model.safetensors").items():
        atol = EPS * float(weight.abs().max())
        torch.testing.assert_close(weight, exported[name], rtol=0, atol=atol)


def test_a_stopped_run_resumes(run, tmp_path):
    # The same run, stopped after two steps and resumed.
    where = (run / "base", run / "data.jsonl", tmp_path / "out")
    fit(*where, *OPTIONS, "--trainer.max_steps", 2)
    fit(*where, *OPTIONS, "--trainer.max_steps", 3, "--ckpt_path", "last")
    assert numbers(tmp_path / "out") == numbers(run / "out")


def test_a_quantized_reference_has_its_own_cache(run, tmp_path):
    cache = ["--model.reference_cache", tmp_path / "cache", "--trainer.max_steps", 1]
    where = (run / "base", run / "data.jsonl")
    fit(*where, tmp_path / "a", *ADAPTER, "--model.dtype", "bfloat16", *cache)
    fit(*where, tmp_path / "b", *ADAPTER, *FOUR_BITS, *cache)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    # Before the first update policy and reference are the same model.
    assert numbers(tmp_path / "b")[0]["train/reward/margin"] == 0.0
    four, sixteen = (numbers(tmp_path / name)[0]["train/logps/desirable"] for name in ("b", "a"))
    assert four != sixteen
