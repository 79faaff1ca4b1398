"""What libraries raise over the files of a model, as messages that name the file."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kto_lightning.errors import KTOError, ModelError

_SELF_EXPLANATORY = (OSError, ValueError, ImportError, RuntimeError)
"""Exceptions whose message says what is wrong without the name of its class."""


@contextmanager
def explain_loading(name: str, what: str, *, advice: str = "") -> Iterator[None]:
    """Turn whatever a library raises over the files of a model into a message.

    Files that others have made can raise any exception in transformers, peft, tokenizers or
    safetensors. The block should hold calls of theirs only: errors of our own code stay visible.

    Args:
        name: what is loaded, a directory or a hub id.
        what: the beginning of the message, such as `the model NAME cannot be loaded`.
        advice: its end.

    Raises:
        ModelError: with the file and the reason.
    """
    try:
        yield
    except KTOError:
        raise
    except BaseException as error:
        # A panic of a library written in Rust is no `Exception`.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = reason_of_failure(name, error)
        if advice:
            reason = f"{reason.rstrip('.')}. {advice}"
        raise ModelError(f"{what}: {reason}") from error


def reason_of_failure(name: str, error: BaseException) -> str:
    """Why loading a model or tokenizer failed, in one sentence, with what to do where it is known.

    Args:
        name: what was to be loaded.
        error: what transformers raised.
    """
    if "trust_remote_code" in str(error):
        return (
            "it comes with code of its own, which has not been run. Read that code; if you trust "
            "it, give --model.trust_remote_code true (to export: --trust_remote_code)."
        )
    if "ignore_mismatched_sizes" in str(error):  # the rest of its text points to a report
        return "weights have other shapes than its config calls for. Copy the model again."
    package = _missing_package(error)
    if package is not None:
        return f"it needs {package}, which is not installed. `pip install {package}`."
    if Path(name).is_dir():
        return _unreadable_json(Path(name)) or _described(error)
    if "connect" not in str(error):
        return _described(error)
    return f"there is no directory {name} here, and the hub cannot be reached. Check the path."


def _missing_package(error: BaseException) -> str | None:
    """The package that an error asks to install; None: it is about something else."""
    if not isinstance(error, ImportError):
        return None
    asked = re.search(r"pip install ([\w.\[\]-]*\w\]?)", str(error))
    if asked is not None:
        return asked[1]
    if isinstance(error, ModuleNotFoundError) and error.name:
        return error.name.partition(".")[0]
    return None


def _described(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "its config calls for more memory than there is."
    said = first_line(error)
    known = isinstance(error, _SELF_EXPLANATORY) or type(error).__name__ in said
    return said if known else f"{type(error).__name__}: {said}"


def _unreadable_json(directory: Path) -> str | None:
    """The first JSON file of a directory that cannot be read; None: all can."""
    for path in sorted(directory.glob("*.json")):
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            return f"{path.name} is not readable JSON ({first_line(error)}). Copy it again."
        if not isinstance(content, dict):
            return f"{path.name} does not hold a JSON object. Copy it again."
    return None


def first_line(error: BaseException) -> str:
    """An error's message without the lines after its first; its class where it has none.

    A first line that only announces the next, as those of transformers' validation do, has it too.
    """
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
