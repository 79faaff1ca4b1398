"""Ahead-of-time compilation of Triton kernels, without a GPU, and the resources they need."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
"""Most bytes of a program, by compute capability (CUDA programming guide, table 30)."""

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(kw_only=True)
class Compiled:
    """Resources of a kernel, as the assembler reports them."""

    ptx: str
    registers: int
    stack: int
    """Bytes of local memory per thread, which include spilled registers."""
    local: int
    shared: int


def compile_ahead(
    kernel,
    capability: int,
    folder: Path,
    *,
    pointers: dict[str, str],
    constants: dict[str, object],
    options: dict[str, object],
) -> Compiled:
    """Compile with 16-byte aligned pointers; integers are int32, `scale` and `softcap` float32.

    Args:
        pointers: element type of each pointer argument; those not given are None.
        constants: every `constexpr` argument.
        options: launch options besides the arguments.
    """
    signature, fixed, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], fixed[name] = "constexpr", constants[name]
        elif name in pointers:
            signature[name] = f"*{pointers[name]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name.endswith("_ptr"):
            signature[name], fixed[name] = "constexpr", None
        elif name in ("scale", "softcap"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name == "width":
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    cubin = folder / f"{kernel.__name__}_{capability}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [str(CUOBJDUMP), "--dump-resource-usage", str(cubin)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return Compiled(
        ptx=compiled.asm["ptx"],
        registers=usage["REG"],
        stack=usage["STACK"],
        local=usage["LOCAL"],
        shared=compiled.metadata.shared,
    )
