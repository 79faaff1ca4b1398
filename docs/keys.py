"""All keys of `fit`, `validate` and `predict`, read from their parser."""

from argparse import SUPPRESS
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args

from docstring_parser import parse_from_object
from lightning.pytorch.cli import LightningArgumentParser

from kto_lightning.cli.lightning_cli import KTOCLI
from kto_lightning.cli.refusals import REFUSED

COMMANDS = ("fit", "validate", "predict")
_DESCRIPTIONS = {
    "config": "a YAML file of keys; may be given several times.",
    "print_config": "print all keys with their values and exit.",
    "seed_everything": "seed of the order of every epoch, of new adapters and of dropout.",
    "ckpt_path": "resume from this checkpoint (`validate` and `predict` take its weights); "
    "last: the newest whole one in `OUTPUT/checkpoints`.",
    "trainer.max_epochs": "passes over the records; null: 1, or no limit if `max_steps` is given.",
    "trainer.max_steps": "optimizer steps; -1: no limit.",
    "trainer.precision": "bf16-mixed or 32-true; null: bf16-mixed on CUDA, 32-true elsewhere.",
    "trainer.logger": "loggers beside `OUTPUT/metrics.csv`, such as TensorBoardLogger or "
    "WandbLogger.",
    "trainer.num_sanity_val_steps": "validation batches before the first step.",
    "trainer.limit_val_batches": "validation batches, a share or a number.",
    "trainer.limit_train_batches": "optimizer steps of an epoch, a share or a number.",
}
"""Descriptions that replace Lightning's, which do not apply here or are too long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """One key of a command."""

    name: str
    """Such as `model.beta`."""
    default: Any
    meaning: str
    commands: tuple[str, ...]

    @property
    def group(self) -> str:
        return self.name.partition(".")[0] if "." in self.name else ""


class _ParserBuilt(Exception):
    """Hands over the parser before the command line parses any argument."""


class _ParserCLI(KTOCLI):
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        raise _ParserBuilt(parser)


def keys() -> list[Key]:
    """All keys in the parser's order, each once, with the commands that take it."""
    found: dict[str, Key] = {}
    for command, parser in _parsers().items():
        for key in _keys_of(parser, command):
            known = found.get(key.name)
            commands = (*known.commands, command) if known else (command,)
            found[key.name] = Key(
                name=key.name, default=key.default, meaning=key.meaning, commands=commands
            )
    return list(found.values())


def _parsers() -> dict[str, Any]:
    try:
        _ParserCLI([])
    except _ParserBuilt as built:
        parser: Any = built.args[0]
    choices: dict[str, Any] = {}
    for action in parser._actions:
        choices |= getattr(action, "_name_parser_map", {})
    return {command: choices[command] for command in COMMANDS}


def _keys_of(parser: Any, command: str) -> Iterator[Key]:
    for action in parser._actions:
        if action.dest in ("help", "subcommand") or not action.option_strings:
            continue
        name = next(option for option in action.option_strings if option.startswith("--"))[2:]
        if action.default == SUPPRESS and "." not in name and name not in _DESCRIPTIONS:
            continue  # an option that reads a whole group from a file
        if name.endswith(".help"):
            continue
        yield Key(name=name, default=action.default, meaning=_meaning(action), commands=(command,))
        for kind in get_args(getattr(action, "_typehint", None)):
            if isinstance(kind, type) and is_dataclass(kind):
                yield from _fields_of(kind, name, command)


def _fields_of(kind: type, name: str, command: str) -> Iterator[Key]:
    """The keys of a group that is null unless one of them is given, such as `model.lora`."""
    texts = {entry.arg_name: entry.description for entry in parse_from_object(kind).params}
    for field in fields(kind):
        yield Key(
            name=f"{name}.{field.name}",
            default=field.default,
            meaning=_on_one_line(texts.get(field.name) or ""),
            commands=(command,),
        )


def _meaning(action: Any) -> str:
    if action.dest in _DESCRIPTIONS:
        return _DESCRIPTIONS[action.dest]
    name = action.dest.removeprefix("trainer.")
    if action.dest.startswith("trainer.") and name in REFUSED:
        return f"refused: it {REFUSED[name][1]}"
    return _on_one_line(action.help if isinstance(action.help, str) else "")


def _on_one_line(text: str) -> str:
    return " ".join(text.split())
