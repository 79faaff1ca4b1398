"""Columns that are read without being asked for, because other tools name them so.

One line in a table each; nothing is guessed beyond it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Alias:
    """Fields of a record in the columns of another tool."""

    needs: frozenset[str]
    """The columns by which the form is recognised."""
    absent: frozenset[str]
    """Columns of our own beside which it is not."""
    fields: dict[str, str | Callable[[dict], object]]
    """A path by the field, or a function of the row whose docstring names the columns."""
    replaces: tuple[str, ...] = ()
    """Columns that are not read by their own names then."""


def _instruction(row: dict) -> object:
    """instruction, input and history"""
    parts = [row.get("instruction"), row.get("input")]
    question = "\n".join(part for part in parts if isinstance(part, str) and part)
    history = row.get("history")
    if not history:
        return question
    if not isinstance(history, list) or not all(
        isinstance(turn, list) and len(turn) == 2 for turn in history
    ):
        return history  # which the parser of messages refuses with its value
    turns = [
        {"role": role, "content": text}
        for turn in history
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return [*turns, {"role": "user", "content": question}]


ALIASES = (
    # LLaMA-Factory, data/README.md: KTO data sets in its alpaca and ShareGPT forms.
    Alias(
        needs=frozenset({"instruction", "output", "kto_tag"}),
        absent=frozenset({"prompt", "completion", "messages", "conversations"}),
        fields={"prompt": _instruction, "completion": "output"},
        replaces=("history",),
    ),
    Alias(needs=frozenset({"kto_tag"}), absent=frozenset({"label"}), fields={"label": "kto_tag"}),
    # OpenAI, the file format of preference fine-tuning.
    Alias(
        needs=frozenset({"input", "preferred_output", "non_preferred_output"}),
        absent=frozenset({"prompt", "chosen", "rejected"}),
        fields={
            "prompt": "input.messages",
            "tools": "input.tools",
            "chosen": "preferred_output",
            "rejected": "non_preferred_output",
        },
        replaces=("input",),
    ),
    # ms-swift, docs on custom data sets: `messages` ends with the chosen answer.
    Alias(
        needs=frozenset({"messages", "rejected_response"}),
        absent=frozenset({"chosen", "rejected"}),
        fields={"rejected": "rejected_response"},
    ),
    Alias(
        needs=frozenset({"messages", "rejected_messages"}),
        absent=frozenset({"chosen", "rejected"}),
        fields={"chosen": "messages", "rejected": "rejected_messages"},
        replaces=("messages",),
    ),
)


def aliases_of(keys: Iterable[str]) -> list[Alias]:
    """The forms of other tools that columns have."""
    found = set(keys)
    return [alias for alias in ALIASES if alias.needs <= found and not alias.absent & found]
