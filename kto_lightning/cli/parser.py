"""Parser of `fit`, `validate` and `predict`: wrong keys and values answered in one line each."""

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from inspect import unwrap
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from yaml import YAMLError

from kto_lightning.cli.settings_file import load_yaml, read_settings
from kto_lightning.data.commands import PROG
from kto_lightning.errors import ConfigError, printable
from kto_lightning.strict_yaml import RefusedYAML, check_yaml

SHORT_OPTIONS = {"--generate": "--report.generate"}
_GIVEN = ("Given value:", "Got value:")
_QUOTE = "'"
_MOST_NAMES, _SOME_NAMES = 12, 4
"""Of the settings of a class in a message: how many are all shown, how many else."""
_REFUSED_KEY = re.compile(r"Option '([^']*)' is not accepted")
_NO_SETTING = re.compile(r" has no setting '([^']*)'")
_LONG_WORD = re.compile(r"(\S{300})\S+")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_class_problems: list[str] = []
"""What parsers of classes have refused, for the parser of the option that names the class."""
_TYPES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
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

    _reads = ""
    """The settings file that is being read."""

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

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Namespace:
        _class_problems.clear()
        self._check_nesting(args or [])
        return super().parse_args(args, *rest, **kwargs)

    def _check_nesting(self, arguments: list[str]) -> None:
        """Check the values of arguments and of the environment as `check_yaml`."""
        values = [(k, v) for k, v in os.environ.items() if k.startswith(f"{self.env_prefix}_")]
        for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
            option, equals, value = argument.partition("=")
            values.append((option, value if equals else following))
        for name, value in values:
            if "\0" in value:
                self._exit(f"{name} holds a NUL character, which no path or text may.")
            try:
                check_yaml(value)
            except RefusedYAML as error:
                self._exit(f"{name}: {error}", error)
            except YAMLError:  # a text
                pass

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Namespace:
        """Read a settings file as UTF-8, whatever the locale says."""
        self._reads = os.fspath(path)
        try:
            text = read_settings(self._reads)
            self._check_groups(text)
            return self.parse_string(text, path, *args, **kwargs)
        except ConfigError as error:
            self._exit(str(error), error)
        finally:
            self._reads = ""

    def _check_groups(self, text: str) -> None:
        """Check for a group of options that is a number or a list: jsonargparse would drop it."""
        try:
            content = load_yaml(text)
        except YAMLError:
            return  # `parse_string` says so
        groups = {a.dest.partition(".")[0] for a in self._actions if "." in a.dest} | {"config"}
        for key, value in content.items() if isinstance(content, dict) else ():
            if key in groups and not (value is None or isinstance(value, (dict, str))):
                raise ConfigError(
                    f"--config {self._reads}: '{key}' must hold settings, got {value!r}."
                )

    def check_keys(self, settings: Namespace) -> None:
        """Exit with status 2 if a key is unknown, with the nearest right one, or one is missing."""
        for key, value in settings.items():
            if not self._accepts(key):
                self._exit(self._describe_unknown(key))
            if "\\x00" in repr(value):
                self._exit(f"--{key} holds a NUL character, which no path or text may.")
        for action in self._actions:
            self._check_null(action, settings)
        required = [action.dest for action in self._actions if action.required]
        missing = [f"--{key}" for key in required if settings.get(key) is None]
        if missing:
            self._exit(f"the following arguments are required: {', '.join(missing)}")

    def _check_null(self, action: Any, settings: Namespace) -> None:
        """Check for null where an option, or a setting of a class of ours, does not take it."""
        hint = getattr(action, "_typehint", None)
        if hint is None:
            return
        value, expected = settings.get(action.dest, 0), _expected(hint)
        if value is None and action.default is not None and "null" not in expected:
            self._exit(f"--{action.dest} must be {' or '.join(expected)}, got null.")
        value = value.get("init_args", value) if isinstance(value, Namespace) else value
        for kind in filter(is_dataclass, get_args(hint)):
            for setting in fields(kind):
                takes_null = "null" in _expected(setting.type)
                is_null = isinstance(value, Namespace) and value.get(setting.name, 0) is None
                if is_null and not takes_null:
                    self._exit(f"--{action.dest}.{setting.name} must not be null.")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        unknown = [] if ex else [key for key, _ in self._options() if not self._accepts(key)]
        if unknown:
            message = self._describe_unknown(unknown[0])
        elif isinstance(ex, TypeError) or 'Parser key "' in message:
            message = self._describe_wrong_value(" ".join(message.split()))
        elif self._reads:  # such as a key that is no text
            message = f"--config {self._reads}: {message}"
        if not self.exit_on_error:
            self._fail_in_class(message, ex)
        self._exit(message, ex)

    def _fail_in_class(self, message: str, ex: Exception | None) -> NoReturn:
        """Let the parser of the option that names this class name the option too."""
        keys = ", ".join(a.dest for a in self._actions if not a.dest.endswith(("help", "shtab")))
        found = _REFUSED_KEY.search(message)
        if found is not None:
            has = f"It has {keys}" if keys else "Name a class first"
            message = f" has no setting '{found[1]}'. {has}."
        elif "arguments are required: " in message:
            message = f" needs {message.rpartition(': ')[2]}. Its settings are {keys}."
        _class_problems.append(message)
        super().error(message, ex)
        raise AssertionError  # which raises

    def _exit(self, message: str, ex: Exception | None = None) -> NoReturn:
        prog = self.prog.replace(" [options]", "")
        shown = printable(shorten(" ".join(message.split())))
        print(f"error: {shown}\nhelp: {prog} --help", file=sys.stderr)
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

    def _all_actions(self) -> list[Any]:
        """The parser's own, and those of its commands."""
        commands: Any = next((a.choices for a in self._actions if a.dest == "subcommand"), None)
        parsers = commands.values() if commands else ()
        return [*self._actions, *(action for parser in parsers for action in parser._actions)]

    def _describe_wrong_value(self, message: str) -> str:
        """`--model.dtype must be float32, bfloat16 or null, got x.` for half a page of types."""
        for action in self._all_actions():
            if f'Parser key "{action.dest}"' not in message:
                continue
            name = f"--{action.dest}" if self.exit_on_error else f".{action.dest}"
            problem = next((text for text in _class_problems if text in message), None)
            hint = getattr(action, "_typehint", None)
            if problem is not None:
                return f"{name}{_explained(problem, hint)}"
            got = self._wrong_value(action.dest, message)
            if hint is not None and got is not None:
                *first, last = dict.fromkeys(_expected(hint))
                expected = f"{', '.join(first)} or {last}" if first else last
                return f"{name} must be {expected}, got {got}."
            if "Unable to load config" in message:
                return f"{name} takes a YAML file with its settings. Or write --{action.dest}.NAME."
        return self._describe_wrong_file(message)

    def _describe_wrong_file(self, message: str) -> str:
        config = self._reads or dict(self._options()).get("config")
        _, is_place, problem = message.partition('Parser key "config": ')
        if is_place:
            return f"--config {config or ''}: {problem}. Check the path.".replace(" :", ":", 1)
        if config is None or self.prog == PROG:
            return message
        _, is_syntax, problem = message.partition("Problems parsing config: ")
        if is_syntax:
            return f"--config {config} is not valid YAML: {problem}"
        return f"--config {config} holds no options such as `model: {{beta: 0.2}}`: {message}"

    def _wrong_value(self, key: str, message: str) -> str | None:
        """The value that an error is about, as it was written if it is an argument."""
        _, is_setting, rest = message.partition("NestedArg(key='")
        if is_setting:
            return f"its setting '{rest.split(_QUOTE)[0]}' alone"
        at = max(message.rfind(mark) for mark in _GIVEN)
        if at < 0:
            return None
        got = message[at:].partition(":")[2].strip()
        written = [value for option, value in self._options() if option == key]
        same = [value for value in written if value == got or _read_as(value) == got]
        return (same[-1] if same else got) or "''"


def offer_as(function: Callable, **types: Any) -> None:
    """Let parameters that take objects of Python programs be options of a type to write.

    Args:
        function: whose annotations change.
        types: of these parameters, by name.
    """
    unwrap(function).__annotations__.update(types)


def shorten(message: str) -> str:
    """A message whose longest words are cut, such as a value of a megabyte, and whose control
    characters are escape sequences to read."""
    cut = _LONG_WORD.sub(r"\1…", message)
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), cut)


def _explained(problem: str, hint: Any) -> str:
    """The problem in the words of a class that knows more of settings that it does not have."""
    unknown = _NO_SETTING.match(problem)
    kinds = [kind for kind in get_args(hint) if hasattr(kind, "explain_unknown")]
    if unknown is None or not kinds:
        return problem
    return f".{unknown[1]} {kinds[0].explain_unknown(unknown[1])}"


def _read_as(value: str) -> str | None:
    """A value as jsonargparse reads it and prints it."""
    try:
        return str(load_yaml(value))
    except YAMLError:
        return None


def _expected(hint: Any) -> list[str]:
    """The alternatives of a type, in words."""
    if get_origin(hint) in (Union, UnionType):
        return [word for part in get_args(hint) for word in _expected(part)]
    if get_origin(hint) in (list, Iterable):
        return ["a list"]
    if get_origin(hint) is dict:
        return ["a mapping"]
    if get_origin(hint) is Literal:
        return [str(choice) for choice in get_args(hint)]
    name = _TYPES.get(hint) or getattr(hint, "__name__", str(hint))
    if is_dataclass(hint):
        names = [field.name for field in fields(hint)]
        shown = names if len(names) <= _MOST_NAMES else [*names[:_SOME_NAMES], "…"]
        name += f" ({', '.join(shown)})"
    return [name]


def first_cause(error: BaseException) -> BaseException:
    """The error below jsonargparse's lists of types that a value does not fit."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
