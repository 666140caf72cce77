"""Finds nvcc and compiles the CUDA sources with it, for the tests; no GPU is needed."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import pytest

from m3i_fast.benchmarks.core.cuda_toolkit import (
    MissingTool,
    Resources,
    architecture_options,
    find_tool,
    parse_ptxas,
    short_names,
    torch_includes,
)
from m3i_fast.benchmarks.core.sass.disassembly import disassemble

ROOT = Path(__file__).parents[3]
CUDA = ROOT / "cuda"


def name_of(path: Path) -> str:
    """Of a source, below cuda/."""
    return path.relative_to(CUDA).as_posix()


def find_nvcc() -> Path:
    """As the package finds it; the test is skipped where none is."""
    return _find("nvcc")


def find_nvdisasm() -> Path:
    """As the package finds it; the test is skipped where none is."""
    return _find("nvdisasm")


def _find(tool: str) -> Path:
    try:
        return find_tool(tool)
    except MissingTool as error:
        pytest.skip(str(error))


def compile_options(architecture: str | None = None) -> list[str]:
    """The build's options; every warning is an error."""
    options = ["-std=c++17", "-O3", f"-I{CUDA}", f"-I{CUDA / 'include'}", *torch_includes()]
    options += ["-DUSE_CUDA", "-DM3I_SM90A"]
    options += [
        "-Werror",
        "all-warnings",
        "-Xcompiler=-Wall,-Wextra,-Werror,-fPIC,-fvisibility=hidden",
    ]
    return [*options, *(architecture_options(architecture) if architecture else [])]


def run_nvcc(*arguments: str | Path) -> str:
    """What nvcc printed; fails the test, with that, where nvcc fails or warns."""
    done = subprocess.run(
        [find_nvcc(), *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0 and "warning" not in printed.lower(), printed
    return printed


def short_ptxas(printed: str) -> dict[str, Resources]:
    """By kernel, as `kernel<float, 16>`, from what `ptxas -v` prints for one architecture."""
    used = parse_ptxas(printed)
    names = short_names(list(used))
    return {names[kernel]: resources for kernel, resources in used.items()}


@cache
def instructions(source: Path, architecture: str, folder: Path) -> dict[str, list[str]]:
    """Opcodes of each kernel, by its mangled name; the machine code is left in the folder."""
    find_nvdisasm()
    cubin = folder / f"{source.stem}-{architecture}.cubin"
    run_nvcc(*compile_options(architecture), "-cubin", source, "-o", cubin)
    return {
        kernel.mangled: [each.opcode for each in kernel.instructions]
        for kernel in disassemble(cubin)
    }
