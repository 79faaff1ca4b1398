"""The demo: its task, data and statistics by hand; slow: a whole run, and TRL on the same data."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from kto_lightning.demo import curve, evaluate, pretrain, run, show, task
from kto_lightning.demo.answers import Answer, draw_feedback
from kto_lightning.demo.folder import MARKER, Folder
from kto_lightning.errors import ConfigError


@pytest.fixture
def rng() -> random.Random:
    return random.Random(0)


@pytest.fixture
def problem() -> task.Problem:
    return task.Problem(letters="kdpa", prompt="Sort these letters: k d p a\nAnswer:")


@pytest.mark.parametrize(
    ("completion", "good"),
    [
        (" a d k p", True),
        ("a d k p\n", True),
        (" k d p a", False),
        (" a d", False),
        (" a k d p", False),
        (" a d k p q", False),
        (" a d k p a d k p", False),
        ("adkp", False),
        (" Sort them yourself.", False),
        ("", False),
    ],
)
def test_only_the_sorted_letters_are_good(problem, completion, good):
    assert Answer(problem=problem, completion=completion).is_good is good


def test_wrong_answers_are_bad_and_the_solution_good(rng):
    for problem in task.draw_problems(rng, 300):
        assert Answer(problem=problem, completion=problem.solution).is_good
        for wrong_answer in task.WRONG_ANSWERS:
            assert not Answer(problem=problem, completion=wrong_answer(problem, rng)).is_good


def test_demonstrations_are_good_as_often_as_asked(rng):
    problems = task.draw_problems(rng, 2000)
    answers = [Answer(problem=p, completion=task.demonstrate(p, rng, 0.5)) for p in problems]
    # Four standard deviations of a share of 2,000: 0.045.
    assert evaluate.share_good(answers).value == pytest.approx(0.5, abs=0.045)


def test_problems_exclude_held_out_solutions(rng):
    held_out = task.draw_problems(rng, 200)
    exclude = frozenset(problem.solution for problem in held_out)
    fresh = task.draw_problems(rng, 3000, exclude)
    assert exclude.isdisjoint(problem.solution for problem in fresh)
    assert all(len(set(p.letters)) == len(p.letters) in task.NUM_LETTERS for p in fresh)
    assert all(" ".join(p.letters) in p.prompt for p in fresh)


def test_problems_are_determined_by_the_seed():
    drawn = [task.draw_problems(random.Random(seed), 20) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_feedback_has_the_counts_and_the_order_of_the_answers(rng):
    problems = task.draw_problems(rng, 400)
    answers = [Answer(problem=p, completion=task.demonstrate(p, rng, 0.5)) for p in problems]
    drawn = draw_feedback(answers, rng, num_good=120, num_bad=41)
    records = [answer.as_record(is_chat=False) for answer in drawn]
    assert [record["label"] for record in records].count(True) == 120
    assert [record["label"] for record in records].count(False) == 41
    given = [(answer.problem.prompt, answer.completion, answer.is_good) for answer in answers]
    places = [given.index((r["prompt"], r["completion"], r["label"])) for r in records]
    assert places == sorted(places)
    assert len(set(places)) == 161


def test_too_few_answers_of_one_kind_are_an_error(problem, rng):
    answers = [Answer(problem=problem, completion=problem.solution)] * 3
    with pytest.raises(ValueError, match="1 answers with is_good=False are needed, got 0"):
        draw_feedback(answers, rng, num_good=3, num_bad=1)


@pytest.mark.parametrize(
    ("good", "total", "low", "high"),
    [
        # z = 1.96, z² = 3.8416. 5 of 10: centre 0.5; half = 1.96 √(0.025 + 0.009604)/1.38416.
        (5, 10, 0.2366, 0.7634),
        # 0 of 10: 0 to z²/(n + z²) = 3.8416/13.8416.
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        # 460 of 500: (0.92 + 0.0038416 ± 1.96 √(0.0001472 + 0.0000038416))/1.0076832.
        (460, 500, 0.8929, 0.9407),
    ],
)
def test_wilson_interval_by_hand(good, total, low, high):
    assert evaluate.wilson_interval(good, total) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("good", "total"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_interval_checks_its_arguments(good, total):
    with pytest.raises(ValueError, match="0 <= good <= total"):
        evaluate.wilson_interval(good, total)


def test_letters_are_tokens_and_the_prompt_is_a_prefix(rng, problem):
    problems = task.draw_problems(rng, 500)
    tokenizer = pretrain.make_tokenizer([p.prompt + p.solution for p in problems])
    whole = tokenizer(problem.prompt + problem.solution)["input_ids"]
    prompt = tokenizer(problem.prompt)["input_ids"]
    assert whole[: len(prompt)] == prompt
    assert len(whole) - len(prompt) == len(problem.letters)
    assert tokenizer.decode(whole) == problem.prompt + problem.solution
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (pretrain.PAD_ID, pretrain.EOS_ID)


def test_only_completions_and_eos_have_labels(rng, problem):
    tokenizer = pretrain.make_tokenizer([problem.prompt + problem.solution])
    pairs = [(problem.prompt, problem.solution), (problem.prompt, " a")]
    input_ids, labels = pretrain.encode(tokenizer, pairs)
    assert input_ids.shape == labels.shape
    for row, (_, completion) in enumerate(pairs):
        learnt = labels[row][labels[row] != pretrain.IGNORED]
        assert tokenizer.decode(learnt) == completion + pretrain.EOS_TOKEN
        assert torch.equal(learnt, input_ids[row][labels[row] != pretrain.IGNORED])
    assert (input_ids[1, -3:] == pretrain.PAD_ID).all()


def test_learning_rate_warms_up_and_decays():
    rates = [pretrain.learning_rate(step) for step in range(pretrain.NUM_STEPS)]
    peak = rates.index(max(rates))
    assert peak == pretrain.NUM_WARMUP_STEPS - 1
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(pretrain.PEAK_LEARNING_RATE / pretrain.NUM_STEPS)


def test_answers_depend_on_the_seed_and_not_on_padding(rng):
    problems = task.draw_problems(rng, 12)
    tokenizer = pretrain.make_tokenizer([p.prompt + p.solution for p in problems])
    model = pretrain.make_model(tokenizer).eval()
    first, again, other = (
        evaluate.answer(model, tokenizer, problems, run.SAMPLING, s) for s in (1, 1, 2)
    )
    assert [answer.problem for answer in first] == problems
    assert first == again != other
    longest = max(problems, key=lambda p: len(tokenizer(p.prompt)["input_ids"]))
    shortest = min(problems, key=lambda p: len(tokenizer(p.prompt)["input_ids"]))
    alone, padded = (
        next_token_logits(model, tokenizer, prompts)
        for prompts in ([shortest.prompt], [shortest.prompt, longest.prompt])
    )
    torch.testing.assert_close(alone[0], padded[0], rtol=1e-4, atol=1e-5)


def next_token_logits(model, tokenizer, prompts):
    inputs = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
    generated = model.generate(
        **inputs,
        max_new_tokens=1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return generated.logits[0]


def test_a_folder_can_be_claimed_again(tmp_path):
    folder = Folder(root=tmp_path / "new" / "demo")
    folder.claim()
    folder.fit.mkdir()
    (folder.fit / "metrics.csv").touch()
    folder.feedback.touch()
    (folder.root / "notes.txt").write_text("mine")
    folder.claim()
    assert sorted(p.name for p in folder.root.iterdir()) == [MARKER, "notes.txt"]


def test_a_folder_with_other_files_is_not_touched(tmp_path):
    (tmp_path / "demo.json").write_text("mine")
    with pytest.raises(ConfigError, match="holds files that the demo did not write"):
        Folder(root=tmp_path).claim()
    assert [p.name for p in tmp_path.iterdir()] == ["demo.json"]
    with pytest.raises(ConfigError, match=r"demo\.json is a file"):
        Folder(root=tmp_path / "demo.json").claim()
    assert (tmp_path / "demo.json").read_text() == "mine"


def test_rewards_are_read_without_empty_cells(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(
        "step,train/reward/desirable,train/reward/undesirable,train/reward/margin\n"
        "1,0.5,-0.5,1.0\n2,0.25,,\n3,1.5,-1.0,2.5\n"
    )
    curves = curve.read_rewards(path)
    assert curves["desirable"] == curve.Curve(steps=[1, 2, 3], values=[0.5, 0.25, 1.5])
    assert curves["undesirable"] == curve.Curve(steps=[1, 3], values=[-0.5, -1.0])
    assert curves["margin"] == curve.Curve(steps=[1, 3], values=[1.0, 2.5])


def test_means_of_a_curve_by_hand():
    drawn = curve.Curve(steps=[1, 2, 3, 4, 5], values=[1.0, 3.0, 5.0, 7.0, 9.0])
    assert drawn.means(2) == [2.0, 7.0]
    assert drawn.means(9) == drawn.values
    assert curve.Curve(steps=[], values=[]).means(4) == []


def test_sparkline_spans_its_scale():
    assert curve.sparkline([0.0, 1.0, 0.5, -5.0, 5.0], 0.0, 1.0) == "▁█▅▁█"
    assert curve.sparkline([2.0, 2.0], 2.0, 2.0) == "▁▁"


def test_the_printed_command_can_be_copied():
    argv = ["fit", "--data.train", "my demo/feedback.jsonl", "--output_dir", "out"]
    assert show.command_line(argv) == (
        "python -m kto_lightning fit \\\n"
        "    --data.train 'my demo/feedback.jsonl' \\\n"
        "    --output_dir out"
    )


def test_output_fits_80_columns(problem, capsys):
    rambling = Answer(problem=problem, completion=" [bold]" + " z" * 14 + "\n\x1b[31m")
    good = Answer(problem=problem, completion=problem.solution)
    values = [math.sin(step / 9) for step in range(160)]
    curves = {name: curve.Curve(steps=list(range(1, 161)), values=values) for name in curve.REWARDS}
    console = Console(width=80)
    show.show_shares(
        console, evaluate.Share(good=50, total=100), evaluate.Share(good=100, total=100)
    )
    show.show_samples(console, [rambling], [good])
    show.show_rewards(console, curves)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "[bold] z z z" in printed
    assert "✓ a d k p" in printed
    assert "\x1b" not in printed
    assert "50.0%" in printed
    assert "100.0%" in printed


def test_help_imports_no_torch():
    code = (
        "import sys; from kto_lightning.demo.__main__ import main\n"
        "try: main(['--help'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--output_dir" in done.stdout


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory) -> tuple[Path, str]:
    """The demo, run as `make demo` runs it but into a pipe: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "kto_lightning.demo", "--output_dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_demo_end_to_end_raises_the_share_by_30_points(demo_run):
    folder, printed = demo_run
    result = json.loads((folder / "demo.json").read_text())
    assert 0.40 <= result["before"]["share"] <= 0.60
    assert result["rise_points"] >= 30
    assert result["after"]["interval_95"][0] > result["before"]["interval_95"][1]
    lines = (folder / "feedback.jsonl").read_text().splitlines()
    labels = [json.loads(line)["label"] for line in lines]
    assert (labels.count(True), labels.count(False)) == (746, 254)
    assert f"{result['after']['share']:.1%} after" in " ".join(printed.split())
    assert "python -m kto_lightning fit" in printed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # TRL's and the Trainer's own, in a run that is not ours
def test_ours_is_not_significantly_worse_than_trl(demo_run, tmp_path):
    folder, _ = demo_run
    ours = json.loads((folder / "demo.json").read_text())["after"]
    theirs = share_after_trl(folder, tmp_path)
    pooled = (ours["good"] + theirs.good) / (ours["total"] + theirs.total)
    error = math.sqrt(pooled * (1 - pooled) * (1 / ours["total"] + 1 / theirs.total))
    z = (ours["share"] - theirs.value) / error
    # One-sided, 5%: ours would be significantly worse below -1.645.
    assert z > -1.645, f"ours {ours['share']:.1%}, TRL {theirs}, z = {z:.2f}"


def share_after_trl(folder: Path, scratch: Path) -> evaluate.Share:
    """The share of good held-out answers after TRL's KTOTrainer on the demo's file and settings."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import KTOConfig, KTOTrainer

    argv = json.loads((folder / "demo.json").read_text())["fit"][1:]
    settings = dict(zip(argv[::2], argv[1::2], strict=True))
    tokenizer = AutoTokenizer.from_pretrained(folder / "start")
    model = AutoModelForCausalLM.from_pretrained(folder / "start")
    config = KTOConfig(
        output_dir=str(scratch),
        beta=float(settings["--model.beta"]),
        learning_rate=float(settings["--model.learning_rate"]),
        per_device_train_batch_size=int(settings["--data.batch_size"]),
        num_train_epochs=int(settings["--trainer.max_epochs"]),
        seed=int(settings["--seed_everything"]),
        desirable_weight=1.0,
        undesirable_weight=round(run.NUM_GOOD / run.NUM_BAD, 2),
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        gradient_checkpointing=False,
        bf16=torch.cuda.is_available(),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    records = load_dataset("json", data_files=str(folder / "feedback.jsonl"), split="train")
    trainer = KTOTrainer(
        model=model, args=config, train_dataset=records, processing_class=tokenizer
    )
    trainer.train()
    seed = int(settings["--seed_everything"])
    held_out = task.draw_problems(random.Random(seed), run.NUM_HELD_OUT)
    return evaluate.share_good(
        evaluate.answer(model.eval(), tokenizer, held_out, run.SAMPLING, seed)
    )
