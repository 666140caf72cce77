"""Device code to machine code by NVRTC, through CuPy: what a sweep compiles, without a GPU.

NVRTC and ptxas need no driver, so CuPy's own `RawModule`, which asks for one, is not used here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from m3i_fast.benchmarks.core.cuda_toolkit import Resources, parse_ptxas
from m3i_fast.benchmarks.core.sass.elf import sections
from m3i_fast.ops.tiles import CUDA

ARCHITECTURES = {"a100": "sm_80", "h100": "sm_90a"}

# Constants that the compiler works out are read from the name of a kernel that has them as
# arguments.
_CONSTANTS = "template <int...> __global__ void m3i_constants_kernel() {}\n"


@dataclass(frozen=True, slots=True)
class Compiled:
    cubin: bytes
    kernels: dict[str, Resources]
    """By the name that was asked for."""
    constants: tuple[int, ...]
    log: str


def code_digest(cubin: bytes) -> str:
    """Return a digest of the instructions, equal for kernels that differ in names alone."""
    digest = hashlib.sha256()
    for name, _, content in sections(cubin):
        if name.startswith(".text."):
            digest.update(b"kernel" + content)
    return digest.hexdigest()


def compile_cubin(
    source: str,
    kernels: Sequence[str],
    architecture: str,
    *,
    headers: Mapping[str, str] | None = None,
    constants: Sequence[str] = (),
) -> Compiled:
    """Compile these instantiations to machine code, for sm_80 or sm_90a.

    `headers` go before those of cuda/, by the name that sources include. `constants` are
    expressions whose integers the compiler is asked for. RuntimeError has NVRTC's log, with a
    static_assert's message.
    """
    from cupy_backends.cuda.libs import nvrtc

    headers = headers or {}
    program = nvrtc.createProgram(
        source + "\n" + _CONSTANTS,
        "candidate.cu",
        tuple(text.encode() for text in headers.values()),
        tuple(name.encode() for name in headers),
    )
    asked = [*kernels]
    if constants:
        asked.append(f"m3i_constants_kernel<{', '.join(f'int({text})' for text in constants)}>")
    options = [f"--gpu-architecture={architecture}", "--std=c++17", "--ptxas-options=-v"]
    options += [f"-I{CUDA}", f"-I{CUDA / 'include'}"]
    try:
        for name in asked:
            nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            raise RuntimeError(f"NVRTC for {architecture}: {error}\n{log}") from error
        log = nvrtc.getProgramLog(program)
        lowered = {name: nvrtc.getLoweredName(program, name) for name in asked}
        cubin = nvrtc.getCUBIN(program)
    finally:
        nvrtc.destroyProgram(program)
    used = parse_ptxas(log)
    values = re.findall(r"Li(\d+)E", lowered[asked[-1]]) if constants else []
    return Compiled(cubin, {name: used[lowered[name]] for name in kernels},
                    tuple(map(int, values)), log)  # fmt: skip
