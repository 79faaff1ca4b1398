"""`RecordSettings`: how the rows of a source are read as records."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from kto_lightning.data.columns import Columns
from kto_lightning.data.importers import IMPORTERS
from kto_lightning.data.labels import Labels
from kto_lightning.errors import check_one_of

RECORDS = "records"
"""The `format` of files that no importer reads, whatever their structure."""
Unlabeled = Literal["error", "skip"]
Repeated = Literal["keep", "majority", "drop_disagreeing"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordSettings:
    """The fields are keys of `KTODataModule` and options of `inspect`."""

    columns: Columns | None = None
    labels: Labels | None = None
    unlabeled: Unlabeled = "error"
    chat: bool = False
    format: str | None = None
    repeated: Repeated = "keep"

    def __post_init__(self) -> None:
        check_one_of("--data.unlabeled", self.unlabeled, get_args(Unlabeled))
        if self.format is not None:
            check_one_of("--data.format", self.format, (RECORDS, *IMPORTERS))
        check_one_of("--data.repeated", self.repeated, get_args(Repeated))

    def to_plain(self) -> dict[str, Any]:
        """The settings that are not their defaults, as values that JSON can store."""
        default = asdict(RecordSettings())
        return {key: value for key, value in asdict(self).items() if value != default[key]}
