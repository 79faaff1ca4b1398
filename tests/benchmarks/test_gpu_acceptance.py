"""`benchmarks/gpu_acceptance.py`: parts, minutes, what is kept, and the table at the end."""

import importlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
HEADER = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0"}


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def acceptance() -> Iterator[ModuleType]:
    before = list(sys.path)
    yield importlib.import_module("gpu_acceptance")
    sys.path[:] = before


def part(name: str, *command: str, seconds: float = 10.0, **options: Any) -> Any:
    parts = importlib.import_module("gpu_parts")
    options = {"stage": 1, "runs_on_cpu": True} | options
    return parts.Part(name=name, command=command, seconds=seconds, **options)


def results_in(folder: Path, commit: str = "abc") -> Any:
    return importlib.import_module("gpu_results").Results(folder, commit, HEADER)


class Machine:
    """A clock that parts move on, and a record of what ran."""

    def __init__(self, **durations: float) -> None:
        self.durations, self.now = durations, 0.0
        self.ran: list[str] = []
        self.failing: set[str] = set()

    def run(self, part: Any, limit: float) -> dict[str, Any] | None:
        self.ran.append(part.name)
        duration = self.durations[part.name]
        self.now += min(duration, limit)
        if duration > limit:
            return None
        status = "failed" if part.name in self.failing else "passed"
        return {"status": status, "seconds": duration}

    def call(self, acceptance: ModuleType, parts: list[Any], results: Any, seconds: float) -> Any:
        options: dict[str, Any] = {"reason_to_skip": lambda part: None, "clock": lambda: self.now}
        left = acceptance.run_parts(parts, results, run=self.run, seconds=seconds, **options)
        return [part.name for part in left]


def test_a_call_goes_on_where_the_last_one_stopped(acceptance, tmp_path: Path) -> None:
    parts = [part("a"), part("b", stage=2), part("c", stage=3)]
    machine = Machine(a=10, b=10, c=10)
    assert machine.call(acceptance, parts, results_in(tmp_path), 25) == ["c"]
    assert machine.ran == ["a", "b"]
    assert machine.call(acceptance, parts, results_in(tmp_path), 25) == []
    assert machine.ran == ["a", "b", "c"]
    assert machine.call(acceptance, parts, results_in(tmp_path), 25) == []
    assert machine.ran == ["a", "b", "c"]
    machine.call(acceptance, parts, results_in(tmp_path, "another commit"), 60)
    assert machine.ran[3:] == ["a", "b", "c"]


def test_a_part_that_does_not_fit_is_left_and_a_shorter_one_runs(acceptance, tmp_path) -> None:
    parts = [part("a"), part("long", seconds=30.0), part("short", seconds=5.0)]
    machine = Machine(a=10, long=30, short=5)
    assert machine.call(acceptance, parts, results_in(tmp_path), 38) == ["long"]
    assert machine.ran == ["a", "short"]
    assert machine.now <= 38


def test_a_part_that_takes_longer_than_expected_gets_a_whole_call_once(acceptance, tmp_path):
    parts, machine = [part("a"), part("slow")], Machine(a=10, slow=100)
    assert machine.call(acceptance, parts, results_in(tmp_path), 30) == ["slow"]
    assert machine.now == 30
    results = results_in(tmp_path)
    assert results.of(parts[1]) is None
    assert machine.call(acceptance, parts, results, 30) == []
    assert results.of(parts[1])["reason"] == "did not end within the 30 s of a whole call"
    resuming = part("resuming", resumes=True)
    machine.durations["resuming"] = 100
    assert machine.call(acceptance, [resuming], results, 30) == ["resuming"]


def test_a_failure_is_kept_and_the_next_parts_run(acceptance, tmp_path: Path) -> None:
    parts, machine = [part("a"), part("b")], Machine(a=1, b=1)
    machine.failing = {"a"}
    results = results_in(tmp_path)
    assert machine.call(acceptance, parts, results, 60) == []
    assert [results.of(part)["status"] for part in parts] == ["failed", "passed"]
    assert machine.call(acceptance, parts, results, 60) == []
    assert machine.ran == ["a", "b"]
    results.forget(parts[:1])
    machine.call(acceptance, parts, results, 60)
    assert machine.ran == ["a", "b", "a"]


def test_a_result_is_written_before_the_next_part_begins(acceptance, tmp_path: Path) -> None:
    parts, machine = [part("a"), part("b")], Machine(a=1, b=1)
    results = results_in(tmp_path)
    run = machine.run

    def stopped(part: Any, limit: float) -> Any:
        if part.name == "b":
            raise KeyboardInterrupt
        return run(part, limit)

    machine.run = stopped
    with pytest.raises(KeyboardInterrupt):
        machine.call(acceptance, parts, results, 60)
    (file,) = tmp_path.glob("*/*")
    assert file == tmp_path / "abc_nvidia-h100-80gb-hbm3" / "stage1.json"
    assert list(json.loads(file.read_text())["parts"]) == ["a"]


@pytest.fixture
def place(tmp_path: Path) -> Any:
    running = importlib.import_module("gpu_running")
    return running.Place(on_gpu=False, scratch=tmp_path / "scratch")


def run_one(chosen: Any, place: Any, seconds: float = 60.0) -> Any:
    return importlib.import_module("gpu_running").run_part(chosen, place, seconds)


TESTS = """
import pytest

def test_passes(): pass

def test_fails():
    found = 3
    assert found == 4, "three is not four"

@pytest.mark.skip(reason="for no reason")
def test_is_skipped(): pass
"""


def test_a_group_of_tests_keeps_counts_tracebacks_and_reasons(place, tmp_path: Path) -> None:
    file = tmp_path / "test_group.py"
    file.write_text(TESTS)
    command = ("-m", "pytest", str(file), "-c", str(tmp_path / "none.ini"), "--rootdir")
    command += (str(tmp_path), "-p", "no:cacheprovider", "--junit-xml", "{junit}")
    (tmp_path / "none.ini").touch()
    result = run_one(part("tests", *command), place)
    assert result["status"] == "failed"
    assert result["tests"] == {"passed": 1, "failed": 1, "skipped": 1}
    (failure,) = result["failures"]
    assert failure["test"].endswith("::test_fails")
    assert "three is not four" in failure["traceback"]
    assert result["skipped_tests"][0]["reason"] == "for no reason"
    assert "1 failed, 1 passed, 1 skipped" in result["output"]
    skipped = run_one(part("tests", *command, "-k", "is_skipped"), place)
    assert (skipped["status"], skipped["reason"]) == ("skipped", "for no reason")


def test_a_command_keeps_its_result_file_and_the_end_of_its_output(place) -> None:
    code = "import json, sys; json.dump({'results': [1]}, open(sys.argv[1], 'w'))"
    good = run_one(part("good", "-c", code, "{json}"), place)
    assert (good["status"], good["result"]) == ("passed", {"results": [1]})
    assert "output" not in good
    bad = run_one(
        part("bad", "-c", "print('x' * 20000); raise SystemExit('no such kernel')"), place
    )
    assert (bad["status"], bad["exit_status"]) == ("failed", 1)
    assert bad["output"].strip().endswith("no such kernel")
    assert len(bad["output"]) == importlib.import_module("gpu_running").KEPT_OUTPUT


def test_a_part_whose_time_is_up_ends_with_all_its_processes(place, tmp_path: Path) -> None:
    file = tmp_path / "child"
    code = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        f"open({str(file)!r}, 'w').write(str(child.pid)); time.sleep(600)"
    )
    started = time.monotonic()
    assert run_one(part("endless", "-c", code), place, seconds=2.0) is None
    assert time.monotonic() - started < 30
    child = int(file.read_text())
    gone = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < gone
        time.sleep(0.02)


def test_a_part_that_resumes_is_left_while_it_has_more_to_do(place) -> None:
    command = ("-c", "import sys; print(sys.argv); raise SystemExit(3)", "{minutes}", "{model}")
    assert run_one(part("more", *command, resumes=True), place) is None
    assert run_one(part("other", *command), place)["exit_status"] == 3


def test_what_cannot_run_here_says_why(place, tmp_path: Path) -> None:
    running = importlib.import_module("gpu_running")
    assert running.reason_to_skip(part("a"), place) is None
    assert running.reason_to_skip(part("a", runs_on_cpu=False), place) == "no CUDA device"
    missing = part("a", needs=("torch", "no_such_package"))
    assert running.reason_to_skip(missing, place) == "needs no_such_package"
    given = running.Place(on_gpu=True, scratch=tmp_path, model=tmp_path)
    assert running.reason_to_skip(part("a", "{model}"), given) is None
    found = running.command_of(part("a", "{model}", "{minutes}"), given, 300.0, {})
    assert found[1:] == ["--model", str(tmp_path), "4.0"]
    marks = part("a", "-m", "{marks}")
    assert running.command_of(marks, given, 300.0, {})[-1] == "gpu"
    assert running.command_of(marks, place, 300.0, {})[-1] == "not gpu"


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True)


def test_results_are_those_of_a_commit_and_of_what_differs_from_it(tmp_path: Path) -> None:
    revision = importlib.import_module("gpu_results").revision
    source = tmp_path / "benchmarks" / "a.py"
    source.parent.mkdir()
    source.write_text("1\n")
    without = revision(tmp_path)
    assert re.fullmatch(r"files-[0-9a-f]{8}", without)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "a")
    commit = revision(tmp_path)
    assert re.fullmatch(r"[0-9a-f]{12}", commit)
    (tmp_path / "results.json").touch()
    assert revision(tmp_path) == commit
    source.write_text("2\n")
    changed = revision(tmp_path)
    assert changed.startswith(f"{commit}-")
    source.write_text("3\n")
    assert revision(tmp_path) not in (changed, commit)
    source.write_text("1\n")
    assert revision(tmp_path) == commit


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_runs_what_it_can(acceptance, tmp_path, monkeypatch, capsys) -> None:
    parts = [
        part("canary", "-c", "print('sings')"),
        part("kernel", "-c", "raise SystemExit(1)", runs_on_cpu=False),
        part("later", "-c", "pass", stage=2, seconds=1e6),
    ]
    for module in (acceptance, importlib.import_module("gpu_report")):
        monkeypatch.setattr(module, "PARTS", parts)
    arguments = ["--minutes", "1", "--output", str(tmp_path)]
    assert acceptance.main([*arguments, "--stages", "1"]) == 0
    printed = capsys.readouterr().out
    assert "skipped: no CUDA device" in printed
    assert "later" not in printed
    (report,) = tmp_path.glob("cpu_*.md")
    text = report.read_text()
    assert re.search(r"\| kernel +\| 0 +\| skipped: no CUDA device", text)
    assert re.search(r"\| canary +\| 0 +\| passed", text)
    assert f"- torch: {torch.__version__}" in text
    assert "- 1 canary: `python -c print('sings')`" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_failed_part_is_the_exit_status_of_every_call(
    acceptance, tmp_path, monkeypatch, capsys
) -> None:
    parts = [part("bad", "-c", "raise KeyError('lost')"), part("good", "-c", "pass")]
    for module in (acceptance, importlib.import_module("gpu_report")):
        monkeypatch.setattr(module, "PARTS", parts)
    arguments = ["--minutes", "1", "--output", str(tmp_path)]
    assert acceptance.main(arguments) == 1
    assert "failed: 1 bad\n  KeyError: 'lost'" in capsys.readouterr().out
    assert acceptance.main(arguments) == 1
    assert "good …" not in capsys.readouterr().out
    (report,) = tmp_path.glob("cpu_*.md")
    assert "Traceback (most recent call last)" in report.read_text()
    assert acceptance.main([*arguments, "--again"]) == 1
    assert "1 bad …" in capsys.readouterr().out


def kernel(contestant: str, ms: float, **fields: Any) -> dict[str, Any]:
    row = {"shape": [8192, 4096, 32000], "task": "gradient-free", "ceiling_share": None}
    return row | {"contestant": contestant, "total_ms": [ms, ms + 1, ms + 2]} | fields


def test_the_goals_of_the_kernels() -> None:
    goals = importlib.import_module("gpu_goals")
    rows = [
        kernel("eager", 30.0),
        kernel("TRL", 20.0),
        kernel("ours", 10.0, ceiling_share=0.9),
        kernel("ours, fused", 12.0, ceiling_share=0.8),
        {"contestant": "Liger", "task": "gradient-free", "shape": [8192, 4096, 32000]},
    ]
    (row,) = goals.kernel_rows(rows)
    assert row["head"] == "4096 x 32000"
    assert row["ours"] == "ours, 11.00 ms"
    assert row["fastest peer"] == "TRL, 21.00 ms"
    assert (row["of the ceiling"], row["goal"]) == ("90%", "reached")
    rows[2] |= {"ceiling_share": 0.84}
    assert next(goals.kernel_rows(rows))["goal"] == "missed"
    narrow = [row | {"shape": [8192, 576, 49152]} for row in rows]
    assert next(goals.kernel_rows(narrow))["goal"] == "reached"
    narrow[1] |= {"total_ms": [9.0]}
    assert next(goals.kernel_rows(narrow))["goal"] == "missed"


def test_the_dispatch_rows_that_the_kernels_propose() -> None:
    goals = importlib.import_module("gpu_goals")

    def head(width: int, fused: float, vocabulary: int = 32000) -> list[dict[str, Any]]:
        shape = [8192, width, vocabulary]
        return [kernel("ours", 10.0, shape=shape), kernel("ours, fused", fused, shape=shape)]

    rows = [*head(576, 8), *head(896, 9), *head(2048, 8), *head(2048, 11, 128256), *head(4096, 12)]
    assert goals.proposed_dispatch(rows, "h100.md", tile_mib=512) == [
        'Dispatch(max_width=896, fused=True, tile_mib=512, measured="h100.md"),',
        'Dispatch(max_width=None, fused=False, tile_mib=512, measured="h100.md"),',
    ]
    assert goals.proposed_dispatch([], "h100.md", tile_mib=512) == []


def race(speedup: float, over_sft: float, reference: str) -> dict[str, Any]:
    ours = {"examples_per_second": 40.0, "peak_mib": 1000.0, "mfu": 0.41}
    ratios = {"speedup": speedup, "time_over_sft": over_sft}
    return {"reference": reference, "rows": {"ours": ours}} | ratios


@pytest.mark.parametrize(
    ("speedup", "over_sft", "reference", "goal"),
    [
        (2.1, 1.85, "computed", "reached"),
        (2.1, 1.85, "cached", "missed"),
        (2.1, 1.25, "cached", "reached"),
        (1.9, 1.25, "cached", "missed"),
    ],
)
def test_the_goals_of_the_steps(speedup, over_sft, reference, goal) -> None:
    goals = importlib.import_module("gpu_goals")
    (row,) = goals.step_rows([("small", [race(speedup, over_sft, reference)])])
    assert row["goal"] == goal
    assert row["MFU"] == "41%"


def test_a_report_has_every_table(tmp_path: Path) -> None:
    report, parts = (importlib.import_module(f"gpu_{name}") for name in ("report", "parts"))
    results = results_in(tmp_path)
    by_stage = {stage: next(p for p in parts.PARTS if p.stage == stage) for stage in parts.STAGES}
    contents = {
        3: [kernel("ours", 10.0), kernel("ours, fused", 9.0), kernel("TRL", 20.0)],
        4: [race(2.5, 1.2, "cached")],
        6: [
            {
                "step_ms": 20.0,
                "idle_share": 0.25,
                "largest": [{"operation": "a|b", "calls": 1, "ms": 3.0, "share": 0.5}],
            }
        ],
    }
    for stage, rows in contents.items():
        result = {"status": "passed", "seconds": 5.0, "result": {"results": rows}}
        results.add(by_stage[stage], result)
    failure = {"test": "tests::a", "traceback": "E   assert 3 == 4"}
    failed = {"status": "failed", "seconds": 5.0, "failures": [failure], "command": "python -m a"}
    results.add(by_stage[1], failed | {"tests": {"passed": 2, "failed": 1, "skipped": 0}})
    text = report.markdown(results, [by_stage[5]])
    for expected in (
        "failed: 2 passed, 1 failed",
        "left for the next call",
        "| ours, fused, 10.00 ms | TRL, 21.00 ms |",
        "| 2.50 ",
        "| 25% ",
        "a/b",
        "Dispatch(max_width=None, fused=True",
        "## Failed: tests::a",
        "E   assert 3 == 4",
        "- commit: abc",
    ):
        assert expected in text, expected
    assert all(len(set(map(_bars, table))) == 1 for table in _tables(text))


def _tables(text: str) -> list[list[str]]:
    return [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]


def _bars(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", line))


def test_every_command_can_be_run() -> None:
    """Its script parses its options; its tests are collected by the slow test below."""
    parts = importlib.import_module("gpu_parts").PARTS
    assert len({(part.stage, part.name) for part in parts}) == len(parts)
    assert [part.stage for part in parts] == sorted(part.stage for part in parts)
    values = {"{json}": "a", "{scratch}": "b", "{minutes}": "3", "{model}": "--small"}
    for chosen in parts:
        script, *options = chosen.command
        if script == "-m":
            assert (ROOT / options[1]).is_file()
            continue
        module = importlib.import_module(Path(script).stem)
        parse: Any = module.parse
        options = [values.get(option, option) for option in options]
        if module.__name__ == "linear_logps":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", ["", *options])
                assert parse().shape[0].count("x") == 2
        else:
            assert parse(options).json == Path("a")


@pytest.mark.slow
def test_every_group_of_tests_has_some_on_a_gpu() -> None:
    for chosen in importlib.import_module("gpu_parts").PARTS:
        if chosen.command[0] != "-m":
            continue
        words = [{"{marks}": "gpu", "{junit}": "/dev/null"}.get(w, w) for w in chosen.command]
        command = [sys.executable, *words, "--collect-only"]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, chosen.name + ended.stdout[-2000:]
        found = re.search(r"(\d+)(?:/\d+)? tests? collected", ended.stdout)
        assert found, ended.stdout[-500:]
        assert int(found[1]) > 0


def test_a_profile_names_the_largest_operations(tmp_path: Path, capsys) -> None:
    script = importlib.import_module("step_profile")
    file = tmp_path / "profile.json"
    options = ["--batch-size", "4", "--words", "20", "--warmup", "1", "--device", "cpu"]
    assert script.main([*options, "--json", str(file)]) == 0
    (found,) = json.loads(file.read_text())["results"]
    assert len(found["largest"]) == script.LARGEST
    shares = [row["share"] for row in found["largest"]]
    assert shares == sorted(shares, reverse=True)
    assert 0.5 < sum(shares) <= 1
    assert found["total_ms"] > 0
    assert "idle_share" not in found
    assert any("mm" in row["operation"] for row in found["largest"][:3])
    assert "| operation " in capsys.readouterr().out


def test_the_time_in_which_a_device_is_busy() -> None:
    busy = importlib.import_module("step_profile").busy_seconds
    assert busy([(0, 10), (5, 20), (30, 40), (31, 32)]) == pytest.approx(30e-6)
    assert busy([]) == 0
