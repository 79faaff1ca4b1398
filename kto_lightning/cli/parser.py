"""Parser of `fit`, `validate` and `predict`: wrong keys and values answered in one line each."""

import difflib
import sys
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

PROG = "python -m kto_lightning"
SHORT_OPTIONS = {"--generate": "--report.generate"}
_TYPES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    NoneType: "null",
}


def expand_short_options(arguments: Iterable[str]) -> list[str]:
    """The arguments with short options replaced by those that the parser knows."""
    parts = (argument.partition("=") for argument in arguments)
    return ["".join((SHORT_OPTIONS.get(name, name), *value)) for name, *value in parts]


class Parser(LightningArgumentParser):
    """Prints an error and the command for help, a line each, and exits with status 2.

    Keys, types and choices come from the parser's actions, values from the arguments; the rest is
    what jsonargparse says.
    """

    def validate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> None:
        """Answer unknown and missing keys before jsonargparse does, which names no nearest one."""
        commands = next((a.choices for a in self._actions if a.dest == "subcommand"), None)
        if isinstance(commands, dict):
            known = {"config", "subcommand", *commands}
            if any(key.partition(".")[0] not in known for key, _ in namespace.items()):
                self._exit("options come after the command. Write `fit --config FILE`.")
            for command in commands.keys() & namespace.keys(branches=True):
                commands[command].check_keys(namespace[command])
        super().validate(namespace, *args, **kwargs)

    def check_keys(self, settings: Namespace) -> None:
        """Exit with status 2 if a key is unknown, with the nearest right one, or one is missing."""
        for key, _ in settings.items():
            if not self._accepts(key):
                self._exit(self._describe_unknown(key))
        required = [action.dest for action in self._actions if action.required]
        missing = [f"--{key}" for key in required if settings.get(key) is None]
        if missing:
            self._exit(f"the following arguments are required: {', '.join(missing)}")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        unknown = [] if ex else [key for key, _ in self._options() if not self._accepts(key)]
        if unknown:
            message = self._describe_unknown(unknown[0])
        elif isinstance(ex, TypeError):
            message = self._describe_wrong_value(message)
        if not self.exit_on_error:  # the parser of a class that an option names, such as a logger
            keys = [a.dest for a in self._actions if not a.dest.endswith("help")]
            message = f"{message}. Settings of this class, as --OPTION.NAME: {', '.join(keys)}."
        self._exit(message, ex)

    def _exit(self, message: str, ex: Exception | None = None) -> NoReturn:
        prog = self.prog.replace(" [options]", "") if self.exit_on_error else PROG
        print(f"error: {' '.join(message.split())}\nhelp: {prog} --help", file=sys.stderr)
        raise SystemExit(2) from ex

    def _options(self) -> list[tuple[str, str]]:
        """Keys and values of the arguments, which jsonargparse keeps as `args`."""
        arguments = getattr(self, "args", [])
        parts = [argument.partition("=") for argument in arguments]
        return [
            (option[2:].removesuffix("+"), value if equals else following)
            for (option, equals, value), following in zip(parts, [*arguments[1:], ""], strict=False)
            if option.startswith("--")
        ]

    def _accepts(self, key: str) -> bool:
        """Whether it is an option, or a setting of the class that an option names."""
        return any(
            f"--{key}" in action.option_strings
            or (hasattr(action, "_typehint") and key.startswith(f"{action.dest}."))
            for action in self._actions
        )

    def _describe_unknown(self, key: str) -> str:
        """The nearest key has another group, a longer name or a similar spelling."""
        known = [action.dest for action in self._actions]
        near = [k for k in known if key == k.rpartition(".")[2] or k.startswith(f"{key}_")]
        near += difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        return f"there is no option '{key}'." + (f" Did you mean '--{near[0]}'?" if near else "")

    def _describe_wrong_value(self, message: str) -> str:
        """`--model.dtype must be float32, bfloat16 or null, got x.` for half a page of types."""
        for action in self._actions:
            hint = getattr(action, "_typehint", None)
            if hint is not None and f'Parser key "{action.dest}"' in message:
                *first, last = dict.fromkeys(_expected(hint))
                expected = f"{', '.join(first)} or {last}" if first else last
                name = f"--{action.dest}" if self.exit_on_error else action.dest
                values = [value for key, value in self._options() if key == action.dest]
                if len(values) == 1:
                    return f"{name} must be {expected}, got {values[0]}."
                # From a settings file or the environment: the last line has the value.
                return f"{name} must be {expected}. {message.splitlines()[-1].strip()}"
        config = dict(self._options()).get("config")
        if config is None or self.prog == PROG:
            return message
        return f"--config {config} holds no options such as `model: {{beta: 0.2}}`: {message}"


def _expected(hint: Any) -> list[str]:
    """The alternatives of a type, in words."""
    if get_origin(hint) in (Union, UnionType):
        return [word for part in get_args(hint) for word in _expected(part)]
    if get_origin(hint) is Literal:
        return [str(choice) for choice in get_args(hint)]
    name = _TYPES.get(hint) or getattr(hint, "__name__", str(hint))
    if is_dataclass(hint):
        name += f" ({', '.join(field.name for field in fields(hint))})"
    return [name]


def first_cause(error: BaseException) -> BaseException:
    """The error below jsonargparse's lists of types that a value does not fit."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
