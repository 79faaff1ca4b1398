"""Files that are something else than their extension says, told by their first bytes."""

import re
import shlex

from kto_lightning.data.sources.data_file import COMPRESSIONS, DataFile
from kto_lightning.errors import DataError

TEXT_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
NUM_BYTES = 65536
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MAGIC = {
    ".gz": b"\x1f\x8b",
    ".zst": b"\x28\xb5\x2f\xfd",
    ".bz2": b"BZh",
    ".xz": b"\xfd7zXZ\0",
    ".zip": b"PK\x03\x04",
    ".parquet": b"PAR1",
}
MARKUP = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype|html|head|body|\?xml)\b", re.IGNORECASE)
ENCODINGS = {
    "UTF-32": re.compile(rb"\xff\xfe\0\0|\0\0\xfe\xff"),
    "UTF-16": re.compile(rb"\xff\xfe|\xfe\xff"),
    "UTF-16LE": re.compile(rb"[^\0]\0[^\0]\0"),
    "UTF-16BE": re.compile(rb"\0[^\0]\0[^\0]"),
}
CR_BETWEEN_OBJECTS = re.compile(rb"\}[ \t]*\r\s*\{")


def check_kind(file: DataFile) -> None:
    """Check that a file can be what its extension says.

    Raises:
        DataError: if it is a git-LFS pointer, a web page, an archive, compressed though not named
            so or the reverse, in another encoding, or has line ends that no reader takes.
        OSError or another of `UNPACKING_ERRORS`: if it cannot be read.
    """
    with open(file.path, "rb") as stream:
        start = stream.read(512)
    _check_start(file, start)
    if file.format in TEXT_FORMATS:
        if file.compression and start:
            with file.open() as stream:
                start = stream.read(NUM_BYTES)
        else:
            with open(file.path, "rb") as stream:
                start = stream.read(NUM_BYTES)
        _check_text(file, start)


def _check_start(file: DataFile, start: bytes) -> None:
    if start.startswith(LFS_POINTER):
        raise DataError(
            f"{file.name} is a git-LFS pointer: the data itself has not been downloaded. Run "
            "`git lfs pull` in its repository."
        )
    if MARKUP.match(start):
        raise DataError(_markup(file))
    found = next((suffix for suffix, magic in MAGIC.items() if start.startswith(magic)), "")
    expected = file.compression or (file.format if file.format in MAGIC else "")
    if found == expected or not start:
        return
    if found == ".zip":
        raise DataError(f"{file.name} is a zip archive. Unpack it, and name the files in it.")
    if file.compression:
        raise DataError(
            f"{file.name} is not compressed as its extension '{file.compression}' says. Rename it "
            f"to its real extension{f', {found}' if found else ''}, or download it again."
        )
    if found in COMPRESSIONS:
        raise DataError(f"{file.name} is compressed. Rename it to {file.name}{found}.")
    if found:
        raise DataError(f"{file.name} is a {found[1:]} file. Rename it so that it ends in {found}.")


def _markup(file: DataFile) -> str:
    return (
        f"{file.name} is a web page (HTML or XML), not data: perhaps an error or login page that "
        "was saved in its place. Download the file again."
    )


def _check_text(file: DataFile, start: bytes) -> None:
    if any(start.startswith(MAGIC[suffix]) for suffix in COMPRESSIONS):
        raise DataError(f"{file.name} is compressed twice. Unpack it once.")
    if MARKUP.match(start):
        raise DataError(_markup(file))
    for encoding, pattern in ENCODINGS.items():
        if pattern.match(start):
            raise DataError(
                f"{file.name} is {encoding} text, as some programs save it. Convert it to UTF-8: "
                f"{conversion(encoding, file.name)}"
            )
    if file.format in (".jsonl", ".ndjson", ".json") and (
        b"\n" not in start and CR_BETWEEN_OBJECTS.search(start)
    ):
        name = shlex.quote(file.name)
        raise DataError(
            f"{file.name}: its lines end with a carriage return (CR) alone, and JSON lines end "
            f"with a line feed (LF). Convert it: tr '\\r' '\\n' < {name} > converted{file.format}"
        )


def conversion(encoding: str, name: str) -> str:
    """The command that converts a text file to UTF-8, once it is unpacked."""
    file = DataFile(name)
    unpacked = shlex.quote(name.removesuffix(file.path.suffix) if file.compression else name)
    return f"iconv -f {encoding} -t UTF-8 {unpacked} > converted{file.format}"
