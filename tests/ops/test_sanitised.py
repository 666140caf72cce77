"""The ops' tests on a build of _C that ends the process at undefined behaviour or a bad access.

AddressSanitizer sees the CPU kernels' accesses outside an allocation, UndefinedBehaviorSanitizer
their overflows, shifts and misaligned accesses. The emulator does the same for CUDA kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from m3i_fast.op_registry import OPS

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "sanitised"
FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"

# They go through no line that others do not, and take three of seven minutes.
LEFT_OUT = (
    "dcnv3/test_dcnv3.py::test_as_accurate_as_torch[",
    "boltzmann/test_boltzmann.py::test_hard_cases[",
    "boltzmann/test_ranks.py",
)
# Loops over rows that the others have too.
BY_NIGHT = ("add_layer_norm", "gaussian", "mask_mix")

# Found first in every process below, those that a test starts too.
_SITE = """\
import sys
from importlib.util import spec_from_file_location


class Sanitised:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return spec_from_file_location(name, {library!r}) if name == "m3i_fast._C" else None


sys.meta_path.insert(0, Sanitised)
"""
_USED = "import m3i_fast.ops, sys; print(sys.modules['m3i_fast._C'].__file__)"


def _run(*command: str | Path, **environment: str) -> str:
    """What it printed; fails the test, with that, where the command fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # CMake's, and Ninja's
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, "PATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-20_000:]
    return done.stdout


def _library_of_gcc(name: str) -> str:
    return _run("g++", f"-print-file-name={name}").strip()


@pytest.fixture(scope="module")
def sanitised() -> dict[str, str]:
    """The environment in which m3i_fast._C is the sanitised build; made anew where a source is."""
    options = ["-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}", "-DM3I_CUDA=OFF"]
    options += ["-DCMAKE_CXX_COMPILER=g++", f"-DCMAKE_CXX_FLAGS={FLAGS}"]
    _run("cmake", "-S", ROOT, "-B", BUILD, *options)
    _run("cmake", "--build", BUILD)
    site = BUILD / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(_SITE.format(library=str(BUILD / "_C.abi3.so")))
    environment = {
        # The runtime comes before everything else, with the library whose throw it wraps.
        "LD_PRELOAD": f"{_library_of_gcc('libasan.so')} {_library_of_gcc('libstdc++.so')}",
        # Python's own allocations outlive it.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(site),
        "OMP_NUM_THREADS": "1",
    }
    used = _run(sys.executable, "-c", _USED, **environment)
    assert used.split() == [str(BUILD / "_C.abi3.so")]
    return environment


@pytest.mark.cuda
@pytest.mark.parametrize(
    "op",
    [pytest.param(op.name, marks=pytest.mark.nightly if op.name in BY_NIGHT else ()) for op in OPS],
)
def test_ops_pass_their_tests_without_a_report(op: str, sanitised: dict[str, str]) -> None:
    """On all instruction sets that the tests go through, but not under the emulator."""
    files = sorted((Path(__file__).parent / op).glob("test_*.py"))
    files = [file for file in files if file.stem != "test_cuda"]
    assert files
    options = [
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        "not cuda and not matrix and not nightly",
        "-k",
        "not emulated",
    ]
    options += ["--capture=sys"]  # a report goes past Python, and the process ends with it
    options += [f"--deselect=tests/ops/{name}" for name in LEFT_OUT]
    _run(sys.executable, "-m", "pytest", *options, *files, **sanitised)
