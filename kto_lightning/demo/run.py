"""The demo: make a half-trained model, judge its answers, run `fit`, compare before and after."""

import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

import torch
from rich.console import Console
from rich.text import Text
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from kto_lightning.cli import trainer as trainer_command
from kto_lightning.demo.answers import Answer, P, draw_feedback
from kto_lightning.demo.curve import read_rewards, write_png
from kto_lightning.demo.evaluate import Sampling, Share, answer, share_good
from kto_lightning.demo.folder import Folder
from kto_lightning.demo.pretrain import NUM_STEPS, pretrain
from kto_lightning.demo.show import (
    make_console,
    show_command,
    show_rewards,
    show_samples,
    show_shares,
    shown,
)
from kto_lightning.demo.task import Problem, draw_problems
from kto_lightning.errors import KTOError, printable

NUM_HELD_OUT = 500
NUM_GOOD, NUM_BAD = 746, 254
ROUND_SIZE = 800
MAX_ROUNDS = 8
NUM_SHOWN = 10
EXPECTED_POINTS = 30.0
SAMPLING = Sampling(max_new_tokens=16)
"""About twice the longest good answer, six letters and the EOS."""


@dataclass(kw_only=True, slots=True)
class DemoRun(Generic[P]):
    """The state that the steps of a demo share."""

    folder: Folder
    seed: int
    device: torch.device
    rng: random.Random
    console: Console
    held_out: list[P]
    sampling: Sampling
    """Of the answers to `held_out`."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Duration of each step, by its name."""

    @contextmanager
    def step(self, name: str, title: str) -> Iterator[None]:
        """Print the title of a step and measure its duration."""
        self.console.print(f"\n[bold]{title}[/bold]")
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began

    def answers(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> list[Answer[P]]:
        """The answers of the model to the held-out problems."""
        return answer(model, tokenizer, self.held_out, self.sampling, seed=self.seed)

    def write_feedback(self, answers: list[Answer[P]], counts: str, *, is_chat: bool) -> None:
        """Write the answers as training records, and print how many there are and the first."""
        lines = [json.dumps(each.as_record(is_chat=is_chat)) for each in answers]
        self.folder.feedback.write_text("\n".join(lines) + "\n")
        self.console.print(f"   {counts} are in {shown(self.folder.feedback)}:")
        for line in lines[:3]:
            self.console.print(Text(printable(line)))


def begin(
    output_dir: Path, seed: int, rng: random.Random, held_out: list[P], sampling: Sampling
) -> DemoRun[P]:
    """Claim the folder of a demo.

    Raises:
        ConfigError: if it holds other files.
    """
    folder = Folder(root=output_dir)
    folder.claim()
    transformers_logging.disable_progress_bar()
    return DemoRun(
        folder=folder,
        seed=seed,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        rng=rng,
        console=make_console(),
        held_out=held_out,
        sampling=sampling,
    )


def run_demo(output_dir: Path, seed: int) -> int:
    """Run the demo; 0 if the share of good answers rose by EXPECTED_POINTS, else 1.

    Raises:
        KTOError: if the folder holds other files, or there are too few good or bad answers.
    """
    began = time.perf_counter()
    rng = random.Random(seed)
    demo = begin(output_dir, seed, rng, draw_problems(rng, NUM_HELD_OUT), SAMPLING)
    # A second thread gains little for so small a model, and costs much where cores are shared or a
    # container may use fewer than it sees.
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, tokenizer = make_model(demo)
    before = gather_feedback(demo, model, tokenizer)
    argv = fit_arguments(demo.folder, seed)
    status = run_fit(demo, argv)
    if status != 0:
        return status
    after = compare_answers(demo, before)
    demo.seconds["total"] = time.perf_counter() - began
    return conclude(demo, argv, share_good(before), share_good(after))


def make_model(demo: DemoRun[Problem]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Train the tiny model and save it."""
    with demo.step("pretrain", f"1. A half-trained tiny model (on {demo.device.type})"):

        def report(step: int, loss: float) -> None:
            if step % 100 == 0:
                demo.console.print(f"   step {step} of {NUM_STEPS}, loss {loss:.2f}")

        model, tokenizer = pretrain(demo.rng, demo.held_out, demo.device, report)
        model.save_pretrained(demo.folder.start)
        tokenizer.save_pretrained(demo.folder.start)
        demo.console.print(
            f"   {model.num_parameters():,} parameters in {shown(demo.folder.start)}"
        )
    return model, tokenizer


def gather_feedback(
    demo: DemoRun[Problem], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[Answer[Problem]]:
    """Write feedback on answers of the model; return its answers to the held-out problems.

    Raises:
        KTOError: if it gives too few good or too few bad answers.
    """
    with demo.step("feedback", "2. Feedback on its answers: good or bad"):
        answers = collect_answers(demo, model, tokenizer)
        chosen = draw_feedback(answers, demo.rng, NUM_GOOD, NUM_BAD)
        counts = f"{NUM_GOOD} good and {NUM_BAD} bad of {len(answers)} answers"
        demo.write_feedback(chosen, counts, is_chat=False)
    with demo.step("before", f"   Its answers to {NUM_HELD_OUT} held-out problems"):
        before = demo.answers(model, tokenizer)
        demo.console.print(f"   good: {share_good(before)}")
    return before


def collect_answers(
    demo: DemoRun[Problem], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[Answer[Problem]]:
    """Answers to fresh problems, in rounds until there are NUM_GOOD good and NUM_BAD bad ones.

    Raises:
        KTOError: if MAX_ROUNDS rounds do not give as many.
    """
    exclude = frozenset(problem.solution for problem in demo.held_out)
    answers: list[Answer[Problem]] = []
    good = 0
    for index in range(MAX_ROUNDS):
        problems = draw_problems(demo.rng, ROUND_SIZE, exclude)
        answers += answer(model, tokenizer, problems, SAMPLING, seed=demo.seed + 1000 * (index + 1))
        good = share_good(answers).good
        if good >= NUM_GOOD and len(answers) - good >= NUM_BAD:
            return answers
    raise KTOError(
        f"of {len(answers)} answers {good} are good, but {NUM_GOOD} good and {NUM_BAD} bad ones "
        "are needed. Try another --seed."
    )


def fit_arguments(folder: Folder, seed: int) -> list[str]:
    """The arguments of `python -m kto_lightning`. Class weights stay `auto`. One device, because
    Lightning would start this script again for a second one."""
    settings = {
        "--model.policy": folder.start,
        "--model.beta": 0.5,
        "--model.learning_rate": 3e-4,
        "--data.train": folder.feedback,
        "--data.batch_size": 32,
        "--trainer.max_epochs": 5,
        "--trainer.devices": 1,
        "--seed_everything": seed,
        "--output_dir": folder.fit,
    }
    return fit_command(settings)


def fit_command(settings: dict[str, Any]) -> list[str]:
    """`fit` with a value for each key, as arguments of `python -m kto_lightning`."""
    return ["fit", *(str(part) for pair in settings.items() for part in pair)]


def run_fit(demo: DemoRun[Any], argv: list[str]) -> int:
    """Run the command line's `fit` in this process; its exit status."""
    with demo.step("fit", "3. KTO on that feedback, with this command"):
        show_command(demo.console, argv)
        demo.console.print()
        return trainer_command.main(argv)


def compare_answers(demo: DemoRun[Problem], before: list[Answer[Problem]]) -> list[Answer[Problem]]:
    """Load the model that `fit` wrote, print the comparison, and return its answers."""
    model_dir = demo.folder.fit / "model"
    with demo.step("after", f"4. Before and after, on the {NUM_HELD_OUT} held-out problems"):
        model = AutoModelForCausalLM.from_pretrained(model_dir)
        torch.nn.Module.to(model, demo.device)
        after = demo.answers(model, AutoTokenizer.from_pretrained(model_dir))
        show_shares(demo.console, share_good(before), share_good(after))
        demo.console.print(f"\nThe first {NUM_SHOWN} of them, one answer each at temperature 1:")
        show_samples(demo.console, before[:NUM_SHOWN], after[:NUM_SHOWN])
        curves = read_rewards(demo.folder.fit / "metrics.csv")
        demo.console.print("\nRewards on the training batches, in nats, each on its own scale:")
        show_rewards(demo.console, curves)
        if write_png(curves, demo.folder.rewards_png):
            demo.console.print(f"The rewards as a plot: {shown(demo.folder.rewards_png)}")
    return after


def conclude(demo: DemoRun[Problem], argv: list[str], before: Share, after: Share) -> int:
    """Write `demo.json` and print the result; 0 if the share rose by EXPECTED_POINTS, else 1."""
    rise = 100 * (after.value - before.value)
    result = {
        "seed": demo.seed,
        "device": demo.device.type,
        "feedback": {"good": NUM_GOOD, "bad": NUM_BAD},
        "fit": argv,
        "before": before.as_dict(),
        "after": after.as_dict(),
        "rise_points": round(rise, 2),
        "seconds": {name: round(seconds, 1) for name, seconds in demo.seconds.items()},
    }
    demo.folder.result.write_text(json.dumps(result, indent=2) + "\n")
    kept = rise >= EXPECTED_POINTS
    demo.console.print(f"\nThe aligned model is in {shown(demo.folder.fit / 'model')}.")
    if not kept:
        demo.console.print(f"A rise of at least {EXPECTED_POINTS:.0f} points is expected.")
    demo.console.print(
        f"[bold {'green' if kept else 'red'}]Good answers: {before.value:.1%} before, "
        f"{after.value:.1%} after: {rise:+.1f} points in {demo.seconds['total']:.0f} s.[/]"
    )
    return 0 if kept else 1
