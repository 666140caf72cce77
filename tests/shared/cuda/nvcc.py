"""Finds nvcc and compiles the CUDA sources with it, for the tests; no GPU is needed."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path

import pytest

from m3i_fast.benchmarks.tune.compile import Resources, parse_ptxas

ROOT = Path(__file__).parents[3]
CUDA = ROOT / "cuda"
ARCHITECTURES = ("80", "90a")


def site_packages(pattern: str) -> list[Path]:
    """Files of NVIDIA's wheels, which install below site-packages/nvidia."""
    return sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob(pattern))


def name_of(path: Path) -> str:
    """Of a source, below cuda/."""
    return path.relative_to(CUDA).as_posix()


def find_nvcc() -> Path:
    """From $CUDACXX, $CUDA_HOME, the PATH or NVIDIA's wheels; the test is skipped where none is."""
    candidates = [os.environ.get("CUDACXX", ""), shutil.which("nvcc") or ""]
    candidates += [f"{os.environ[name]}/bin/nvcc" for name in ("CUDA_HOME",) if name in os.environ]
    candidates += [str(path) for path in site_packages("*/bin/nvcc")]
    for candidate in candidates:
        if candidate and Path(candidate).is_file():
            return Path(candidate)
    pytest.skip("no nvcc in $CUDACXX, $CUDA_HOME, the PATH or site-packages/nvidia/*/bin")


def compile_options(architecture: str | None = None) -> list[str]:
    """The build's options; every warning is an error."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.submodule_search_locations
    options = ["-std=c++17", "-O3", f"-I{CUDA}", f"-I{CUDA / 'include'}"]
    options += ["-isystem", f"{spec.submodule_search_locations[0]}/include"]
    options += ["-isystem", sysconfig.get_path("include")]
    options += [
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-DPy_LIMITED_API=0x030a0000",
        "-DM3I_SM90A",
    ]
    options += [
        "-Werror",
        "all-warnings",
        "-Xcompiler=-Wall,-Wextra,-Werror,-fPIC,-fvisibility=hidden",
    ]
    if architecture:
        options += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    return options


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
    return {_short_name(kernel): used for kernel, used in parse_ptxas(printed).items()}


def _short_name(mangled: str) -> str:
    """`void m3i::op::op_kernel<float, 16>(m3i::Params)` to `op_kernel<float, 16>`."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    short = re.search(r"(\w+(?:<.*>)?)\(", name)
    assert short, name
    return short[1].replace("m3i::", "")


def find_nvdisasm() -> Path:
    """From the PATH, nvcc's folder or NVIDIA's wheels; the test is skipped where none is."""
    candidates = [shutil.which("nvdisasm"), find_nvcc().resolve().parent / "nvdisasm"]
    for candidate in [*candidates, *site_packages("*/bin/nvdisasm")]:
        if candidate and Path(candidate).is_file():
            return Path(candidate)
    pytest.skip("no nvdisasm: `pip install nvidia-cuda-nvdisasm`, of nvcc's CUDA major")


@cache
def instructions(source: Path, architecture: str, folder: Path) -> dict[str, list[str]]:
    """Opcodes of each kernel, by its mangled name; the machine code is left in the folder."""
    nvdisasm, cubin = find_nvdisasm(), folder / f"{source.stem}-{architecture}.cubin"
    run_nvcc(*compile_options(architecture), "-cubin", source, "-o", cubin)
    text = subprocess.run(
        [nvdisasm, "-c", cubin], check=True, capture_output=True, text=True
    ).stdout
    kernels = re.split(r"\n\.text\.(\S+):\n", text)[1:]
    return {
        name: re.findall(r"^\s*/\*\w+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", body, re.MULTILINE)
        for name, body in zip(kernels[::2], kernels[1::2], strict=True)
    }
