"""`Row`: one row of a source; `BadRecord`: one that cannot be used; `SkippedRow`: one left out."""

from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class Row:
    """One row as it was read, not yet parsed into records."""

    file: str
    line: int
    value: object
    from_table: bool = False
    """Whether the row comes from a table (csv, parquet, hub data set): lists of messages may be
    JSON text there, and structs are padded with None."""


@dataclass(kw_only=True, slots=True)
class BadRecord:
    """A row that cannot be trained on: its place, what is wrong and what to do."""

    file: str
    line: int
    message: str
    kind: str = ""
    """Equal where the same is wrong with two rows; without one, equal messages tell it."""
    keys: list[str] = field(default_factory=list)
    """The keys of the row."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


@dataclass(kw_only=True, slots=True)
class SkippedRow:
    """A row that is left out without being wrong, such as one without a judgement."""

    file: str
    line: int
    why: str
    """Such as `without a judgement`; rows with the same reason are counted together."""
