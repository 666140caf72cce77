"""The requirements of `make gpu` that a machine lacks, and an inventory of optional tools."""

from __future__ import annotations

import ctypes
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from scripts import install

OLDEST_CMAKE, OLDEST_TORCH = (3, 26), (2, 10)
SEARCHED = ("nvidia-smi", "nsys", "compute-sanitizer", "cuobjdump")
# Optional libraries by name, with the module that is looked for.
OPTIONAL = {
    "DALI": "nvidia.dali",
    "Transformer Engine": "transformer_engine",
    "torchao": "torchao",
    "CuPy": "cupy",
    "nvidia-ml-py": "pynvml",
    "tyro": "tyro",
    "cattrs": "cattrs",
    "Pillow": "PIL",
}


def missing_packages() -> list[str]:
    """List the missing or outdated Python packages and headers, each with what to install."""
    elsewhere = f"install it for {sys.executable}, or name another python: make gpu PYTHON=..."
    needed = {
        "torch": "with CUDA, 2.10 or newer",
        "pytest": "the tests need it",
        "rich": "the benchmarks need it",
    }
    problems = [
        f"{name}: not installed ({why}); {elsewhere}"
        for name, why in needed.items()
        if find_spec(name) is None
    ]
    if find_spec("torch") and numbers(version := metadata.version("torch")) < OLDEST_TORCH:
        problems.append(f"torch: expected 2.10 or newer, got {version}; {elsewhere}")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        problems.append(
            f"Python.h: not found; install the headers of {sys.executable} (python3-dev)"
        )
    return problems


def missing_tools() -> list[str]:
    """List the missing or outdated build tools, each with what to install."""
    problems = []
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        problems.append(f"{compiler}: not found; install a C++17 compiler, or set CXX")
    if not shutil.which("cmake"):
        problems.append("cmake: not found; install CMake 3.26 or newer, or add it to PATH")
    else:
        shown = subprocess.run(["cmake", "--version"], capture_output=True, text=True).stdout
        if numbers(shown) < OLDEST_CMAKE:
            problems.append(
                f"cmake: expected 3.26 or newer, got {shown.splitlines()[0]}; install a newer one"
            )
    return problems


def missing_nvcc(torch_cuda: str) -> list[str]:
    """List the missing nvcc, if any; torch_cuda: the CUDA version of torch's build ("13.0")."""
    major = int(torch_cuda.split(".")[0])
    if install.find_nvcc(major) is not None:
        return []
    return [
        f"nvcc: expected one of CUDA {major}, as torch, got none; install NVIDIA's CUDA {major} "
        "toolkit, or set CUDACXX to its nvcc"
    ]


def unusable_card(facts: Facts) -> list[str]:
    """List why torch does not see a GPU that the driver sees, with the versions of both."""
    driver = runpy.run_path(str(install.ROOT / "m3i_fast" / "doctor" / "probes.py"))["driver"]()
    if facts.card or "gpus" not in driver:
        return []
    name, (major, minor) = driver["gpus"][0]["name"], driver["cuda"]
    if facts.cuda is None:
        why = f"expected a build for CUDA {major}, got a CPU build"
        fix = f"install torch for CUDA {major}, or name another python: make gpu PYTHON=..."
    elif int(facts.cuda.split(".")[0]) > major:
        why = f"expected a build for CUDA {major} or older, got one for CUDA {facts.cuda}"
        fix = f"update the driver, or install torch for CUDA {major}"
    else:
        why = f"a build for CUDA {facts.cuda} sees no GPU"
        fix = "m3i-fast doctor looks for the cause"
    return [
        f"torch {facts.torch} in {sys.executable}: {why}, and the driver, which runs CUDA "
        f"{major}.{minor}, has a {name}; {fix}; --small runs without it"
    ]


def why_no_gpu(torch_cuda: str | None, card: str | None) -> str | None:
    """Return why nothing can run on a GPU here; None where torch sees one."""
    if torch_cuda is None:
        return (
            f"torch: expected a build with CUDA, got a CPU build in {sys.executable}; name another "
            "python: make gpu PYTHON=..."
        )
    return None if card else "GPU: torch sees none; nvidia-smi tells why"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What torch tells of the machine; None: no torch, a CPU build, or no GPU."""

    torch: str | None = None
    """Version of torch, with that of its build: 2.15.0+cu130."""
    cuda: str | None = None
    """CUDA version of torch's build."""
    card: str | None = None
    """Name of the first GPU."""
    capability: tuple[int, int] | None = None
    num_gpus: int = 0
    is_null: bool = False
    """Whether the GPU is the null CUDA runtime's, which computes nothing."""


def torch_facts() -> Facts:
    """Ask torch, where there is one."""
    if find_spec("torch") is None:
        return Facts()
    import torch

    if not torch.cuda.is_available():
        return Facts(torch=torch.__version__, cuda=torch.version.cuda)
    return Facts(
        torch=torch.__version__,
        cuda=torch.version.cuda,
        card=torch.cuda.get_device_name(0),
        capability=torch.cuda.get_device_capability(0),
        num_gpus=torch.cuda.device_count(),
        is_null=hasattr(ctypes.CDLL(None), "null_cuda_mark"),
    )


def find_tool(name: str, nvcc: Path | None) -> Path | None:
    """Find a tool on the PATH, beside nvcc in a CUDA toolkit, or in triton."""
    on_path = shutil.which(name)
    if on_path:
        return Path(on_path)
    folders = [nvcc.resolve().parent] if nvcc else []
    if (triton := find_spec("triton")) and triton.origin:  # torch with CUDA brings a few tools
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def inventory(nvcc: Path | None) -> dict[str, str | None]:
    """Return the path or version of each optional tool; None: missing, its steps are left out."""
    versions: dict[str, str | None] = {"nvcc": str(nvcc) if nvcc else None}
    for name in SEARCHED:
        tool = find_tool(name, nvcc)
        versions[name] = str(tool) if tool else None
    for name, module in OPTIONAL.items():
        versions[name] = _version(module) if _is_installed(module) else None
    return versions


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


def _version(module: str) -> str:
    by_file = metadata.packages_distributions().get(module.split(".")[0], [])
    named = [name for name in by_file if module.split(".")[-1] in name.lower()] or by_file
    return f"{named[0]} {metadata.version(named[0])}" if named else "installed"


def numbers(text: str) -> tuple[int, ...]:
    """Read major and minor version from a text: (3, 26) from "cmake version 3.26.4"."""
    version = re.search(r"(\d+)\.(\d+)", text)
    return (int(version[1]), int(version[2])) if version else (0, 0)
