"""Paths on the command line: `~` is the home directory in each of them, as in a shell."""

import os
from pathlib import Path
from typing import Any

PATH_OPTIONS = (
    ("model", "policy"),
    ("model", "reference"),
    ("model", "reference_cache"),
    ("model", "adapter_base"),
    ("data", "tokenizer"),
    ("data", "chat_template"),
    (None, "ckpt_path"),
    (None, "output_dir"),
)
"""Options of `fit`, `validate` and `predict` that name a file or directory, with their groups.
Sources of records are expanded where they are found (`data/sources/`)."""


def expanded_path(text: str) -> Path:
    """An argument as a path."""
    return Path(os.path.expanduser(text))


def expand_paths(config: Any) -> None:
    """Expand the path options of a parsed config, in place."""
    for group, name in PATH_OPTIONS:
        settings = config if group is None else config[group]
        if isinstance(settings.get(name), str):
            settings[name] = os.path.expanduser(settings[name])
