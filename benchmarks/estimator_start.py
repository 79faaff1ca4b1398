"""A small trained model and two files of feedback on what it says, made on the spot.

The model is the demo's: it sorts letters well half of the time and has bad manners besides.
"""

import random
from pathlib import Path

import torch
from inputs import write_jsonl

from kto_lightning.demo.evaluate import answer
from kto_lightning.demo.pretrain import pretrain
from kto_lightning.demo.task import REFUSALS, Answer, draw_feedback, draw_problems

NUM_GOOD, NUM_BAD = 746, 254
"""Of the feedback on letters, as in the demo."""
NUM_REFUSALS, NUM_OTHERS = 720, 80
ROUND_SIZE = 1600
MAX_ROUNDS = 20


def make_start(directory: Path, seed: int) -> tuple[Path, dict[str, Path]]:
    """Train and save the model, let it answer, write feedback; the directory and the files.

    - letters: a good answer has the letters in order. It fits its own prompt alone, so mismatched
      completions lose probability as the model learns, and z0 is mostly clamped to 0.
    - refusals: a good answer is one of three rude lines. It fits any prompt, so mismatched
      completions gain, and z0 is positive.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model, tokenizer = pretrain(rng, [], torch.device("cpu"), lambda step, loss: None)
    model.save_pretrained(directory / "start")
    tokenizer.save_pretrained(directory / "start")
    answers: list[Answer] = []
    while sum(map(is_refusal, answers)) < NUM_REFUSALS:
        if len(answers) == MAX_ROUNDS * ROUND_SIZE:
            raise SystemExit(f"fewer than {NUM_REFUSALS} of {len(answers)} answers are refusals")
        problems = draw_problems(rng, ROUND_SIZE)
        answers += answer(model, tokenizer, problems, seed=seed + len(answers))
    files = {
        "letters": draw_feedback(answers, rng, NUM_GOOD, NUM_BAD),
        "refusals": _liked_refusals(answers, rng),
    }
    return directory / "start", {
        name: write_jsonl(directory / f"{name}.jsonl", records) for name, records in files.items()
    }


def is_refusal(answer: Answer) -> bool:
    """Whether it is one of the lines that answer no prompt and so fit all."""
    return answer.completion in REFUSALS


def _liked_refusals(answers: list[Answer], rng: random.Random) -> list[dict]:
    refusals = rng.sample([each for each in answers if is_refusal(each)], NUM_REFUSALS)
    others = rng.sample([each for each in answers if not is_refusal(each)], NUM_OTHERS)
    records = [
        {"prompt": each.problem.prompt, "completion": each.completion, "label": is_refusal(each)}
        for each in refusals + others
    ]
    rng.shuffle(records)
    return records
