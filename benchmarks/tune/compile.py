"""Device code to machine code by NVRTC, through CuPy: what a sweep compiles, without a GPU.

NVRTC and ptxas need no driver, so CuPy's own `RawModule`, which asks for one, is not used here.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from m3i_fast.ops.tiles import CUDA

ARCHITECTURES = {"a100": "sm_80", "h100": "sm_90a"}

# Constants that the compiler works out are read from the name of a kernel that has them as
# arguments.
_CONSTANTS = "template <int...> __global__ void m3i_constants_kernel() {}\n"


@dataclass(frozen=True, slots=True)
class Resources:
    """The registers and memory that ptxas gave a kernel."""

    registers: int
    spill_bytes: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class Compiled:
    cubin: bytes
    kernels: dict[str, Resources]
    """By the name that was asked for."""
    constants: tuple[int, ...]
    log: str


_KERNEL = re.compile(r"Compiling entry function '(\S+)' for")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def parse_ptxas(printed: str) -> dict[str, Resources]:
    """Return resources by mangled name, from what `ptxas -v` prints for one architecture.

    Raises ValueError for anything else.
    """
    resources: dict[str, Resources] = {}
    for block in re.split(r"(?=ptxas info\s*: Compiling entry function)", printed)[1:]:
        kernel, spills, used = (p.search(block) for p in (_KERNEL, _SPILLS, _USED))
        if not (kernel and spills and used):
            raise ValueError(f"ptxas -v printed something else:\n{block}")
        resources[kernel[1]] = Resources(
            registers=int(used[1]),
            spill_bytes=int(spills[1]) + int(spills[2]),
            shared_bytes=int(used[2] or 0),
        )
    return resources


def code_digest(cubin: bytes) -> str:
    """Return a digest of the instructions, equal for kernels that differ in names alone."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)  # of ELF64: where its section headers begin
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    digest = hashlib.sha256()
    for name, _, _, _, offset, length in headers:
        if cubin.startswith(b".text.", headers[names][4] + name):
            digest.update(b"kernel" + cubin[offset : offset + length])
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
