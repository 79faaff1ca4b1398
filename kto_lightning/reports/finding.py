"""What stands out in data or in a run: said in a terminal, in JSON and on a page alike."""

from dataclasses import dataclass
from typing import Literal

Grade = Literal["problem", "warning", "note", "good"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that stands out. Its parts end without a full stop; two may be empty."""

    grade: Grade
    """`problem`: training cannot work like this; `warning`: the result will suffer; `note`: worth
    knowing; `good`: as it should be."""
    what: str
    meaning: str = ""
    """Whether and why it matters for KTO, in lower case at its beginning, as is `action`."""
    action: str = ""
    """What to do."""

    @property
    def sentence(self) -> str:
        """All of it in one line, as a terminal shows it."""
        parts = [part for part in (self.meaning, self.action) if part]
        rest = ". ".join([*parts[:1], *map(begun, parts[1:])])
        return f"{self.what}: {rest}." if rest else f"{self.what}."


def begun(text: str) -> str:
    """A text with a capital at its beginning, unless that is a name such as z0 or train/loss."""
    word = text.split(" ", 1)[0]
    return text[:1].upper() + text[1:] if word.isalpha() else text
