"""Every CUDA source compiles without a warning, within its budget, and for NVRTC."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.cuda.nvcc import (
    ARCHITECTURES,
    CUDA,
    ROOT,
    Resources,
    compile_options,
    parse_ptxas,
    run_nvcc,
    site_packages,
)

KERNELS = sorted(CUDA.glob("*/*.cu"))
DEVICE_CODE = sorted(CUDA.glob("*/*.cuh"))
# Of each op the file that has all of its kernels.
ALL_KERNELS = [path for path in DEVICE_CODE if path.stem == path.parent.name]
HOST_CODE = sorted([*CUDA.glob("*_cuda.cpp"), *CUDA.glob("*/*_cuda.cpp")])


def name_of(path: Path) -> str:
    return path.relative_to(CUDA).as_posix()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("folder", sorted({path.parent for path in KERNELS}), ids=name_of)
def test_kernels_keep_their_budget(folder: Path, architecture: str, tmp_path: Path) -> None:
    """budget.json beside the kernels holds, for each, the most that ptxas may give it.

    Registers are given out in eights, so a budget is a multiple of eight; it is raised only by
    a commit that says why.
    """
    options = [*compile_options(architecture), "-Xptxas=-v", "-o", tmp_path / "kernel.o", "-c"]
    used: dict[str, Resources] = {}
    for source in folder.glob("*.cu"):
        printed = run_nvcc(*options, source)
        assert "serialized" not in printed, f"wgmma that waits for itself: {printed}"
        used |= parse_ptxas(printed)
    budget = json.loads((folder / "budget.json").read_text())[f"sm_{architecture}"]
    assert used and used.keys() == budget.keys(), f"used: {used}"
    over = {
        kernel: asdict(resources)
        for kernel, resources in used.items()
        if any(value > budget[kernel][name] for name, value in asdict(resources).items())
    }
    assert not over, f"over budget: {over}"


@pytest.mark.parametrize("source", HOST_CODE, ids=name_of)
def test_host_code_compiles_without_warning(source: Path, tmp_path: Path) -> None:
    run_nvcc(*compile_options(), "-c", source, "-o", tmp_path / "host.o")


@pytest.mark.parametrize("source", KERNELS, ids=name_of)
def test_launchers_know_no_torch_and_no_triple_chevron(source: Path, tmp_path: Path) -> None:
    dependencies = run_nvcc(*compile_options("80"), "-M", source)
    assert "cuda_runtime" in dependencies
    assert "/torch/" not in dependencies
    assert "<<<" not in source.read_text()


@pytest.mark.parametrize("source", DEVICE_CODE, ids=name_of)
def test_device_code_includes_no_host_header(source: Path) -> None:
    """With no system header to be found, preprocessing as NVRTC does still succeeds."""
    subprocess.run(
        ["g++", "-x", "c++", "-E", "-nostdinc", "-D__CUDACC__", "-D__CUDACC_RTC__"]
        + [f"-I{CUDA}", f"-I{CUDA / 'include'}", "-o", "/dev/null", str(source)],
        check=True,
    )


@pytest.mark.parametrize("source", ALL_KERNELS, ids=name_of)
def test_nvrtc_compiles_device_code(source: Path) -> None:
    libraries = site_packages("*/lib/libnvrtc.so.*")
    if not libraries:
        pytest.skip("no NVRTC: `pip install nvidia-cuda-nvrtc` (13) or nvidia-cuda-nvrtc-cu12")
    for builtins in libraries[0].parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins))  # NVRTC looks for it by name only
    nvrtc = ctypes.CDLL(str(libraries[0]))
    program = ctypes.c_void_p()
    text = f'#include "{name_of(source)}"\nusing namespace m3i; using namespace m3i::{source.stem};'
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), text.encode(), b"test.cu", 0, None, None
    )
    assert created == 0
    for kernel in json.loads((source.parent / "budget.json").read_text())["sm_80"]:
        assert nvrtc.nvrtcAddNameExpression(program, kernel.encode()) == 0  # instantiates it
    for architecture in ARCHITECTURES:
        target = f"compute_{architecture}"  # PTX alone: ptxas has its test above
        options = [f"-arch={target}", "-std=c++17", f"-I{CUDA}", f"-I{CUDA / 'include'}"]
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), encoded)
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        assert status == 0 and not log.value, log.value.decode()


def test_cmake_lists_every_source_once_and_sorted() -> None:
    text = (ROOT / "CMakeLists.txt").read_text()
    listed = {
        name: re.findall(r"cuda/(\S+)", body)
        for name, body in re.findall(r"set\((M3I_\w+_SOURCES)\n(.*?)\n\)", text, re.DOTALL)
    }
    on_disk = {
        "M3I_CPU_SOURCES": [CUDA / "bindings.cpp", *CUDA.glob("*/*_cpu*.cpp")],
        "M3I_CUDA_SOURCES": [*HOST_CODE, *KERNELS],
    }
    assert listed == {name: sorted(map(name_of, paths)) for name, paths in on_disk.items()}
