"""From what the user names to sources: files, globs, folders, hub data sets and objects."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import datasets

from kto_lightning.data.sources.files import FileSource, has_known_extension
from kto_lightning.data.sources.folders import FolderSource
from kto_lightning.data.sources.hub import HUB_NAME, HubSource
from kto_lightning.data.sources.objects import DatasetSource, FrameSource, ListSource, is_frame
from kto_lightning.data.sources.source import Source
from kto_lightning.errors import DataError

if TYPE_CHECKING:
    from typing import Protocol

    class DataFrame(Protocol):
        """A pandas DataFrame, which is no dependency."""

        @property
        def columns(self) -> object: ...
        def itertuples(self, index: bool = ..., name: str | None = ...) -> object: ...

    One: TypeAlias = str | os.PathLike[str] | datasets.Dataset | DataFrame | Source
    SourceLike: TypeAlias = One | Sequence[One] | Sequence[dict]
else:
    SourceLike = object
    """What the user may name as records: a path, a glob, a hub data set, a `datasets.Dataset`, a
    pandas DataFrame, a list of those, or a list of dicts."""

FORMS = "a path, a glob, a hub data set, a datasets.Dataset, a list of dicts or a DataFrame"


def expand(source: SourceLike) -> list[Source]:
    """The sources that the user names, with globs expanded in alphabetical order.

    Sources that `expand` has returned stay what they are.

    Raises:
        DataError: for an empty list, a directory that is no saved data set, a glob without a match,
            an unknown extension, a name that is neither a file nor has the form of a hub data
            set's, and an object of another type.
    """
    sources: list[Source] = []
    try:
        for item in items_of(source):
            sources += _expand_item(item, {found.name for found in sources})
    except OSError as error:  # a name too long, a directory without read permission
        raise DataError(f"the data files cannot be found: {error}. Check the path.") from error
    return sources


def items_of(source: SourceLike) -> list:
    """The items of a list of sources; a list of dicts, or what is no list, is one item."""
    if not isinstance(source, list | tuple):
        return [source]
    if not source:
        raise DataError("the list of data files is empty. Name at least one file or hub data set.")
    dicts = sum(isinstance(item, dict) for item in source)
    if 0 < dicts < len(source):
        raise DataError(
            "a list of records must hold dicts only, and a list of sources none; this one holds "
            f"{dicts} dicts among {len(source)} items. Give the records as a list of their own."
        )
    return [source] if dicts else list(source)


def names_of(source: SourceLike) -> str | list[str]:
    """What the user has named, as text for a report: names as given, and what objects are called.

    Raises:
        DataError: as `expand`, for objects.
    """
    items = items_of(source)
    names = [
        os.fspath(item)
        if isinstance(item, str | os.PathLike)
        else _expand_item(item, set())[0].name
        for item in items
    ]
    return names if isinstance(source, list | tuple) and items[0] is not source else names[0]


def _expand_item(item: object, taken: set[str]) -> list[Source]:
    if isinstance(item, Source):
        return [item]
    if isinstance(item, str | os.PathLike):
        return _expand_name(os.fspath(item))
    if isinstance(item, datasets.Dataset):
        return [DatasetSource(item, _unique("Dataset", taken))]
    if is_frame(item):
        return [FrameSource(item, _unique("DataFrame", taken))]
    if isinstance(item, list | tuple) and item and all(isinstance(row, dict) for row in item):
        return [ListSource(item, _unique("list", taken))]
    raise DataError(_refusal(item))


def _unique(name: str, taken: set[str]) -> str:
    number = 1 + sum(other == name or other.startswith(f"{name} ") for other in taken)
    return name if number == 1 else f"{name} {number}"


def _refusal(item: object) -> str:
    kind = type(item).__name__
    if isinstance(item, datasets.DatasetDict | datasets.IterableDatasetDict):
        splits = ", ".join(map(str, item))
        first = next(iter(item), "train")
        return (
            f"a {kind} has several splits: {splits}. Give one of them, such as dataset[{first!r}]."
        )
    if isinstance(item, datasets.IterableDataset):
        return (
            "an IterableDataset cannot be read a second time in the same order. Give its name, "
            "with streaming, or a Dataset: datasets.Dataset.from_list(list(dataset))."
        )
    if isinstance(item, dict):
        return (
            "a dict is no list of records. Give a list of dicts, or "
            "datasets.Dataset.from_dict(columns)."
        )
    return f"records cannot be read from an object of type {kind}. Give {FORMS}."


def _expand_name(item: str) -> list[Source]:
    _check_utf8(item)
    item = item if Path(item).exists() else os.path.expanduser(item)
    path = Path(item)
    if item and path.is_file():
        return [FileSource(item)]
    if item and path.is_dir():
        return [FolderSource(item)]
    if glob.has_magic(item):
        names = sorted(name for name in glob.glob(item, recursive=True) if Path(name).is_file())
        if not names:
            raise DataError(f"no file matches '{item}'. Check the pattern and the directory.")
        return [FileSource(_check_utf8(name)) for name in names]
    if HUB_NAME.fullmatch(item) and not has_known_extension(item):
        return [HubSource(item)]
    raise DataError(
        f"there is no file '{item}', and it cannot be a hub data set, which is named owner/name, "
        "owner/name:split or owner/name/config:split. Check the path."
    )


def _check_utf8(name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name!a}: the name is not UTF-8. Rename the file.") from error
    return name
