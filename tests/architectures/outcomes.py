"""`python -m tests.architectures.outcomes [FAMILY ...]`: what becomes of families, kept in a file.

The file is what the sweep expects, so that a family that takes another route fails it. Loading and
probing all families, where none is named, takes some minutes; the sweep compares their numbers.
"""

import json
import sys
import tempfile
import warnings
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path

from transformers.utils import logging as transformers_logging

from tests.architectures.build import families
from tests.architectures.isolation import IsolatedError, isolated
from tests.architectures.loading import Outcome, route_of

FILE = Path(__file__).with_name("outcomes.json")
SECONDS = 120


@cache
def expected() -> dict[str, Outcome]:
    """The outcome of each family, from the file."""
    found = json.loads(FILE.read_text(encoding="utf-8"))["families"] if FILE.exists() else {}
    return {family: Outcome(**values) for family, values in found.items()}


def versions() -> dict[str, str]:
    """Of the libraries with which the file was written."""
    return json.loads(FILE.read_text(encoding="utf-8"))["versions"]


def probe(family: str) -> Outcome:
    """The outcome of a family, found in a process of its own."""
    with tempfile.TemporaryDirectory() as directory:
        return isolated(route_of, family, Path(directory), seconds=SECONDS)


def write(found: dict[str, Outcome]) -> None:
    """Write the file, a line for each family."""
    lines = [f"    {json.dumps(f)}: {json.dumps(asdict(outcome))}" for f, outcome in found.items()]
    installed = json.dumps({name: version(name) for name in ("torch", "transformers", "peft")})
    text = f'{{\n  "versions": {installed},\n  "families": {{\n' + ",\n".join(lines) + "\n  }\n}\n"
    FILE.write_text(text, encoding="utf-8")


def be_quiet() -> None:
    """Print tables alone from now on."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def main(names: list[str]) -> int:
    be_quiet()
    found = expected() if names else {}
    failures = 0
    for family in names or families():
        try:
            found[family] = probe(family)
            print(family, found[family].outcome, found[family].reason, flush=True)
        except IsolatedError as error:
            failures += 1
            print(family, "FAILED:", str(error).strip().splitlines()[-1], flush=True)
    write({family: found[family] for family in families() if family in found})
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
