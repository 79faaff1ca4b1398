"""The command line's parser: errors about keys and values as one line each."""

import difflib
import re
import sys
from collections.abc import Iterable
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

PROG = "python -m kto_lightning"
_UNKNOWN_OPTION = re.compile(
    r"does not accept option '(?P<option>[^']+)'|Key '(?P<key>[^']+)' is not expected"
    r"|[Uu]nrecognized arguments: --(?P<argument>[^\s=]+)|Option '(?P<part>[^']+)' is not accepted"
)
_BEFORE_COMMAND = re.compile(r"Option '[^']+' is not accepted before subcommand '(?P<command>\w+)'")
_REQUIRED = re.compile(r"required: (fit|validate|predict)\.")
_WRONG_VALUE = re.compile(r'Parser key "(?P<key>[^"]+)":(?P<reason>.*)', re.DOTALL)
_EXPECTED = re.compile(
    r"Expected an? (?:<class '(?P<type>\w+)'>|typing\.Literal\[(?P<words>.*?)\])"
)
_GOT = re.compile(r"(?:Got value|Given value): (?P<got>.*)")
_MISSING_PACKAGE = re.compile(
    r"class_path '(?:\w+\.)*(?P<name>\w+)'.*`pip install -U '(?P<package>[\w-]+)", re.DOTALL
)
_TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
SHORT = {"--generate": "--report.generate"}
"""Options that have a shorter name too."""


def spelled_out(arguments: Iterable[str]) -> list[str]:
    """The arguments, short names of options replaced by those that the parser knows."""
    parts = (argument.partition("=") for argument in arguments)
    return ["".join((SHORT.get(name, name), equals, value)) for name, equals, value in parts]


class Parser(LightningArgumentParser):
    """Answers a wrong key with the nearest right one, in a line instead of all options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = _REQUIRED.sub("required: --", message)
        if message.endswith("required: save_dir"):
            message = "this logger needs a directory. Add --trainer.logger.save_dir DIR."
        prog = self.prog.replace(" [options]", "")
        dashes = "--"
        if not prog.startswith(PROG):  # a parser within a parser: of what `--model.lora` takes
            prog, dashes = PROG, ""
        message = (
            _wrong_config(message)
            or self._wrong_key(message)
            or _wrong_value(message, dashes)
            or message
        )
        print(f"error: {message}\nhelp: {prog} --help", file=sys.stderr)
        raise SystemExit(2) from ex

    def _wrong_key(self, message: str) -> str | None:
        match = _UNKNOWN_OPTION.search(message)
        if match is None:
            return None
        wrong = next(group for group in match.groups() if group)
        known = self._known_keys()
        near = _nearest(wrong, known)
        if near is not None and not match["part"]:
            return f"there is no option '{wrong}'. Did you mean '--{near}'?"
        if match["part"]:
            return f"there is no option '{wrong}' here. There are: {', '.join(known)}."
        return f"there is no option '{wrong}'."

    def _known_keys(self) -> list[str]:
        parsers = [self]
        for action in self._actions:
            parsers.extend(getattr(action, "_name_parser_map", {}).values())
        keys = [action.dest for parser in parsers for action in parser._actions]
        return [key for key in dict.fromkeys(keys) if key not in ("help", "subcommand")]


def _nearest(wrong: str, known: list[str]) -> str | None:
    """The key without its group, such as `beta`; the beginning of a key; one spelt alike."""
    for key in known:
        if wrong == key.rpartition(".")[2] or key.startswith(f"{wrong}_"):
            return key
    return next(iter(difflib.get_close_matches(wrong, known, n=1, cutoff=0.5)), None)


def _wrong_config(message: str) -> str | None:
    """A settings file that stands in the wrong place or holds no settings."""
    match = _BEFORE_COMMAND.search(message)
    if match is not None:
        return f"options come after the command. Write `{match['command']} --config FILE`."
    kind, _, rest = message.partition(": ")
    if kind == "Problems parsing config":
        return f"--config is no YAML that can be read: {_joined_lines(rest)}. Mend the file."
    if kind == "Unexpected config":
        got = _joined_lines(rest) or "nothing"
        return f"--config must hold options, such as `model: {{beta: 0.2}}`, got {got}."
    return None


def _wrong_value(message: str, dashes: str) -> str | None:
    """`--model.dtype must be float32, bfloat16 or null, got x.` for half a page of types."""
    match = _WRONG_VALUE.search(message)
    if match is None:
        return None
    key, reason = dashes + match["key"], match["reason"]
    allowed: list[str] = []
    for expected in _EXPECTED.finditer(reason):
        if expected["type"] == "NoneType":
            allowed.append("null")
        elif expected["type"] in _TYPES:
            allowed.append(_TYPES[expected["type"]])
        elif expected["words"]:
            allowed += [word.strip("'") for word in expected["words"].split(", ")]
    got = _GOT.search(reason)
    if got is None:
        return f"{key}: {_joined_lines(reason)}"
    if not allowed or allowed == ["null"]:
        return f"{key} cannot be {got['got']}."
    *first, last = dict.fromkeys(allowed)
    choice = f"{', '.join(first)} or {last}" if first else last
    return f"{key} must be {choice}, got {got['got']}."


def reason_of(error: BaseException) -> str:
    """The reason within jsonargparse's list of all types that a value did not fit, as one line."""
    missing = _MISSING_PACKAGE.search(str(error))
    if missing is not None:
        name, package = missing["name"], missing["package"]
        return (
            f"{name} needs the package {package}, which is not installed. `pip install {package}`, "
            f"or leave {name} out: OUTPUT/metrics.csv is always written."
        )
    reasons = [_joined_lines(part) for part in str(error).split("\n  - ")[1:]]
    reasons = [reason for reason in reasons if not reason.startswith("Expected a")]
    return reasons[0] if reasons else _joined_lines(str(error))


def _joined_lines(text: str) -> str:
    return " ".join(line.strip().removeprefix("- ") for line in text.splitlines()).strip()
