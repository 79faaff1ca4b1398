"""The Triton kernels without a GPU: interpreted on the CPU, and compiled ahead of time.

The interpreter checks numbers, the compiler types, spills and shared memory. Neither checks speed.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kto_kernels.linear_logps.head import Head
from kto_kernels.linear_logps.plan import DISPATCH

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

from kto_kernels.linear_logps import fused, triton_tiles
from tests.kernels.compiled import SHARED_MEMORY, compile_ahead

FLOATS = "fp32"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def test_interpreted_kernels() -> None:
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*pytest_command, "tests/kernels/interpreted.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "only 0-dimensional arrays can be converted to Python scalars" in run.stdout:
        pytest.skip("the interpreter of this Triton (3.6) cannot work with NumPy 2.4 or newer")
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def pointers(kernel, **types: str) -> dict[str, str]:
    """Types of a kernel's pointers: float32, int64 for targets, and as given for others."""
    names = [name for name in kernel.arg_names if name.endswith("_ptr")]
    return dict.fromkeys(names, FLOATS) | {"targets_ptr": "i64"} | types


def compile_rows(kernel, capability, folder, *, constants, **types):
    block, options = triton_tiles._row_launch(16_384)
    return compile_ahead(
        kernel,
        capability,
        folder,
        pointers={name: kind for name, kind in pointers(kernel, **types).items() if kind != "none"},
        constants={"BLOCK": block} | constants,
        options=options,
    )


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_row_kernels_compile_without_spills(capability, tmp_path) -> None:
    head = {"HAS_BIAS": True, "CAPPED": True}
    fold = {"WEIGHTS": True, "STATISTICS": True}
    plain = {"HAS_BIAS": False, "CAPPED": False, "WEIGHTS": False, "STATISTICS": False}
    absent = {"bias_ptr": "none", "logit_sum_ptr": "none", "weighted_sum_ptr": "none"}
    for kernel, constants, types in (
        (triton_tiles._fold_kernel, head | fold, {"weights_ptr": "bf16"}),
        (triton_tiles._fold_kernel, plain, absent),
        (triton_tiles._unit_gradient_kernel, head, {"out_ptr": "bf16"}),
        (triton_tiles._shrink_rows_kernel, {}, {}),
    ):
        found = compile_rows(kernel, capability, tmp_path, constants=constants, **types)
        assert found.stack == found.local == 0, kernel.__name__
        assert found.shared <= 1024
        assert found.registers <= 128  # two programs of 8 warps per processor
        assert "atom" not in found.ptx


def compile_partial(blocks: fused.Blocks, dtype: str, capability: int, folder: Path, head: Head):
    kernel = fused._partial_kernel
    return compile_ahead(
        kernel,
        capability,
        folder,
        pointers=pointers(kernel, hidden_ptr=dtype, weight_ptr=dtype),
        constants={
            "HAS_BIAS": True,
            "CAPPED": head.softcap is not None,
            "DESCRIPTORS": blocks.descriptors,
            "BLOCK_T": blocks.tokens,
            "BLOCK_V": blocks.vocabulary,
            "BLOCK_D": blocks.width,
        },
        options=blocks.options(),
    )


FUSED = [
    pytest.param(fused.HOPPER, "bf16", 90, None, id="sm_90"),
    *(
        pytest.param(*launch, softcap, marks=pytest.mark.slow)
        for launch in (
            (fused.AMPERE, "bf16", 80),
            (fused.AMPERE, "fp16", 90),
            (fused.HOPPER, "fp16", 90),
            (fused.HOPPER, "bf16", 100),
            (fused.FLOAT32, "fp32", 80),
            (fused.FLOAT32, "fp32", 90),
        )
        for softcap in (None, 30.0)
    ),
    pytest.param(fused.HOPPER, "bf16", 90, 30.0, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("blocks", "dtype", "capability", "softcap"), FUSED)
def test_fused_kernel_compiles_without_spills(blocks, dtype, capability, softcap, tmp_path) -> None:
    found = compile_partial(blocks, dtype, capability, tmp_path, Head(softcap=softcap))
    assert found.stack == found.local == 0
    assert found.shared <= SHARED_MEMORY[capability]
    assert "atom" not in found.ptx
    if dtype != "fp32":
        instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
        assert instruction in found.ptx
    assert ("cp.async.bulk.tensor" in found.ptx) == blocks.descriptors


def test_merge_kernel_compiles_without_spills(tmp_path) -> None:
    kernel = fused._merge_kernel
    for num_splits in (1, 32):
        found = compile_ahead(
            kernel,
            90,
            tmp_path,
            pointers=pointers(kernel),
            constants={"NUM_SPLITS": num_splits, "BLOCK_T": 128},
            options=triton_tiles.COMPILE,
        )
        assert found.stack == found.local == 0


def test_splits_fill_the_device() -> None:
    splits = [
        fused.choose_splits(tokens, 151_936, fused.HOPPER, num_processors=132)
        for tokens in (1, 128, 129, 8192, 100_000)
    ]
    assert splits == [32, 32, 32, 2, 1]
    assert fused.choose_splits(1, 100, fused.HOPPER, num_processors=132) == 1


def test_result_files_of_the_dispatch_table_exist() -> None:
    assert DISPATCH[-1].max_width is None
    for choice in DISPATCH:
        assert choice.measured is None or (ROOT / choice.measured).is_file()
