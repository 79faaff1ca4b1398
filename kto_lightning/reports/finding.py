"""Findings: items of the data report and of a run's verdict, for terminal, JSON and HTML."""

from dataclasses import dataclass
from typing import Literal

Grade = Literal["problem", "warning", "note", "good"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One observation, its meaning for KTO and what to do. None ends in a full stop."""

    grade: Grade
    """`problem`: training cannot work; `warning`: the result will suffer; `note`: for information;
    `good`: as it should be."""
    what: str
    meaning: str = ""
    """Whether and why it matters for KTO; begins in lower case, as `action` does. May be empty."""
    action: str = ""
    """What to do. May be empty."""

    @property
    def sentence(self) -> str:
        """The finding on one line."""
        parts = [part for part in (self.meaning, self.action) if part]
        rest = ". ".join([*parts[:1], *map(capitalize_first, parts[1:])])
        return f"{self.what}: {rest}." if rest else f"{self.what}."


def capitalize_first(text: str) -> str:
    """Capitalize the first letter, unless the first word is a name such as z0 or train/loss."""
    word = text.split(" ", 1)[0]
    return text[:1].upper() + text[1:] if word.isalpha() else text
