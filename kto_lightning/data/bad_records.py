"""The error for a source with bad records: their number, and the first few or what all share."""

from dataclasses import dataclass, field

from kto_lightning.data.rows import BadRecord
from kto_lightning.data.texts import key_names
from kto_lightning.errors import DataError

NUM_SHOWN = 5
MAX_COLUMNS = 1000


@dataclass(kw_only=True, slots=True)
class BadRecords:
    """The bad records of a source, counted; only the first few are kept."""

    count: int = 0
    first: list[BadRecord] = field(default_factory=list)
    alike: bool = True
    """Whether the same is wrong with all of them."""
    columns: dict[str, None] = field(default_factory=dict)
    """The keys of all of them, in the order of their occurrence."""

    def add(self, record: BadRecord) -> None:
        """Count a record."""
        self.count += 1
        if self.count <= NUM_SHOWN:
            self.first.append(record)
        self.alike = self.alike and _kind(record) == _kind(self.first[0])
        if len(self.columns) < MAX_COLUMNS:
            self.columns.update(dict.fromkeys(record.keys))

    def error(self, names: list[str], total: int, advice: list[str] | None = None) -> DataError:
        """The error to raise.

        Args:
            names: of the files.
            total: all records read.
            advice: what else to say if none of them can be used, a line each.
        """
        where = join_names(names)
        if self.alike and self.count == total > 1:
            first = self.first[0]
            columns = [f"The columns are {key_names(self.columns)}."] if self.columns else []
            lines = [*columns, *(advice or []), "Nothing has been trained."]
            return DataError(
                f"none of the {total:,} records can be used, in {where}, all for one reason:\n"
                f"  {first}\n" + "\n".join(lines)
            )
        verb = "record cannot" if total == 1 else "records cannot"
        lines = [f"{self.count} of {total} {verb} be used, in {where}:", *map(str, self.first)]
        if self.count > len(self.first):
            lines.append(f"… and {self.count - len(self.first)} more")
        ends = ["Fix or remove them and start again; nothing has been trained."]
        ends = [*(advice or []), *ends] if self.count == total else ends
        return DataError("\n  ".join(lines) + "\n" + "\n".join(ends))


def _kind(record: BadRecord) -> str:
    return record.kind or record.message


def join_names(names: list[str]) -> str:
    """The first three files of a source and the number of the others."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
