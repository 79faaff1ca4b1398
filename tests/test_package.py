"""The package as Python code uses it, and what its folders must not disturb."""

import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
import transformers.utils.import_utils as transformers_imports

import kto_lightning
from kto_lightning import KTODataModule, KTOModule, kto_loss, reference_point
from tests.factories import make_tokenizer, plain_records, save_model, write_jsonl


def test_every_public_name_is_there():
    for name in kto_lightning.__all__:
        assert getattr(kto_lightning, name).__doc__


def test_importing_the_package_imports_no_framework():
    heavy = "torch", "transformers", "lightning", "datasets"
    code = f"import sys, kto_lightning; print([n for n in {heavy} if n in sys.modules])"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == "[]"


def test_the_kernels_folder_is_no_package_that_transformers_would_take_for_its_own():
    root = Path(__file__).resolve().parents[1]
    assert not (root / "kernels" / "__init__.py").exists()
    assert not transformers_imports.is_kernels_available()


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_trainer_runs_the_module_and_the_data_module(tmp_path):
    save_model(tmp_path / "model", "llama", make_tokenizer())
    records = write_jsonl(tmp_path / "records.jsonl", plain_records(12))
    module = KTOModule(policy=str(tmp_path / "model"), learning_rate=1e-3)
    data = KTODataModule(train=str(records), batch_size=4)
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 2
    assert module.latest_metrics["train/grad_norm"] > 0


def test_the_loss_works_on_plain_tensors():
    z0 = reference_point(torch.tensor(3.0), 2)
    losses = kto_loss(torch.tensor([1.5, 1.5]), torch.tensor([True, False]), z0, beta=0.1)
    assert losses.tolist() == [0.5, 0.5]
