"""NVIDIA's compiler and disassembler: where they are, and what the kernels are compiled with.

None of them needs a GPU. Each is looked for in the same places: a variable of the environment, the
environment's own scripts, the PATH, $CUDA_HOME, and NVIDIA's wheels below site-packages/nvidia.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from m3i_fast.ops.tiles import CUDA

ARCHITECTURES = ("80", "90a")

_INSTALL = {
    "nvcc": "NVIDIA's CUDA toolkit, or `pip install 'cuda-toolkit[nvcc,cudart,cccl]>=13'`",
    "nvdisasm": "`pip install nvidia-cuda-nvdisasm`, of nvcc's CUDA major or a newer one",
    "cuobjdump": "`pip install nvidia-cuda-cuobjdump`, of nvcc's CUDA major or a newer one",
}
_VARIABLES = {"nvcc": "CUDACXX"}


class MissingTool(ValueError):
    """A tool of NVIDIA's that is not installed; the message says what to type."""


# ---- Tools ---------------------------------------------------------------------------------------


def site_packages(pattern: str) -> list[Path]:
    """Return files of NVIDIA's wheels, which install below site-packages/nvidia."""
    return sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob(pattern))


def find_tool(name: str) -> Path:
    """Return the path of nvcc, nvdisasm or cuobjdump. Raises MissingTool where it is nowhere."""
    variable = _VARIABLES.get(name, "")
    candidates = [os.environ.get(variable, "")] if variable else []
    candidates += [str(Path(sysconfig.get_path("scripts")) / name), shutil.which(name) or ""]
    candidates += [
        f"{os.environ[home]}/bin/{name}" for home in ("CUDA_HOME",) if home in os.environ
    ]
    candidates += [str(path) for path in site_packages(f"*/bin/{name}")]
    if name != "nvcc" and (compiler := shutil.which("nvcc")):
        candidates.append(str(Path(compiler).resolve().with_name(name)))
    for candidate in candidates:
        if candidate and Path(candidate).is_file():
            return Path(candidate)
    looked = [f"${variable}"] if variable else []
    looked += ["the PATH", "$CUDA_HOME/bin", "site-packages/nvidia/*/bin"]
    raise MissingTool(f"{name}: found none in {', '.join(looked)}; install {_INSTALL[name]}")


def run_tool(command: Sequence[str | Path]) -> str:
    """Run a command and return what it printed. Raises RuntimeError with that where it fails."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


# ---- Compilation ---------------------------------------------------------------------------------


def torch_root() -> Path:
    """Return the folder of torch's package, without loading it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def torch_includes() -> list[str]:
    """Return the options for the headers of torch and Python, and the torch that is aimed at."""
    options = ["-isystem", str(torch_root() / "include")]
    options += ["-isystem", sysconfig.get_path("include")]
    return [*options, "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]


def architecture_options(architecture: str) -> list[str]:
    """Return nvcc's options for machine code of one architecture, as 80 or 90a."""
    return ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]


def kernel_options(architecture: str, root: Path = CUDA) -> list[str]:
    """Return nvcc's options for the machine code of a launch.cu below `root`, as the build's."""
    options = ["-std=c++17", "-O3", f"-I{root}", f"-I{root / 'include'}"]
    return [*options, "-DUSE_CUDA", "-DM3I_SM90A", *architecture_options(architecture)]


def compile_cubin(
    source: Path, made: Path, architecture: str, *, root: Path = CUDA, lines: bool = True
) -> Path:
    """Compile a CUDA source to machine code of one architecture, and return `made`.

    lines: keep the source line of each instruction, which changes no instruction. Raises
    MissingTool without nvcc, RuntimeError with its words where it fails.
    """
    options = [*kernel_options(architecture, root), *(["-lineinfo"] if lines else [])]
    run_tool([find_tool("nvcc"), *options, "-cubin", source, "-o", made])
    return made


# ---- What ptxas gave -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resources:
    """The registers and memory that ptxas gave a kernel."""

    registers: int
    spill_bytes: int
    shared_bytes: int


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


def short_names(mangled: Sequence[str]) -> dict[str, str]:
    """Return short names with template arguments, as `dcnv3_kernel<float, 4>`, by mangled name.

    `void m3i::op::op_kernel<float, 16>(m3i::Params)` is `op_kernel<float, 16>`; a name that is not
    mangled stays. Raises MissingTool without c++filt.
    """
    if not shutil.which("c++filt"):
        raise MissingTool("c++filt: found none in the PATH; install binutils")
    done = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    )
    found = {}
    for name, shown in zip(mangled, done.stdout.splitlines(), strict=True):
        short = re.search(r"(\w+(?:<.*>)?)\(", shown)
        found[name] = (short[1] if short else shown).replace("m3i::", "")
    return found
