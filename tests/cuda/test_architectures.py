"""The default build has code of its own for every generation of cards from Ampere on."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from m3i_fast.doctor.probes import fatbin_architectures
from tests.shared.cuda.nvcc import (
    CUDA,
    ROOT,
    compile_options,
    find_nvcc,
    name_of,
    run_nvcc,
    short_ptxas,
)

# By what the configuration is told: what is in a compiled source.
ALL = ["compute_80", "sm_100", "sm_120", "sm_80", "sm_90a"]
BUILDS = [
    pytest.param("", ALL, id="default"),
    pytest.param("120-real", ["sm_120"], id="CUDAARCHS"),
]


@pytest.mark.parametrize(("asked", "expected"), BUILDS)
def test_compiled_code_is_of_every_generation(
    asked: str, expected: list[str], tmp_path: Path
) -> None:
    """Configured twice, as a rebuild does: what is decided first is not forgotten."""
    release = re.search(r"release (\d+)\.(\d+)", run_nvcc("--version"))
    assert release is not None
    if tuple(map(int, release.groups())) < (12, 8):
        expected = [name for name in expected if name not in ("sm_100", "sm_120")]
        if not expected:
            pytest.skip("nvcc is older than Blackwell")
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if cmake is None:
        pytest.skip("needs cmake")
    environment = {name: v for name, v in os.environ.items() if name != "CUDAARCHS"}
    environment |= {"CUDAARCHS": asked} if asked else {}
    command = [cmake, "-S", ROOT, "-B", tmp_path, "-DM3I_CUDA=ON", "-G", "Unix Makefiles"]
    command += [f"-DCMAKE_CUDA_COMPILER={find_nvcc()}", f"-DPython_EXECUTABLE={sys.executable}"]
    command += ["-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", "-DCMAKE_BUILD_TYPE=Release"]
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    (entry,) = (each for each in commands if each["file"].endswith("mask_mix/sm80/launch.cu"))
    compile_it = shlex.split(entry["command"])
    compiled = tmp_path / "mask_mix.o"
    compile_it[compile_it.index("-o") + 1] = str(compiled)
    subprocess.run(compile_it, cwd=entry["directory"], check=True)
    assert fatbin_architectures(compiled) == expected


def when(source: Path, architecture: str) -> list[pytest.MarkDecorator]:
    """By night the one that takes a minute, and all but the newest architecture."""
    by_night = architecture != "120" or source.parents[1].name == "boltzmann"
    return [pytest.mark.nightly] if by_night else []


@pytest.mark.parametrize(
    ("source", "architecture"),
    [
        pytest.param(source, number, marks=when(source, number), id=f"{name_of(source)}-{number}")
        for source in sorted(CUDA.glob("*/sm*/*.cu"))
        for number in ("100", "120")
    ],
)
def test_kernels_compile_for_blackwell(source: Path, architecture: str, tmp_path: Path) -> None:
    """Without a warning, in the shared memory that they have on Ampere, and hardly spilling.

    ptxas spills up to 16 bytes of float32 and 76 of float64, a kernel of the likelihood, on 12.0.
    """
    options = [*compile_options(architecture), "-Xptxas=-v", "-o", tmp_path / "kernel.o", "-c"]
    used = short_ptxas(run_nvcc(*options, source))
    budget = json.loads((source.parents[1] / "budget.json").read_text())["sm_80"]
    assert used and used.keys() <= budget.keys()
    over = {
        kernel: asdict(resources)
        for kernel, resources in used.items()
        if resources.spill_bytes > budget[kernel]["spill_bytes"] + 80
        or resources.shared_bytes > budget[kernel]["shared_bytes"]
    }
    assert not over, f"more than on sm_80: {over}"
