"""Where machine code comes from: the kernels' sources, compiled here, or a file that has it."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from m3i_fast.benchmarks.core.cuda_toolkit import (
    compile_cubin,
    find_tool,
    kernel_options,
    run_tool,
)
from m3i_fast.benchmarks.core.sass.disassembly import Kernel, disassemble
from m3i_fast.ops.tiles import CUDA


def build_folder() -> Path:
    """Return the folder of compiled sources: build/sass of the checkout."""
    return CUDA.parent / "build" / "sass"


def sources_of(op: str, architecture: str) -> list[Path]:
    """Return the sources of an op's kernels that have code for an architecture, as 80 or 90a.

    Raises ValueError without a checkout.
    """
    found = sorted((CUDA / op).glob("sm*/*.cu"))
    if not found:
        raise ValueError(f"op: expected sources of {op} in a checkout, got none in {CUDA / op}")
    capability = int(re.match(r"\d+", architecture)[0])  # type: ignore[index]
    return [path for path in found if int(path.parent.name.removeprefix("sm")) <= capability]


def kernels_of_op(op: str, architecture: str) -> Iterator[Kernel]:
    """Yield the kernels of an op as nvcc compiles them now; what was compiled before is kept.

    Raises MissingTool without nvcc or nvdisasm, RuntimeError with nvcc's words where it fails.
    """
    for source in sources_of(op, architecture):
        yield from disassemble(_compiled(source, op, architecture))


def _compiled(source: Path, op: str, architecture: str) -> Path:
    digest = hashlib.sha256(run_tool([find_tool("nvcc"), "--version"]).encode())
    digest.update(repr(kernel_options(architecture)).encode())
    files = [file for room in (CUDA / op, CUDA / "include") for file in room.rglob("*.*")]
    for path in sorted(files):
        digest.update(str(path.relative_to(CUDA)).encode() + path.read_bytes())
    name = f"{op}-{source.parent.name}-{architecture}-{digest.hexdigest()[:12]}.cubin"
    made = build_folder() / name
    if not made.is_file():
        made.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=made.parent) as folder:
            os.replace(compile_cubin(source, Path(folder) / name, architecture), made)
    return made


def kernels_of_file(file: Path) -> Iterator[tuple[str, Kernel]]:
    """Yield architecture and kernel of all machine code in a cubin, or in a library or object.

    Raises ValueError where there is none, MissingTool without nvdisasm, or cuobjdump for a library.
    """
    if not file.is_file():
        raise ValueError(f"file: expected a cubin or a library with CUDA kernels, got {file}")
    with tempfile.TemporaryDirectory() as folder:
        cubins = [file]
        if file.suffix != ".cubin":
            command = 'cd "$1" && exec "$2" -xelf all "$3"'
            run_tool(["sh", "-c", command, "sh", folder, find_tool("cuobjdump"), file.resolve()])
            cubins = sorted(Path(folder).glob("*.cubin"))
        found = [
            (architecture_of(cubin), kernel) for cubin in cubins for kernel in disassemble(cubin)
        ]
    if not found:
        raise ValueError(f"file: expected machine code of kernels, got none in {file}")
    yield from found


def architecture_of(cubin: Path) -> str:
    """Return the architecture that a cubin is for, as 80 or 90a."""
    said = run_tool([find_tool("nvdisasm"), "-c", cubin])
    found = re.search(r"^\s*\.target\s+sm_(\w+)", said, re.MULTILINE)
    if not found:
        raise ValueError(f"nvdisasm: expected .target sm_NUMBER of {cubin}, got none")
    return found[1]
