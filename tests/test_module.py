"""One optimizer step by a real Trainer: the same however its batch is cut into micro-batches."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import Trainer

from kto_lightning.data.datamodule import KTODataModule
from kto_lightning.errors import ConfigError
from kto_lightning.models.lora import LoRA
from kto_lightning.models.packed_run import CHECKPOINTING
from kto_lightning.models.reference import AdapterReference, FrozenReference
from kto_lightning.module import KTOModule
from kto_lightning.parity.agreement import LATER
from tests.support.factories import (
    make_tokenizer,
    plain_records,
    save_adapter,
    save_model,
    write_jsonl,
)
from tests.support.loggers import RowLogger
from tests.support.plain_step import plain_step, true_step
from tests.support.steps import (
    DESIRABLE_WEIGHT,
    LENGTHS,
    MIXED,
    RECORD_WEIGHTS,
    UNDESIRABLE_WEIGHT,
    Examples,
    assert_same_step,
    fit_steps,
    make_module,
    make_policy_and_reference,
    step_batch,
)
from tests.support.tolerances import EPS, FACTOR, assert_same_numbers

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("max_tokens", [10**6, 30])
@pytest.mark.parametrize(
    "desirable",
    [MIXED.desirable.tolist(), [True] * 6, [False] * 6],
    ids=["mixed", "desirable", "undesirable"],
)
def test_a_step_is_that_of_plain_pytorch(desirable: list[bool], max_tokens: int, loss: str) -> None:
    examples = Examples(LENGTHS, desirable)
    module = make_module(loss=loss, beta=0.2)
    expected, gradients = true_step(module, examples)
    _, plain = plain_step(module, examples)
    batch = step_batch(examples, max_tokens=max_tokens, paired=loss == "kto")
    assert (len(batch.micro_batches) == 1) is (max_tokens > 100)
    result = fit_steps(module, batch)
    assert_same_numbers({name: result.row[name] for name in expected}, expected, beta=0.2)
    absent = [n for n in ("desirable", "undesirable") if f"train/logps/{n}" not in expected]
    assert all(f"train/reward/{name}" not in result.row for name in absent)
    assert ("train/reward/margin" in result.row) is (not absent)
    errs = max(float((plain[name] - gradient).abs().max()) for name, gradient in gradients.items())
    for name, gradient in gradients.items():
        # What is seen of our gradient is a movement, as exact as the weights around it.
        rounding = EPS * float(result.weights[name].abs().max()) / 0.05
        difference = (result.movements[name].double() / -0.05 - gradient).abs().max()
        assert float(difference) <= FACTOR * errs + rounding, name


def test_z0_is_positive_in_these_tests_and_is_clamped() -> None:
    """Otherwise they would not test it."""
    row = fit_steps(make_module(), step_batch()).row
    assert row["train/z0"] == row["train/z0_raw"] > 0.5
    module = make_module()
    assert isinstance(module.reference, FrozenReference)
    module.policy, module.reference.policy = module.reference.policy, module.policy
    module.policy.requires_grad_(True)
    row = fit_steps(module, step_batch()).row
    assert row["train/z0"] == 0.0 > -0.5 > row["train/z0_raw"]


@pytest.mark.parametrize("kind", ["llama", "lora", "padded"])
def test_micro_batches_and_ranks_do_not_change_the_step(kind: str) -> None:
    packed = make_policy_and_reference(kind)[0].shares_prompts
    assert packed is (kind != "padded")
    whole = fit_steps(make_module(kind), step_batch(packed=packed))
    assert whole.row["train/tokens"] == MIXED.num_tokens
    assert whole.row["step"] == 1

    @settings(max_examples=6, deadline=None)
    @given(
        max_tokens=st.integers(1, 2 * MIXED.num_tokens),
        order=st.permutations(range(len(MIXED))),
        num_ranks=st.integers(1, 4),
    )
    def any_cut(max_tokens: int, order: list[int], num_ranks: int) -> None:
        batch = step_batch(max_tokens=max_tokens, order=order, num_ranks=num_ranks, packed=packed)
        assert_same_step(fit_steps(make_module(kind), batch), whole)

    any_cut()


def test_fillers_change_nothing() -> None:
    few = Examples(LENGTHS[:2], [True, False])
    batch = step_batch(few, num_ranks=5)
    is_real = [not micro_batch.is_filler.any() for micro_batch in batch.micro_batches]
    assert is_real == [True, True, False, False, False]
    for micro_batch in batch.micro_batches[2:]:
        micro_batch.weight += 7.0  # their weight is zero, but that is not what keeps them out
    assert_same_step(fit_steps(make_module(), batch), fit_steps(make_module(), step_batch(few)))


@pytest.mark.parametrize("index", range(2))
def test_a_batch_of_one(index: int) -> None:
    one = Examples(LENGTHS[index : index + 1], [index == 0])
    module = make_module()
    expected, _ = true_step(module, one)
    row = fit_steps(module, step_batch(one)).row
    assert_same_numbers({name: row[name] for name in expected}, expected)
    assert "train/reward/margin" not in row


def test_a_smaller_last_batch_is_divided_by_its_own_size() -> None:
    few = Examples(LENGTHS[:2], [True, False])
    module, alone = make_module(learning_rate=0.0), make_module(learning_rate=0.0)
    both = fit_steps(module, step_batch(max_tokens=40), step_batch(few))
    assert both.rows[1] == {**fit_steps(alone, step_batch(few)).row, "step": 2}


def test_micro_batches_do_not_change_several_steps() -> None:
    steps = [step_batch(), step_batch(Examples(LENGTHS[::-1], [True, False] * 3))]
    cut = [
        step_batch(max_tokens=25),
        step_batch(Examples(LENGTHS[::-1], [True, False] * 3), max_tokens=40),
    ]
    settings_ = {"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1}
    whole = fit_steps(make_module(**settings_), *steps, max_epochs=2)
    found = fit_steps(make_module(**settings_), *cut, max_epochs=2)
    # Adam divides by |g|, which turns rounding where a gradient is 0 into a step: only the numbers.
    for row, other in zip(found.rows, whole.rows, strict=True):
        assert_same_numbers(row, other, relative=LATER)
    assert [row["step"] for row in whole.rows] == [1, 2, 3, 4]


@pytest.mark.parametrize("max_tokens", [10**6, 25], ids=["one", "several"])
def test_activation_checkpointing_changes_nothing(max_tokens: int) -> None:
    module = make_module()
    assert module.policy is not None
    module.policy.causal_lm.gradient_checkpointing_enable(CHECKPOINTING)
    assert_same_step(
        fit_steps(module, step_batch(max_tokens=max_tokens)), fit_steps(make_module(), step_batch())
    )


def test_weights_of_records_and_classes_multiply() -> None:
    weights = torch.cat([m.weight for m in step_batch().micro_batches])
    expected = [
        weight * (DESIRABLE_WEIGHT if desirable else UNDESIRABLE_WEIGHT)
        for weight, desirable in zip(RECORD_WEIGHTS, MIXED.desirable, strict=True)
    ]
    assert weights.tolist() == expected


@pytest.mark.parametrize("factor", [0.1, 10.0], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("max_tokens", [10**6, 30], ids=["one", "several"])
def test_the_norm_reported_is_that_before_clipping(max_tokens: int, factor: float) -> None:
    free = fit_steps(make_module(), step_batch())
    limit = factor * free.row["train/grad_norm"]
    clipped = fit_steps(make_module(gradient_clip_norm=limit), step_batch(max_tokens=max_tokens))
    assert clipped.row["train/grad_norm"] == pytest.approx(free.row["train/grad_norm"], rel=1e-5)
    moved = torch.stack([m.square().sum() for m in clipped.movements.values()]).sum().sqrt()
    expected = 0.05 * min(limit, free.row["train/grad_norm"])
    assert float(moved) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "lora"])
def test_checkpoint_and_optimizer_do_not_hold_the_reference(kind: str) -> None:
    module = make_module(kind)
    assert isinstance(module.reference, FrozenReference)
    assert all(name.startswith("policy.") for name in module.state_dict())
    theirs = {id(p) for p in module.reference.policy.parameters()}
    assert not theirs & {id(p) for p in module.parameters()}
    before = [p.clone() for p in module.reference.policy.parameters()]
    fit_steps(module, step_batch())
    optimizer = module.optimizers()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in module.parameters() if p.requires_grad}
    after = module.reference.policy.parameters()
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    names = {f"policy.{n}" for n, p in module.policy.named_parameters() if p.requires_grad}
    kept = set(checkpoint["state_dict"])
    assert names <= kept
    if kind == "lora":
        assert kept == names


def test_mixed_bfloat16_is_close() -> None:
    exact = fit_steps(make_module(), step_batch()).row
    mixed = fit_steps(make_module(), step_batch(max_tokens=40), precision="bf16-mixed").row
    for name in ("train/loss", "train/logps/desirable", "train/logps/undesirable"):
        assert mixed[name] == pytest.approx(exact[name], rel=0.02)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("files")
    model = save_model(root / "model", "qwen2", make_tokenizer())
    padded = save_model(root / "padded", "mamba", make_tokenizer(), seed=1)
    records = [record | {"label": i % 2 == 0} for i, record in enumerate(plain_records(7))]
    train = write_jsonl(root / "train.jsonl", records)
    adapter = save_adapter(root / "adapter", model)
    return {"model": model, "padded": padded, "adapter": adapter, "train": train}


def fit_files(files: dict[str, Path], policy: str = "model", **settings: Any) -> tuple:
    rows = RowLogger()
    torch.manual_seed(0)
    max_tokens = settings.pop("max_tokens", 16384)
    module = KTOModule(str(files[policy]), learning_rate=1e-3, **settings)
    data = KTODataModule(
        train=str(files["train"]), batch_size=4, max_tokens=max_tokens, preprocessing_workers=1
    )
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=rows,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data)
    return module, rows.rows


def test_from_files(files: dict[str, Path]) -> None:
    module, rows = fit_files(files)
    assert not module.route_obstacles
    assert isinstance(module.reference, FrozenReference)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    first = rows[0]
    # The reference is the policy as it was: every ratio is 0, so that every σ is 1/2.
    assert abs(first["train/z0_raw"]) < 1e-4
    assert abs(first["train/reward/desirable"]) < 1e-5
    margins = [row["train/reward/margin"] for row in rows if "train/reward/margin" in row]
    assert margins[-1] > abs(margins[0])
    again, cut = fit_files(files, max_tokens=100, activation_checkpointing=True)
    for row, other in zip(rows, cut, strict=True):
        assert_same_numbers(row, other, relative=LATER)
    assert again.policy.training


@pytest.mark.parametrize("kind", ["new", "given", "bfloat16"])
def test_adapters_from_files(kind: str, files: dict[str, Path]) -> None:
    settings_ = {"new": {"lora": LoRA(r=4)}, "given": {"policy": "adapter"}}.get(
        kind, {"policy": "adapter", "dtype": "bfloat16"}
    )
    module, rows = fit_files(files, **settings_)
    assert isinstance(module.reference, AdapterReference)
    trained = [n for n, p in module.policy.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in n and ".default." in n for n in trained)
    assert all(p.dtype == torch.float32 for p in module.policy.parameters() if p.requires_grad)
    assert abs(rows[0]["train/reward/desirable"]) < 1e-5
    rewards = [row.get("train/reward/desirable", 0.0) for row in rows]
    assert max(abs(reward) for reward in rewards) > 1e-3
    if kind == "bfloat16":
        assert module.policy.causal_lm.dtype == torch.bfloat16


def test_a_reference_that_cannot_share_prompts_makes_the_policy_run_padded(
    files: dict[str, Path],
) -> None:
    module, rows = fit_files(files, reference=str(files["padded"]))
    assert module.policy.route == "padded"
    assert module.route_obstacles == {"packed": "its reference cannot be run so"}
    assert all(math.isfinite(row["train/loss"]) for row in rows)
    assert abs(rows[0]["train/reward/desirable"]) > 0.01


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"beta": 0.0}, r"--model\.beta must be a number above 0, got 0"),
        ({"beta": math.nan}, r"--model\.beta .* got nan"),
        ({"learning_rate": -1.0}, r"--model\.learning_rate must be at least 0, got -1"),
        ({"learning_rate": math.inf}, r"--model\.learning_rate"),
        ({"weight_decay": -0.1}, r"--model\.weight_decay must be at least 0"),
        ({"warmup_ratio": 1.5}, r"--model\.warmup_ratio must be at least 0 and at most 1, got 1.5"),
        ({"gradient_clip_norm": 0.0}, r"--model\.gradient_clip_norm must be a number above 0"),
        ({"optimizer": "adam"}, r"--model\.optimizer must be one of adamw, sgd.*, got adam"),
        ({"lr_schedule": "step"}, r"--model\.lr_schedule must be one of .*cosine.*, got step"),
        ({"lr_schedule": "reduce_lr_on_plateau"}, r"--model\.lr_schedule .* needs a valid"),
        ({"dtype": "bfloat16"}, r"--model\.dtype bfloat16 is for a frozen base"),
        ({"lora": LoRA(), "offload_reference": True}, r"--model\.offload_reference has nothing to"),
    ],
)
def test_bad_settings_are_refused_by_their_key(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KTOModule("unused", **settings_)
