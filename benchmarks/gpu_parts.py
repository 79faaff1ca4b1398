"""The parts of the GPU acceptance, in the order of its stages, with their commands.

A part is a command in a process of its own. In commands, `{marks}` are the tests' marks for this
device, `{json}` and `{junit}` the files that a part writes, `{scratch}` a folder that stays from
call to call, `{model}` the option that names a real model, and `{minutes}` what is left.
"""

from dataclasses import dataclass
from itertools import chain

STAGES = {
    1: "does it run?",
    2: "does a step wait for the device?",
    3: "kernels",
    4: "steps, beside TRL",
    5: "quality",
    6: "profile",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One command, and what it needs."""

    stage: int
    name: str
    command: tuple[str, ...]
    """Of the Python interpreter."""
    seconds: float
    """What it may take: it is not begun with less time left."""
    runs_on_cpu: bool = False
    needs: tuple[str, ...] = ()
    """Packages without which it is skipped."""
    resumes: bool = False
    """Whether its command goes on where it stopped; exit status 3: there is more to do."""


def _tests(
    stage: int,
    name: str,
    file: str,
    seconds: float,
    *,
    only: str = "",
    runs_on_cpu: bool = True,
    needs: tuple[str, ...] = (),
) -> Part:
    """A group of the tests in `tests/gpu`. Warnings are no errors here: versions differ."""
    command = ["-m", "pytest", f"tests/gpu/{file}.py", "-m", "{marks}", "-q", "-W", "default"]
    command += ["--tb", "short", "-p", "no:cacheprovider", "--junit-xml", "{junit}"]
    command += ["-k", only] if only else []
    return Part(
        stage=stage,
        name=name,
        command=tuple(command),
        seconds=seconds,
        runs_on_cpu=runs_on_cpu,
        needs=("pytest", "hypothesis", "beartype", *needs),
    )


_CANARIES = (
    _tests(1, "attention", "test_attention", 90),
    _tests(
        1,
        "row kernels and fused kernel",
        "test_linear_logps",
        120,
        only="planned_tiles or test_fused_kernel",
        runs_on_cpu=False,
        needs=("triton",),
    ),
    _tests(1, "steps", "test_steps", 90, only="not every_family"),
    _tests(1, "families", "test_steps", 120, only="every_family"),
    _tests(1, "memory", "test_memory", 60),
    _tests(1, "runs", "test_runs", 120, only="not fsdp2 and not bits"),
    _tests(1, "fsdp2", "test_runs", 90, only="fsdp2"),
    _tests(
        1, "four bits", "test_runs", 60, only="bits", runs_on_cpu=False, needs=("bitsandbytes",)
    ),
)

HEADS = {
    "smollm2-135m": "8192x576x49152",
    "qwen2.5-0.5b": "8192x896x151936",
    "gemma-3-1b": "8192x1152x262144",
    "llama-3.2-1b": "8192x2048x128256",
    "qwen2.5-7b": "8192x3584x152064",
    "mistral-7b": "8192x4096x32000",
    "qwen3-8b": "8192x4096x151936",
    "llama-3.1-70b": "8192x8192x128256",
}
"""Tokens x width x vocabulary."""

_KERNELS = (
    _tests(3, "tests", "test_linear_logps", 300, runs_on_cpu=False, needs=("triton",)),
    *(
        Part(
            stage=3,
            name=f"head of {name}",
            command=(
                *("benchmarks/linear_logps.py", "--shape", shape),
                *("--rounds", "10", "--output", "{json}"),
            ),
            seconds=180,
            needs=("triton",),
        )
        for name, shape in HEADS.items()
    ),
)

_WHOLE = ("--batch-size", "8", "--words", "200")
_SMALL = ("--batch-size", "4", "--words", "200", "--lora", "--checkpointing")
"""So that three trainers of 7 billion parameters share 80 GB."""
_RACES = {
    "smollm2-135m": ("--batch-size", "16", "--words", "300"),
    "qwen2.5-0.5b": _WHOLE,
    "qwen2.5-1.5b": (*_WHOLE, "--lora"),
    "qwen2.5-7b": _SMALL,
}

_STEPS = tuple(
    Part(
        stage=4,
        name=f"{shape}{' LoRA' if '--lora' in options else ''}, {reference}",
        command=(
            *("benchmarks/throughput.py", "--shape", shape, "--sft"),
            *("--reference", reference, *options, "--json", "{json}"),
        ),
        seconds=300 if shape == "qwen2.5-7b" else 180,
        needs=("trl", "datasets"),
    )
    for shape, options in _RACES.items()
    for reference in ("computed", "cached")
)

_PROFILES = tuple(
    Part(
        stage=6,
        name=f"{shape}{' LoRA' if '--lora' in options else ''}",
        command=("benchmarks/step_profile.py", "--shape", shape, *options, "--json", "{json}"),
        seconds=120,
        needs=("trl", "datasets"),
    )
    for shape, options in _RACES.items()
)

PARTS: tuple[Part, ...] = tuple(
    chain(
        _CANARIES,
        [_tests(2, "waiting", "test_waiting", 90, runs_on_cpu=False)],
        _KERNELS,
        _STEPS,
        [
            Part(
                stage=5,
                name="real model",
                command=(
                    *("benchmarks/real_model.py", "--output", "{scratch}", "--json", "{json}"),
                    *("--minutes", "{minutes}", "{model}"),
                ),
                seconds=240,
                needs=("trl", "datasets"),
                resumes=True,
            )
        ],
        _PROFILES,
    )
)
