"""Files and directories that are whole or absent."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kto_lightning.errors import KTOError


def write_whole(path: Path, text: str, *, what: str) -> None:
    """Write a text file atomically, with its parent directories.

    Args:
        what: the file's description in the error.

    Raises:
        KTOError: if it cannot be written. An older file in its place stays.
    """
    part = path.parent / f".{path.name}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A lone surrogate, from damaged JSON, cannot be encoded as UTF-8.
        part.write_text(text, encoding="utf-8", errors="replace")
        os.replace(part, path)
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        with suppress(OSError, ValueError):
            part.unlink()
        reason = getattr(error, "strerror", None) or error
        raise KTOError(
            f"{what} {path} cannot be written: {reason}. Choose another place, or make room."
        ) from error


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """Write a directory beside its place; it replaces `target` when the block ends without error.

    Yields:
        the directory to write to.

    Raises:
        KTOError: if it cannot be written, by the block or at its end.
    """
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        # Libraries written in Rust (safetensors, tokenizers) raise their own types for OS errors.
        if isinstance(error, OSError) or "(os error " in str(error):
            raise KTOError(
                f"{target} cannot be written: {error}. Make room, then the same command writes it: "
                "`export`, or `fit` with --ckpt_path last."
            ) from error
        raise
    shutil.rmtree(target, ignore_errors=True)
    os.replace(part, target)
