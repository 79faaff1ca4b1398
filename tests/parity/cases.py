"""What the parity tests vary, a pairwise cover of it, and the files a case is run on."""

from collections import Counter
from dataclasses import dataclass
from itertools import combinations, cycle, product
from pathlib import Path
from typing import Any, Literal

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kto_lightning.parity.trace import Inputs, Settings
from tests.support.factories import (
    chat_records,
    make_tokenizer,
    plain_records,
    save_adapter,
    save_model,
    write_jsonl,
)

AXES: dict[str, tuple[Any, ...]] = {
    "architecture": ("llama", "qwen2", "gpt2", "gemma2", "granite", "qwen2_moe"),
    "data": ("plain", "llama3", "qwen2_5", "gemma"),
    "loss": ("kto", "apo_zero_unpaired"),
    "tuning": ("full", "lora"),
    "optimizer": ("adamw", "sgd"),
    "weights": ((1.0, 1.0), (1.0, 2.94), (1.5, 0.5)),
    "schedule": (("constant", 0.0), ("linear", 0.0), ("cosine", 0.2), ("constant", 0.1)),
    "gradient_clip_norm": (None, 0.25),
    "weight_decay": (0.0, 0.1),
    "truncated": (False, True),
}
"""Values of `Case`'s fields. The two longest come first: the cover takes their full product."""

# Short enough to drop a prompt or more and to cut some completions. Qwen's template is long.
_SHORT_MAX_LENGTH = {"plain": 48, "llama3": 80, "qwen2_5": 128, "gemma": 80}
_NUM_RECORDS = 30

INVARIANT_AXES = ("architecture", "data", "loss", "tuning")
"""The axes whose full product the second invariant asks for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One comparison: what is trained, on what, and how. All of it has a counterpart in TRL."""

    architecture: str
    data: str
    """"plain", or the name of a chat template in the trl package."""
    loss: Literal["kto", "apo_zero_unpaired"]
    tuning: Literal["full", "lora"]
    optimizer: Literal["adamw", "sgd"]
    weights: tuple[float, float]
    schedule: tuple[Literal["constant", "linear", "cosine"], float]
    gradient_clip_norm: float | None
    weight_decay: float
    truncated: bool
    """Whether `max_length` is short enough to drop examples and to cut completions."""
    beta: float = 0.1
    batch_size: int = 4
    """Not a divisor of the number of records: each epoch ends in a smaller batch."""
    steps: int = 20

    def __str__(self) -> str:
        return "-".join(_short(getattr(self, name)) for name in AXES)

    @property
    def learning_rate(self) -> float:
        """Large enough that 20 steps move weights by 1e-3 and rewards are far from rounding."""
        return 3e-4 if self.optimizer == "adamw" else 5e-2

    @property
    def max_length(self) -> int:
        return _SHORT_MAX_LENGTH[self.data] if self.truncated else 1024

    def settings(self) -> Settings:
        schedule, warmup_ratio = self.schedule
        return Settings(
            batch_size=self.batch_size,
            steps=self.steps,
            loss=self.loss,
            beta=self.beta,
            desirable_weight=self.weights[0],
            undesirable_weight=self.weights[1],
            learning_rate=self.learning_rate,
            optimizer=self.optimizer,
            lr_schedule=schedule,
            warmup_ratio=warmup_ratio,
            weight_decay=self.weight_decay,
            gradient_clip_norm=self.gradient_clip_norm,
            max_length=self.max_length,
        )


@dataclass(kw_only=True, slots=True)
class CaseInputs(Inputs):
    """The files of a case, and the records in them."""

    records: list[dict[str, Any]]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.model)


def write_inputs(case: Case, directory: Path) -> CaseInputs:
    """Make the model, the tokenizer, the records and, for LoRA, the saved adapter of a case."""
    chat = case.data != "plain"
    tokenizer = make_tokenizer(
        chat_template=case.data if chat else None, bos=case.data != "qwen2_5"
    )
    records = chat_records(_NUM_RECORDS) if chat else plain_records(_NUM_RECORDS)
    model_dir = save_model(directory / "policy", case.architecture, tokenizer)
    adapter = None
    if case.tuning == "lora":
        adapter = str(save_adapter(directory / "adapter", model_dir))
    train = write_jsonl(directory / "train.jsonl", records)
    return CaseInputs(model=str(model_dir), adapter=adapter, train=str(train), records=records)


def pairwise_cover() -> list[Case]:
    """Cases in which every pair of values of any two axes occurs together at least once.

    So do loss, tuning and optimizer, all three: pairs alone could leave out SGD, whose weights are
    compared, for one of them.
    """
    levels = [[(name, value) for value in values] for name, values in AXES.items()]
    recipe = slice(list(AXES).index("loss"), list(AXES).index("optimizer") + 1)
    missing: set[Any] = {pair for a, b in combinations(levels, 2) for pair in product(a, b)}
    missing.update(product(*levels[recipe]))
    used: Counter[Any] = Counter()

    def gain(row: tuple[Any, ...]) -> tuple[int, int]:
        # What is missing first; of equals, the row whose pairs were used least.
        pairs = list(combinations(row, 2))
        return len(missing.intersection([*pairs, row[recipe]])), -sum(used[pair] for pair in pairs)

    cases = []
    starts = cycle(product(*levels[:2]))
    while missing:
        start = next(starts)
        best = max((start + rest for rest in product(*levels[2:])), key=gain)
        if gain(best)[0] > 0:
            missing.difference_update([*combinations(best, 2), best[recipe]])
            used.update(combinations(best, 2))
            cases.append(Case(**dict(best)))
    return cases


def full_product() -> list[Case]:
    """The full product of `INVARIANT_AXES`; the other settings take turns."""
    others = [name for name in AXES if name not in INVARIANT_AXES]
    settings = cycle([{name: getattr(case, name) for name in others} for case in pairwise_cover()])
    return [
        Case(**dict(zip(INVARIANT_AXES, values, strict=True)), **next(settings))
        for values in product(*(AXES[name] for name in INVARIANT_AXES))
    ]


def _short(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)
