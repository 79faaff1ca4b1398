"""Cache files of `datasets`, checked by their hashes when they are read; made again if damaged.

`datasets` maps them into memory as they are: a flipped byte would be another token id.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset
from filelock import FileLock

from kto_lightning.errors import DataError
from kto_lightning.files import write_whole


def load_or_make(
    make: Callable[[], Dataset],
    directory: Path,
    pattern: str,
    *,
    name: str,
    what: str,
    removed: str | None = None,
) -> Dataset:
    """The data set that `make` finds in its cache files, which are removed first if damaged.

    Their hashes are in a file `NAME.hashes` beside them. A lock keeps a second process from seeing
    files without their hashes.

    Args:
        make: reads the cache files, or writes them if there are none.
        directory: contains all cache files of the data set.
        pattern: a glob for their paths inside `directory`.
        name: of the file with the hashes.
        what: the contents of the cache, for messages.
        removed: a glob for what is removed if they are damaged; None: they alone.

    Raises:
        DataError: if the cache cannot be written.
    """
    known = directory / f"{name}.hashes"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(directory / f"{name}.lock"):
            if _hashes(directory, pattern) != _read(known):
                _remove([*directory.glob(removed or pattern), known])
                print(
                    f"warning: the cache of {what} in {directory} is damaged or incomplete. It is "
                    "made again.",
                    file=sys.stderr,
                )
            dataset = make()
            if not known.exists() or set(_read(known)) != set(_names(directory, pattern)):
                content = json.dumps(_hashes(directory, pattern), indent=1)
                write_whole(known, content + "\n", what=f"the cache of {what}")
    except OSError as error:
        raise DataError(
            f"the cache of {what} cannot be written: {error}. "
            "Free disk space, or set HF_DATASETS_CACHE to another directory."
        ) from error
    return dataset


def _names(directory: Path, pattern: str) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.glob(pattern))


def _hashes(directory: Path, pattern: str) -> dict[str, str]:
    """SHA-256 of each cache file."""
    found = {}
    for name in _names(directory, pattern):
        path = directory / name
        if path.is_file():
            with path.open("rb") as stream:
                found[name] = hashlib.file_digest(stream, "sha256").hexdigest()
        else:
            found[name] = "not a file"
    return found


def _read(known: Path) -> dict[str, str]:
    try:
        content = json.loads(known.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _remove(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
