"""A candidate's kernels as torch operators beside the package's own.

The op's sources are compiled as they are, with the candidate's tiles in front of cuda/, and with
`m3i` renamed: its library defines and registers operators of a namespace of its own. So the op's
checks, allocations and launchers are what is timed, on a GPU and on the CPU alike.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from m3i_fast.benchmarks.core.cuda_toolkit import (
    architecture_options,
    find_tool,
    run_tool,
    torch_includes,
    torch_root,
)
from m3i_fast.ops.tiles import CUDA, Table, render

CPU_OPTIONS = ("-O3", "-DNDEBUG", "-Wall", "-Wextra")
CUDA_ARCHITECTURES = {"a100": "80", "h100": "90a"}


def build_folder() -> Path:
    """Return the folder of built libraries: build/tune of the checkout."""
    return CUDA.parent / "build" / "tune"


def load_ops(library: Path) -> Any:
    """Load a library and return torch.ops.<its namespace>."""
    torch.ops.load_library(str(library))
    return getattr(torch.ops, library.stem)


def build_ops(op: str, table: Table, card: str) -> Path:
    """Return an op's library with the table's tiles, for a card or `cpu`; build it if missing.

    Its stem is its namespace. RuntimeError has the compiler's words, ValueError says what is not
    installed.
    """
    sources = [CUDA / "bindings.cpp", *sorted((CUDA / op).glob("cpu/*.cpp"))]
    if card != "cpu":
        sources = [CUDA / "bindings.cpp", CUDA / op / "op_cuda.cpp"]
        sources += sorted((CUDA / op).glob("sm*/*.cu"))
    header = render(op, table)
    compiler, options = _nvcc(card) if card != "cpu" else _gpp()
    namespace = f"m3i_{op}_{_digest(op, header, compiler, options)}"
    library = build_folder() / f"{namespace}.so"
    if not library.is_file():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            _build(Path(folder), sources, header, op, [compiler, *options, f"-Dm3i={namespace}"])
            os.replace(Path(folder) / "ops.so", library)
    return library


def _digest(op: str, header: str, *more: object) -> str:
    digest = hashlib.sha256(repr((header, torch.__version__, *more)).encode())
    files = [CUDA / "bindings.cpp"]
    files += [file for room in (CUDA / op, CUDA / "include") for file in room.rglob("*.*")]
    for path in sorted(files):
        digest.update(str(path.relative_to(CUDA)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _build(folder: Path, sources: list[Path], header: str, op: str, command: list[str]) -> None:
    (folder / op).mkdir()
    (folder / op / "tiles.h").write_text(header)
    command = [*command, f"-I{folder}", f"-I{CUDA}", f"-I{CUDA / 'include'}"]
    objects = [str(folder / f"{number}.o") for number in range(len(sources))]

    def compile_one(source: Path, made: str) -> None:
        run_tool([*command, "-c", str(source), "-o", made])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    # libtorch.so only names its parts, so the linker would drop it
    link = ["-Xlinker", "--no-as-needed", f"-L{torch_root() / 'lib'}", "-ltorch"]
    run_tool([*command, "-shared", *objects, *link, "-o", str(folder / "ops.so")])


def _common() -> list[str]:
    return ["-std=c++17", *torch_includes()]


def _gpp() -> tuple[str, list[str]]:
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        raise ValueError(f"{compiler}: not found; install a C++17 compiler, or set CXX")
    return compiler, [*CPU_OPTIONS, "-fPIC", "-fvisibility=hidden", *_common()]


def _nvcc(card: str) -> tuple[str, list[str]]:
    number = CUDA_ARCHITECTURES[card]
    options = ["-O3", "-DUSE_CUDA", *architecture_options(number)]
    options += ["-DM3I_SM90A"] if number == "90a" else []
    compiler = str(find_tool("nvcc"))
    return compiler, [*options, "-Xcompiler=-fPIC,-fvisibility=hidden", *_common()]
