"""Where TRL 1.16 departs from us: what `docs/coming_from_trl.md` says of it, seen in TRL itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.data_utils import unpair_preference_dataset
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from tests.support.cli import small_model
from tests.support.factories import plain_records


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("departures") / "model")


def records(count: int) -> Dataset:
    """Every completion names its record, so that each is known by its tokens."""
    rows = plain_records(count, 0)
    for number, row in enumerate(rows):
        row["completion"] = f" answer {number:03d}"
    return Dataset.from_list(
        [{k: row[k] for k in ("prompt", "completion", "label")} for row in rows]
    )


def trainer(model: Path, output: Path, train: Dataset, **options: Any) -> KTOTrainer:
    evaluation = options.pop("eval_dataset", None)
    config = KTOConfig(
        output_dir=str(output),
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    return KTOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=config,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=AutoTokenizer.from_pretrained(model),
    )


def partners(dataset: Any) -> list[int]:
    """Of each example, whose completion it got."""
    own = [tuple(row["completion_ids"]) for row in dataset]
    assert len(set(own)) == len(own)
    return [own.index(tuple(row["KL_completion_ids"])) for row in dataset]


def rotated(count: int, block: int) -> list[int]:
    starts = range(0, count, block)
    blocks = [list(range(start, min(start + block, count))) for start in starts]
    return [other for one in blocks for other in (one[-1:] + one[:-1])]


def test_a_last_block_of_one_is_paired_with_itself(model: Path, tmp_path: Path):
    theirs = trainer(model, tmp_path, records(21), per_device_train_batch_size=4)
    found = partners(theirs.train_dataset)
    assert found == rotated(21, 4)
    assert found[20] == 20


def test_workers_move_trls_blocks(model: Path, tmp_path: Path):
    """22 rows over two workers: eleven each, whose blocks begin anew."""
    options = {"per_device_train_batch_size": 4, "dataset_num_proc": 2}
    found = partners(trainer(model, tmp_path, records(22), **options).train_dataset)
    assert found == rotated(11, 4) + [11 + other for other in rotated(11, 4)]
    elsewhere = [row for row, other in enumerate(found) if row // 4 != other // 4]
    assert len(elsewhere) == 6


def test_held_out_pairs_have_the_training_batch_size(model: Path, tmp_path: Path):
    theirs = trainer(
        model,
        tmp_path,
        records(8),
        eval_dataset=records(8),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
    )
    assert partners(theirs.eval_dataset) == rotated(8, 4)


def test_unpaired_pairs_come_in_runs_of_one_class():
    pairs = [{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(1500)]
    labels = unpair_preference_dataset(Dataset.from_list(pairs))["label"]
    runs = [0]
    for before, label in zip([None, *labels], labels, strict=False):
        if before in (None, label):
            runs[-1] += 1
        else:
            runs.append(1)
    assert runs == [1000, 1000, 500, 500]


def test_a_nan_is_left_out_of_trls_loss(model: Path, tmp_path: Path):
    """One example's log-prob is not a number, and the loss is that of the others."""
    theirs = trainer(
        model, tmp_path, records(4), per_device_train_batch_size=4, loss_type="apo_zero_unpaired"
    )
    batch = theirs.data_collator([theirs.train_dataset[i] for i in range(4)])
    whole = theirs._compute_loss(theirs.model, dict(batch), False)
    assert float(whole.detach()) == pytest.approx(0.5)

    model_of_theirs: Any = theirs.model
    forward = model_of_theirs.forward

    def one_is_broken(*args: Any, **kwargs: Any) -> Any:
        outputs: Any = forward(*args, **kwargs)
        outputs.log_probs = outputs.log_probs.clone()
        outputs.log_probs[0] = torch.nan
        return outputs

    model_of_theirs.forward = one_is_broken
    broken = theirs._compute_loss(model_of_theirs, dict(batch), False)
    assert float(broken.detach()) == pytest.approx(0.5)
