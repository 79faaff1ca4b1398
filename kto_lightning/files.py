"""Text files that are whole or not there at all."""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

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


class _whole_directory:
    """A directory that appears under its name when all of it is written, or not at all."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._part = target.with_name(f".{target.name}.part")

    def __enter__(self) -> Path:
        shutil.rmtree(self._part, ignore_errors=True)
        self._part.mkdir(parents=True)
        return self._part

    def __exit__(self, kind: type[BaseException] | None, error: Any, _: Any) -> None:
        if kind is None:
            shutil.rmtree(self._target, ignore_errors=True)
            os.replace(self._part, self._target)
            return
        shutil.rmtree(self._part, ignore_errors=True)
        # What is written in Rust (weights, tokenizers) raises errors of its own kinds.
        if issubclass(kind, OSError) or "(os error " in str(error):
            message = (
                f"{self._target} cannot be written: {error}. Make room, then the same command "
                "writes it: `export`, or `fit` with --ckpt_path last."
            )
            raise KTOError(message) from error
