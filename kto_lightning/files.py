"""Text files that are whole or not there at all."""

import os
from contextlib import suppress
from pathlib import Path

from kto_lightning.errors import KTOError


def write_whole(path: Path, text: str, *, what: str) -> None:
    """Write a file beside its place and put it there in one go; directories are made.

    Args:
        what: names the file in the error.

    Raises:
        KTOError: if it cannot be written. What was there before stays.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A lone surrogate from broken JSON has no UTF-8.
        part.write_text(text, encoding="utf-8", errors="replace")
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise KTOError(
            f"{what} {path} cannot be written: {error.strerror or error}. Choose another place, or "
            "make room."
        ) from error
