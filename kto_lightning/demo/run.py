"""The demo's story: make a model of mixed manners, judge its answers, run `fit`, look again."""

import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from kto_lightning.cli import trainer as trainer_command
from kto_lightning.demo.curve import read_rewards, write_png
from kto_lightning.demo.evaluate import Share, answer, share_good
from kto_lightning.demo.folder import Folder
from kto_lightning.demo.pretrain import NUM_STEPS, pretrain
from kto_lightning.demo.show import (
    make_console,
    show_command,
    show_rewards,
    show_samples,
    show_shares,
)
from kto_lightning.demo.task import Answer, Problem, draw_feedback, draw_problems
from kto_lightning.errors import KTOError

NUM_HELD_OUT = 500
NUM_GOOD, NUM_BAD = 746, 254
ROUND_SIZE = 800
MAX_ROUNDS = 8
NUM_SHOWN = 10
PROMISED_POINTS = 30.0


@dataclass(kw_only=True, slots=True)
class Story:
    """What the steps of the story share."""

    folder: Folder
    seed: int
    device: torch.device
    rng: random.Random
    held_out: list[Problem]
    console: Console
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each step took, by its name."""

    @contextmanager
    def step(self, name: str, title: str) -> Iterator[None]:
        """Announce a step and take its time."""
        self.console.print(f"\n[bold]{title}[/bold]")
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began

    def answers(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Answer]:
        """What the model says to the held-out problems."""
        return answer(model, tokenizer, self.held_out, seed=self.seed)


def run_demo(output_dir: Path, seed: int) -> int:
    """Tell the whole story; 0 if the share of good answers rose by PROMISED_POINTS, else 1.

    Raises:
        KTOError: if the folder is someone else's, or no feedback can be drawn.
    """
    began = time.perf_counter()
    folder = Folder(root=output_dir)
    folder.claim()
    transformers_logging.disable_progress_bar()
    # So small a model gains little from a second thread, and loses much where cores are shared or
    # where a container may use fewer than it sees.
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    story = Story(
        folder=folder,
        seed=seed,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        rng=rng,
        held_out=draw_problems(rng, NUM_HELD_OUT),
        console=make_console(),
    )
    model, tokenizer = make_start(story)
    before = gather_feedback(story, model, tokenizer)
    argv = fit_arguments(folder, seed)
    status = run_fit(story, argv)
    if status != 0:
        return status
    after = look_again(story, before)
    story.seconds["total"] = time.perf_counter() - began
    return conclude(story, argv, share_good(before), share_good(after))


def make_start(story: Story) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Teach the tiny model its mixed manners and save it."""
    with story.step("pretrain", f"1. A tiny model of mixed manners (on {story.device.type})"):

        def report(step: int, loss: float) -> None:
            if step % 100 == 0:
                story.console.print(f"   step {step} of {NUM_STEPS}, loss {loss:.2f}")

        model, tokenizer = pretrain(story.rng, story.held_out, story.device, report)
        model.save_pretrained(story.folder.start)
        tokenizer.save_pretrained(story.folder.start)
        story.console.print(f"   {model.num_parameters():,} parameters in {story.folder.start}")
    return model, tokenizer


def gather_feedback(
    story: Story, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[Answer]:
    """Write the feedback on the model's own answers; return its answers to the held-out problems.

    Raises:
        KTOError: if it gives too few good or too few bad answers.
    """
    with story.step("feedback", "2. Thumbs up or down on its own answers"):
        answers = collect_answers(story, model, tokenizer)
        records = draw_feedback(answers, story.rng, NUM_GOOD, NUM_BAD)
        lines = [json.dumps(record) for record in records]
        story.folder.feedback.write_text("\n".join(lines) + "\n")
        story.console.print(
            f"   {NUM_GOOD} good and {NUM_BAD} bad of {len(answers)} answers are in "
            f"{story.folder.feedback}:"
        )
        for line in lines[:3]:
            story.console.print(line, markup=False)
    with story.step("before", f"   Its answers to {NUM_HELD_OUT} held-out problems"):
        before = story.answers(model, tokenizer)
        story.console.print(f"   good: {share_good(before)}")
    return before


def collect_answers(
    story: Story, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[Answer]:
    """Answers to fresh problems, in rounds until there are NUM_GOOD good and NUM_BAD bad ones.

    Raises:
        KTOError: if MAX_ROUNDS rounds do not give as many.
    """
    exclude = frozenset(problem.solution for problem in story.held_out)
    answers: list[Answer] = []
    good = 0
    for index in range(MAX_ROUNDS):
        problems = draw_problems(story.rng, ROUND_SIZE, exclude)
        answers += answer(model, tokenizer, problems, seed=story.seed + 1000 * (index + 1))
        good = share_good(answers).good
        if good >= NUM_GOOD and len(answers) - good >= NUM_BAD:
            return answers
    raise KTOError(
        f"of {len(answers)} answers {good} are good, but {NUM_GOOD} good and {NUM_BAD} bad ones "
        "are wanted. Try another --seed."
    )


def fit_arguments(folder: Folder, seed: int) -> list[str]:
    """The arguments of `python -m kto_lightning`: the class weights stay `auto`; one device,
    because a second one would start this script again."""
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
    return ["fit", *(str(part) for pair in settings.items() for part in pair)]


def run_fit(story: Story, argv: list[str]) -> int:
    """Run the command line's `fit` in this process; its exit status."""
    with story.step("fit", "3. KTO on that feedback, with this command"):
        show_command(story.console, argv)
        story.console.print()
        return trainer_command.main(argv)


def look_again(story: Story, before: list[Answer]) -> list[Answer]:
    """Open the model that `fit` wrote and show what has changed; its answers."""
    model_dir = story.folder.fit / "model"
    with story.step("after", f"4. Before and after, on the {NUM_HELD_OUT} held-out problems"):
        model = AutoModelForCausalLM.from_pretrained(model_dir)
        torch.nn.Module.to(model, story.device)
        after = story.answers(model, AutoTokenizer.from_pretrained(model_dir))
        show_shares(story.console, share_good(before), share_good(after))
        story.console.print(f"\nThe first {NUM_SHOWN} of them, one answer each at temperature 1:")
        show_samples(story.console, before[:NUM_SHOWN], after[:NUM_SHOWN])
        curves = read_rewards(story.folder.fit / "metrics.csv")
        story.console.print("\nRewards on the training batches, in nats, each on its own scale:")
        show_rewards(story.console, curves)
        if write_png(curves, story.folder.rewards_png):
            story.console.print(f"The same as a picture: {story.folder.rewards_png}")
    return after


def conclude(story: Story, argv: list[str], before: Share, after: Share) -> int:
    """Write `demo.json` and the last line; 0 if the promise is kept, else 1."""
    rise = 100 * (after.value - before.value)
    result = {
        "seed": story.seed,
        "device": story.device.type,
        "feedback": {"good": NUM_GOOD, "bad": NUM_BAD},
        "fit": argv,
        "before": before.as_dict(),
        "after": after.as_dict(),
        "rise_points": round(rise, 2),
        "seconds": {name: round(seconds, 1) for name, seconds in story.seconds.items()},
    }
    story.folder.result.write_text(json.dumps(result, indent=2) + "\n")
    kept = rise >= PROMISED_POINTS
    story.console.print(f"\nThe aligned model is in {story.folder.fit / 'model'}.")
    if not kept:
        story.console.print(f"A rise of {PROMISED_POINTS:.0f} points was promised.")
    story.console.print(
        f"[bold {'green' if kept else 'red'}]Good answers: {before.value:.1%} before, "
        f"{after.value:.1%} after: {rise:+.1f} points in {story.seconds['total']:.0f} s.[/]"
    )
    return 0 if kept else 1
