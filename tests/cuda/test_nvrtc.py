"""Device code compiles for NVRTC, without a host header."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from m3i_fast.benchmarks.core.cuda_toolkit import ARCHITECTURES, site_packages
from tests.shared.cuda.nvcc import CUDA, name_of

DEVICE_CODE = sorted([*CUDA.glob("*/*.cuh"), *CUDA.glob("*/sm*/*.cuh")])
# Of each op the file that has all of its kernels.
ALL_KERNELS = [path for path in DEVICE_CODE if path.name == "kernels.cuh"]


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
    """For every architecture, each kernel once in a half and in each wider type that it has.

    nvcc compiles all instantiations (test_compile.py); what NVRTC alone could refuse stands in the
    templates, whose branches go by the size of the type.
    """
    libraries = site_packages("*/lib/libnvrtc.so.*")
    if not libraries:
        pytest.skip("no NVRTC: `pip install nvidia-cuda-nvrtc` (13) or nvidia-cuda-nvrtc-cu12")
    for builtins in libraries[0].parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins))  # NVRTC looks for it by name only
    nvrtc = ctypes.CDLL(str(libraries[0]))
    program = ctypes.c_void_p()
    op = name_of(source).split("/")[0]
    text = f'#include "{name_of(source)}"\nusing namespace m3i; using namespace m3i::{op};'
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), text.encode(), b"test.cu", 0, None, None
    )
    assert created == 0
    for kernel in one_of_each(json.loads((CUDA / op / "budget.json").read_text())["sm_80"]):
        assert nvrtc.nvrtcAddNameExpression(program, kernel.encode()) == 0  # instantiates it
    for architecture in ARCHITECTURES:
        target = f"compute_{architecture}"  # PTX alone: ptxas has its test in test_compile.py
        options = [f"-arch={target}", "-std=c++17", f"-I{CUDA}", f"-I{CUDA / 'include'}"]
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), encoded)
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        assert status == 0 and not log.value, log.value.decode()


def one_of_each(kernels: dict[str, object]) -> Iterator[str]:
    """The first instantiation of each kernel in a half, in float and in double."""
    seen = set()
    for kernel in kernels:
        name, dtype = re.findall(r"\w+", kernel)[:2]
        kind = (name, "half" if "16" in dtype else dtype)
        if kind not in seen:
            seen.add(kind)
            yield kernel
