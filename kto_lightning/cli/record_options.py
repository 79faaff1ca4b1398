"""Options of `inspect` that say how rows are read as records: those of `fit`, with and without
`--data.` in front, read by the parser of `fit`.

Heavy modules are imported inside functions, so that help appears at once.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kto_lightning.data.record_settings import RecordSettings

OPTIONS = {
    "columns": "columns of the file by the fields of a record, as YAML: {prompt: question}",
    "columns.prompt": "the column of the prompt: a name, or a path such as fields.prompt",
    "columns.completion": "the column of the answer",
    "columns.messages": "the column of a conversation that ends with the answer",
    "columns.label": "the column of the judgement",
    "columns.weight": "the column of a record's weight",
    "columns.system": "the column of the system prompt",
    "columns.chosen": "the column of the better answer of a pair",
    "columns.rejected": "the column of the worse answer of a pair",
    "columns.tools": "the column of a conversation's tools",
    "columns.role": "inside a message: its speaker, where that is not role or from",
    "columns.content": "inside a message: its text, where that is not content or value",
    "labels": "what labels mean, as YAML: {good: [yes], bad: [no]}",
    "labels.good": "words that mean good: '[yes, fine]'",
    "labels.bad": "words that mean bad",
    "labels.neither": "words whose records are left out",
    "labels.at_least": "ratings from which an answer is good",
    "labels.at_most": "ratings up to which an answer is bad",
    "unlabeled": "records without a label: error or skip",
    "chat": "true: make messages of prompts and answers in plain text",
    "format": "the tool that exported the file; records: read it as it is",
    "repeated": "judgements of the same answer: keep, majority or drop_disagreeing",
}
"""As `RecordSettings` and its groups have them; a test compares the two."""


OF_DATA: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("tokenizer", "chat_template"), os.path.expanduser),
    **dict.fromkeys(("batch_size", "max_length"), int),
}
"""Options of `inspect` itself that are `data` settings of `fit`."""


def add_record_options(parser: argparse.ArgumentParser) -> None:
    """Add the options, as texts that `record_settings` reads."""
    group = parser.add_argument_group(
        "how rows are read", "the options of `fit`; `--data.` in front of them may be left out"
    )
    for name, text in OPTIONS.items():
        group.add_argument(f"--{name}", dest=f"data.{name}", metavar="VALUE", help=text)
    for name in (*OPTIONS, *OF_DATA):
        dest = name if name in OF_DATA else f"data.{name}"
        kind = OF_DATA.get(name, str)
        group.add_argument(
            f"--data.{name}",
            dest=dest,
            type=kind,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )
    group.add_argument(
        "--config",
        metavar="FILE",
        help="settings of `fit` in YAML; of `data`, those above are used",
    )


def record_settings(arguments: argparse.Namespace) -> "RecordSettings":
    """The settings that the options give, over those of `--config`.

    Raises:
        SystemExit: with status 2, for a wrong value, in the words of `fit`.
        ConfigError: for settings that contradict each other, or a file that cannot be read.
    """
    given = {
        name: value
        for name in OPTIONS
        if (value := getattr(arguments, f"data.{name}", None)) is not None
    }
    from kto_lightning.data.record_settings import RecordSettings

    if not given and arguments.config is None:
        return RecordSettings()
    from kto_lightning.cli.parser import Parser, first_cause
    from kto_lightning.errors import KTOError

    parser = Parser(prog="python -m kto_lightning inspect", default_env=False)
    parser.add_class_arguments(RecordSettings, "data")
    if arguments.config is not None:
        parser.set_defaults(_settings_of_file(arguments.config))
    config = parser.parse_args([f"--data.{name}={value}" for name, value in given.items()])
    try:
        return parser.instantiate_classes(config)["data"]
    except (ValueError, TypeError) as error:
        cause = first_cause(error)
        if isinstance(cause, KTOError):
            raise cause from None
        raise


def _settings_of_file(path: str) -> dict[str, Any]:
    """The settings of records in a settings file of `fit`."""
    from yaml import YAMLError

    from kto_lightning.cli.settings_file import load_yaml, read_settings
    from kto_lightning.data.record_settings import RecordSettings
    from kto_lightning.errors import ConfigError

    try:
        content = load_yaml(read_settings(path))
    except YAMLError as error:
        raise ConfigError(f"--config {path} is not valid YAML: {error}") from error
    data = content.get("data") if isinstance(content, dict) else None
    if not isinstance(data, dict):
        raise ConfigError(f"--config {path} has no settings of `data`. Give one of `fit`.")
    names = {field.name for field in fields(RecordSettings)}
    return {f"data.{name}": value for name, value in data.items() if name in names}
