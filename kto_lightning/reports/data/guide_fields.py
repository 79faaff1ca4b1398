"""Fields of the data report that help with a file which cannot be read as it stands."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class SeenColumn:
    """One column of a file that cannot be read as it stands, or one nested path in it."""

    path: str
    type: str
    filled: int
    """Of the rows looked at."""
    example: str
    """The first value that is not blank, as JSON, shortened."""
    values: dict[str, int] | None
    """The different values as JSON, with their counts; None if they are many."""


@dataclass(kw_only=True, slots=True)
class Guide:
    """How a file that cannot be read as it stands could be, by its first rows."""

    rows: int
    """Rows looked at."""
    columns: list[SeenColumn]
    flags: list[str]
    """Options of `inspect` that map the columns, as a shell takes them."""
    fit_flags: list[str]
    """The same for `fit`, `validate` and `predict`."""
    missing: list[str]
    """What no mapping gives, a sentence each with the way out."""
    notes: list[str]
    """What else there is to know, a sentence each."""


@dataclass(kw_only=True, slots=True)
class TriedRecord:
    """A record as it would be trained."""

    place: str
    """As `file:line`."""
    desirable: bool
    weight: float
    rendered: bool
    """Whether the texts are those of its tokens; otherwise there is no tokenizer, and messages
    stand below each other."""
    prompt: str
    completion: str
    """What is trained on."""
    fault: str | None
    """Why the tokenizer cannot render it."""
