"""Settings in YAML: read as UTF-8, and checked before libraries load them."""

import os
import stat
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from kto_lightning.errors import ConfigError
from kto_lightning.strict_yaml import check_yaml

MAX_BYTES = 1 << 20
_load = get_loader("yaml")


def read_settings(path: str) -> str:
    """The text of a settings file.

    Raises:
        ConfigError: if it cannot be read, is no regular file, or is not UTF-8.
    """
    try:
        path = os.path.expanduser(path)
        mode = os.stat(path).st_mode
        # A named pipe without a writer would be waited for; one of the shell's `<(…)` has one.
        if stat.S_ISDIR(mode) or (stat.S_ISFIFO(mode) and not path.startswith("/dev/fd/")):
            raise ConfigError(f"--config {path} is not a file. Give a YAML file.")
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--config {path} cannot be read: {reason}. Check the path.") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"--config {path} has more than {MAX_BYTES} bytes. Give a YAML file.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise ConfigError(
            f"--config {path}:{line}: byte {error.start} is not UTF-8. Save the file as UTF-8."
        ) from error
    return text


def load_yaml(text: str) -> Any:
    """As jsonargparse loads a text, with `YAMLError` for whatever is wrong with it."""
    check_yaml(text)
    try:
        return _load(text)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise yaml.YAMLError(f"it cannot be read: {error}") from error


set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))
