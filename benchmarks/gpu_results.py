"""Results of the GPU acceptance: a JSON file for each stage, by commit and device.

A file is whole or absent at any moment, and written after every part: a call that is stopped loses
the part that was running, and the next call goes on from there.
"""

import hashlib
import json
import re
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gpu_parts import Part

from kto_lightning.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("kto_lightning", "kernels", "tests", "benchmarks")
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


def revision(root: Path = ROOT) -> str:
    """The commit; with a digest of the sources where they differ from it, or where Git has none."""
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    changed = _git(root, "status", "--porcelain", "--", *SOURCES)
    if commit is not None and changed == "":
        return commit
    return f"{commit or 'files'}-{_digest(root)[:8]}"


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return ended.stdout.strip() if ended.returncode == 0 else None


def _digest(root: Path) -> str:
    """Of the paths and contents of all Python files."""
    digest = hashlib.sha256()
    for path in sorted(path for source in SOURCES for path in (root / source).rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def as_file_name(text: str) -> str:
    """Lower-case letters, digits, dots and hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


class Results:
    """What is known of this commit on this device.

    Args:
        output: folder of all results.
        commit: see `revision`.
        header: device and versions (`common.describe`).
    """

    def __init__(self, output: Path, commit: str, header: dict[str, Any]) -> None:
        self.commit, self.header = commit, header
        self.device: str = header["device"]
        self.directory = output / f"{commit}_{as_file_name(self.device)}"
        name = self.device if "cuda" in header else "cpu"
        self.page = f"{as_file_name(name)}_{time.strftime('%Y-%m-%d')}.md"
        """Name of the page with all tables."""

    def of(self, part: Part) -> dict[str, Any] | None:
        """A part's result; None: it has not run."""
        return self._stage(part.stage)["parts"].get(part.name)

    def add(self, part: Part, result: dict[str, Any]) -> None:
        """Keep a part's result."""
        content = self._stage(part.stage)
        content["parts"][part.name] = result
        self._write(part.stage, content)

    def forget(self, parts: Iterable[Part]) -> None:
        """Drop the results of parts that are to run again."""
        for part in list(parts):
            content = self._stage(part.stage)
            content["parts"].pop(part.name, None)
            self._write(part.stage, content)

    def _write(self, stage: int, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=2) + "\n"
        write_whole(self._path(stage), text, what="the results")

    def rows(self, stage: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Names of a stage's parts that passed, with the results of their own files."""
        for name, result in self._stage(stage)["parts"].items():
            if result["status"] == PASSED and "result" in result:
                yield name, result["result"]["results"]

    def _path(self, stage: int) -> Path:
        return self.directory / f"stage{stage}.json"

    def _stage(self, stage: int) -> dict[str, Any]:
        path = self._path(stage)
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        return {"commit": self.commit, "header": self.header, "parts": {}}
