"""The demo on a model of one's own: does it follow instructions better after `fit`?

A program can check these instructions. The checks' verdicts on the model's own answers are the
feedback, in the proportion in which they fall.
"""

import json
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from kto_lightning.demo.answers import Answer
from kto_lightning.demo.evaluate import Sampling, answer, share_good
from kto_lightning.demo.instructions import (
    HELD_OUT_KINDS,
    Instruction,
    draw_held_out,
    draw_instructions,
)
from kto_lightning.demo.run import DemoRun, begin, fit_command, run_fit
from kto_lightning.demo.show import mark_answer, show_shares, shown
from kto_lightning.errors import ConfigError, KTOError, printable
from kto_lightning.models.tokenizer import load_tokenizer

NUM_ANSWERS = 192
NUM_HELD_OUT = 100
NUM_HELD_OUT_KINDS = 30
"""Instructions of kinds on which no feedback is given."""
MIN_OF_A_CLASS = 16
NUM_SHOWN = 6
FEEDBACK_SAMPLING = Sampling(max_new_tokens=48, temperature=0.7, top_p=0.95, batch_size=64)
CHECK_SAMPLING = Sampling(max_new_tokens=48, temperature=0.0, batch_size=64)
"""The most probable answer: before and after differ by training alone."""


@dataclass(kw_only=True, frozen=True, slots=True)
class HeldOut:
    """Instructions on which no feedback is given."""

    familiar: list[Instruction]
    """Of the trained kinds, about other topics."""
    unfamiliar: list[Instruction]
    """Of kinds that are held out."""

    @classmethod
    def draw(cls, seed: int, num_familiar: int, num_unfamiliar: int) -> "HeldOut":
        rng = random.Random(seed)
        return cls(
            familiar=draw_held_out(rng, num_familiar),
            unfamiliar=draw_held_out(rng, num_unfamiliar, kinds=HELD_OUT_KINDS),
        )

    @property
    def all(self) -> list[Instruction]:
        return self.familiar + self.unfamiliar

    @property
    def prompts(self) -> frozenset[str]:
        """Prompts to leave out of the feedback: some kinds have no topic."""
        return frozenset(each.prompt for each in self.all)


def run_on_model(output_dir: Path, model: str, seed: int, options: list[str]) -> int:
    """Run the demo on a model: a local directory, or a name that the hub's cache holds.

    Args:
        options: further options of `fit`.

    Returns:
        0, or the exit status of `fit` if it failed. Whether the share rose is told, not judged.

    Raises:
        KTOError: if the folder holds other files, the model cannot be opened, or there are too few
            good or too few bad answers.
    """
    began = time.perf_counter()
    held_out = HeldOut.draw(seed, NUM_HELD_OUT, NUM_HELD_OUT_KINDS)
    demo = begin(output_dir, seed, random.Random(seed), held_out.all, CHECK_SAMPLING)
    with demo.step("load", f"1. The model {shown(Path(model))} (on {demo.device.type})"):
        policy, tokenizer = open_model(model, demo.device)
        demo.console.print(f"   {policy.num_parameters():,} parameters")
    gather_feedback(demo, policy, tokenizer, held_out.prompts)
    with demo.step("before", f"   Its answers to {len(demo.held_out)} held-out instructions"):
        before = demo.answers(policy, tokenizer)
        demo.console.print(f"   good: {share_good(before)}")
    del policy
    argv = fit_arguments(demo, model, options)
    status = run_fit(demo, argv)
    if status != 0:
        return status
    with demo.step("after", f"4. Before and after, on the {len(demo.held_out)} held-out ones"):
        policy, tokenizer = open_model(str(demo.folder.fit / "model"), demo.device)
        after = demo.answers(policy, tokenizer)
        show_by_kind(demo, before, after)
    demo.seconds["total"] = time.perf_counter() - began
    conclude(demo, argv, held_out, before, after)
    return 0


def open_model(name: str, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer, which pads on the left.

    Raises:
        ConfigError: if there is none, or it cannot be opened.
    """
    tokenizer = load_tokenizer(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--model {name} cannot be opened to generate answers: {printable(str(error))[:300]} "
            "Give the directory of a causal language model."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    torch.nn.Module.to(model, device)
    return model.eval(), tokenizer


def gather_feedback(
    demo: DemoRun[Instruction],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    exclude: frozenset[str],
) -> None:
    """Write records of the model's answers, none to a prompt in `exclude`, and the verdicts.

    Raises:
        KTOError: if there are fewer than MIN_OF_A_CLASS good or bad ones.
    """
    with demo.step("feedback", "2. Feedback on its answers: good or bad"):
        instructions = draw_instructions(demo.rng, NUM_ANSWERS, exclude=exclude)
        answers = answer(model, tokenizer, instructions, FEEDBACK_SAMPLING, demo.seed + 1)
        good = share_good(answers).good
        if min(good, len(answers) - good) < MIN_OF_A_CLASS:
            raise KTOError(
                f"of {len(answers)} answers of the model {good} are good; at least "
                f"{MIN_OF_A_CLASS} good and {MIN_OF_A_CLASS} bad ones are needed to learn from. "
                "Try another model: one tuned on instructions, and not far better than these."
            )
        counts = f"{good} good and {len(answers) - good} bad answers"
        demo.write_feedback(answers, counts, is_chat=tokenizer.chat_template is not None)


def fit_arguments(demo: DemoRun[Instruction], model: str, options: list[str]) -> list[str]:
    """The arguments of `python -m kto_lightning`. Class weights stay `auto`."""
    settings = {
        "--model.policy": model,
        "--model.learning_rate": 2e-5,
        "--data.train": demo.folder.feedback,
        "--data.batch_size": 16,
        "--trainer.max_epochs": 1,
        "--trainer.devices": 1,
        "--seed_everything": demo.seed,
        "--output_dir": demo.folder.fit,
    }
    if demo.device.type == "cuda":
        settings["--trainer.precision"] = "bf16-mixed"
    return [*fit_command(settings), *options]


def show_by_kind(
    demo: DemoRun[Instruction], before: list[Answer[Instruction]], after: list[Answer[Instruction]]
) -> None:
    """Both shares, the shares by kind, and a few answers that changed."""
    show_shares(demo.console, share_good(before), share_good(after))
    pairs: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for old, new in zip(before, after, strict=True):
        pairs[old.problem.kind].append((old.is_good, new.is_good))
    table = Table(box=None, padding=(0, 2, 0, 0))
    for header in ("instruction", "before", "after", ""):
        table.add_column(header, justify="left" if header in ("instruction", "") else "right")
    for kind, marks in pairs.items():
        counts = [f"{sum(side)}/{len(marks)}" for side in zip(*marks, strict=True)]
        note = "no feedback on this kind" if kind in HELD_OUT_KINDS else ""
        table.add_row(kind, *counts, f"[dim]{note}[/dim]")
    demo.console.print()
    demo.console.print(table)
    changed = [(o, n) for o, n in zip(before, after, strict=True) if o.is_good != n.is_good]
    for old, new in changed[:NUM_SHOWN]:
        demo.console.print(f"\n[bold]{escape(printable(old.problem.prompt))}[/bold]")
        demo.console.print(f"   before: {mark_answer(old)}")
        demo.console.print(f"   after:  {mark_answer(new)}")


def conclude(
    demo: DemoRun[Instruction],
    argv: list[str],
    held_out: HeldOut,
    before: list[Answer[Instruction]],
    after: list[Answer[Instruction]],
) -> None:
    """Write `demo.json` and print the result."""
    count = len(held_out.familiar)
    parts = {"trained_kinds": slice(0, count), "held_out_kinds": slice(count, None)}
    result = {
        "seed": demo.seed,
        "device": demo.device.type,
        "fit": argv,
        "before": share_good(before).as_dict(),
        "after": share_good(after).as_dict(),
        "by_kinds": {
            name: {
                "before": share_good(before[part]).as_dict(),
                "after": share_good(after[part]).as_dict(),
            }
            for name, part in parts.items()
        },
        "seconds": {name: round(seconds, 1) for name, seconds in demo.seconds.items()},
    }
    demo.folder.result.write_text(json.dumps(result, indent=2) + "\n")
    old, new = share_good(before).value, share_good(after).value
    demo.console.print(f"\nThe aligned model is in {shown(demo.folder.fit / 'model')}.")
    demo.console.print(
        f"[bold]Instructions followed: {old:.1%} before, {new:.1%} after: "
        f"{100 * (new - old):+.1f} points in {demo.seconds['total']:.0f} s.[/]"
    )
