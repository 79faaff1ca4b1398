"""`RecordReader`: the records of a source, read as the settings say.

What decides how rows are read (an importer, columns of other names, what numbers mean) is decided
once for each file and column, from its first rows, and the same for a stream.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from kto_lightning.data.bad_records import join_names
from kto_lightning.data.columns import ColumnMapping, filled_keys, paths_of, unknown_path_error
from kto_lightning.data.importers import IMPORTERS, Importer, find_importer
from kto_lightning.data.labels import LabelReader, judgements_of
from kto_lightning.data.proposal.advice import advice_on
from kto_lightning.data.proposal.polarity import note_on_name
from kto_lightning.data.record_settings import RecordSettings
from kto_lightning.data.records import Record, parse_row
from kto_lightning.data.repeated import Votes
from kto_lightning.data.rows import BadRecord, Row, SkippedRow
from kto_lightning.data.sources import Source
from kto_lightning.data.strict_json import RecordError
from kto_lightning.errors import DataError

FIRST_ROWS = 100
"""Rows of a file that decide its form."""
STREAM_SAMPLE = 10_000
"""Records of a streamed hub data set whose numbers decide: reading all would download all."""


@dataclass(kw_only=True, slots=True)
class _Form:
    """The form of one file."""

    importer: Importer | None
    mapping: ColumnMapping


class RecordReader:
    """Reads the records of a source, any number of times.

    Args:
        sources: from `sources.expand`.
        settings: how rows are read as records.
        streaming: whether hub data sets are streamed; then the first `STREAM_SAMPLE` records decide
            what a number in the label column means, and a later number that is not among theirs is
            an error.
        labels_needed: whether a record without a label is bad. Otherwise it has none, and no row is
            left out: `predict` rewards every record.
    """

    def __init__(
        self,
        sources: list[Source],
        settings: RecordSettings | None = None,
        *,
        streaming: bool = False,
        labels_needed: bool = True,
    ) -> None:
        self._sources = sources
        self._settings = settings or RecordSettings()
        self._streaming = streaming
        self._labels_needed = labels_needed
        self._forms: dict[int, _Form] = {}
        self._labels = LabelReader(
            self._label_column, optional=not labels_needed, labels=self._settings.labels
        )
        self._votes: Votes | None = None

    @property
    def notes(self) -> list[str]:
        """How the files are read, where it is not by the names of their columns."""
        notes: dict[str, None] = {}
        for index in range(len(self._sources)):
            form = self._form(index)
            if form.importer is not None:
                notes[f"read as {form.importer.what}"] = None
            if form.mapping.note is not None:
                notes[form.mapping.note] = None
            label = form.mapping.paths.get("label")
            if self._settings.labels is None and isinstance(label, str):
                notes.update(dict.fromkeys(note_on_name(label)))
        labels = str(self._settings.labels or "")
        return [*notes, *([f"labels: {labels}"] if labels else [])]

    def read(self) -> Iterator[Record | BadRecord | SkippedRow]:
        """The records in the order of the files.

        Raises:
            ConfigError: if no record has the path that a setting names.
            DataError: if a source cannot be read, or there is no row in it.
        """
        if self._settings.repeated == "keep" or not self._labels_needed:
            yield from self._read()
            return
        if self._votes is None:
            votes = Votes(drop_disagreeing=self._settings.repeated == "drop_disagreeing")
            for item in self._read():
                if isinstance(item, Record):
                    votes.add(item)
            self._votes = votes
        yield from self._votes.join(self._read())

    def first_rows(self) -> list[object]:
        """The values of the first rows of each file, with all columns; none of an export that an
        importer reads."""
        forms = [self._form(index) for index in range(len(self._sources))]
        return [
            value
            for index, form in enumerate(forms)
            if form.importer is None
            for value in self._first_rows(index)
        ]

    def advice(self) -> list[str]:
        """What to do if no record can be used, a line each."""
        in_memory = any(source.path is None and not source.downloads for source in self._sources)
        names = None if in_memory else [source.name for source in self._sources]
        rows = self.first_rows()
        export = find_importer(rows) if self._settings.format is None else None
        if export is not None:  # not looked for where columns are named
            return [
                f"These rows are {IMPORTERS[export].what}, and columns are named: those of the "
                f"rows. Leave them out, or add --data.format {export}: then they are those of the "
                "records that are made of the export."
            ]
        return advice_on(rows, self._settings, names, labels_needed=self._labels_needed)

    def check_paths(self) -> None:
        """Raise ConfigError for a path of the settings at which no row read so far has anything."""
        found: dict[str, bool] = {}
        for form in self._forms.values():
            for field, is_found in form.mapping.found.items():
                found[field] = found.get(field, False) or is_found
        self._check_found(found, range(len(self._sources)))

    def _check_found(self, found: dict[str, bool], indices: Sequence[int]) -> None:
        """Raise ConfigError for a field whose path was not found in some files."""
        for field, is_found in found.items():
            if is_found or (field == "label" and not self._labels_needed):
                continue
            assert self._settings.columns is not None
            seen = (
                path
                for index in indices
                for row in self._first_rows(index)
                for path in paths_of(row)
            )
            where = join_names([self._sources[index].name for index in indices])
            raise unknown_path_error(field, getattr(self._settings.columns, field), seen, where)

    def _read(self) -> Iterator[Record | BadRecord | SkippedRow]:
        empty = True
        for index in range(len(self._sources)):
            mapping = self._form(index).mapping
            for row in self._rows(index):
                empty = False
                if isinstance(row, Row):
                    yield from self._parse(row, mapping)
                else:
                    yield row
            # A file with a column of the field's own name is of another form than the others.
            self._check_found({f: mapping.found[f] for f in mapping.hides}, [index])
        if empty:
            raise DataError(self._nothing_found())
        self.check_paths()

    def _parse(self, row: Row, mapping: ColumnMapping) -> Iterator[Record | BadRecord | SkippedRow]:
        try:
            rows = [row]
            if isinstance(row.value, dict) and mapping.renames:
                rows = [replace(row, value=value) for value in mapping.rows_of(row.value)]
            records = [
                record
                for mapped in rows
                for record in parse_row(mapped, self._labels, self._settings)
            ]
        except RecordError as problem:
            message, kind = mapping.name_columns(str(problem)), problem.kind
        except RecursionError:
            message, kind = "the record is nested too deep. Flatten or drop it.", ""
        else:
            yield from records
            return
        keys = [str(key) for key in row.value] if isinstance(row.value, dict) else []
        yield BadRecord(file=row.file, line=row.line, message=message, kind=kind, keys=keys)

    def _form(self, index: int) -> _Form:
        """The form of a file, decided by its first rows."""
        if index not in self._forms:
            rows = self._first_rows(index, raw=True)
            importer = self._importer(rows)
            self._forms[index] = _Form(importer=importer, mapping=ColumnMapping(None, ()))
            if importer is not None:
                rows = self._first_rows(index)
            self._forms[index].mapping = ColumnMapping(self._settings.columns, filled_keys(rows))
        return self._forms[index]

    def _importer(self, first_rows: list[object]) -> Importer | None:
        """The importer that the settings name, or else that of the structure of the rows. Where
        columns are named, they are those of the file."""
        named = self._settings.format
        if named is not None:
            return IMPORTERS.get(named)
        if self._settings.columns is not None and self._settings.columns.given():
            return None
        name = find_importer(first_rows)
        return None if name is None else IMPORTERS[name]

    def _first_rows(self, index: int, *, raw: bool = False) -> list[object]:
        """The values of a file's first rows, with all columns; `raw`: before an importer."""
        rows = self._sources[index].rows(streaming=self._streaming, choose=list)
        form = None if raw else self._form(index)
        if form is not None and form.importer is not None:
            rows = form.importer.records(rows)
        return [row.value for row in islice(rows, FIRST_ROWS) if isinstance(row, Row)]

    def _rows(self, index: int) -> Iterator[Row | BadRecord | SkippedRow]:
        """The rows of a file, through its importer."""
        form, source = self._form(index), self._sources[index]
        if form.importer is not None:
            return form.importer.records(source.rows(streaming=self._streaming, choose=list))
        choose = form.mapping.columns_to_read if form.mapping.paths else None
        return source.rows(streaming=self._streaming, choose=choose)

    def _label_column(self) -> Iterator[tuple[str, object]]:
        """All values of the label column, each with its place."""
        for index, source in enumerate(self._sources):
            form = self._form(index)
            if form.importer is not None:
                rows = self._rows(index)
            else:
                rows = source.rows(streaming=self._streaming, choose=form.mapping.label_columns)
            sampled = self._streaming and source.downloads
            for row in islice(rows, STREAM_SAMPLE if sampled else None):
                if isinstance(row, Row) and isinstance(row.value, dict):
                    label = form.mapping.fields_of(row.value).get("label")
                    place = f"{row.file}:{row.line}"
                    yield from ((place, value) for value in judgements_of(label))

    def _nothing_found(self) -> str:
        names = join_names([source.name for source in self._sources])
        for form in self._forms.values():
            if form.importer is not None:
                return f"{names}: {form.importer.nothing_found}"
        if all(source.is_empty for source in self._sources):
            return f"{names}: empty, 0 bytes. Check that its download or export is complete."
        return f"{names}: no record in there. Check that it is the right file."
