"""The wheel: one binary for every Python from 3.10, with the mapped folders and all their files."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from scripts import wheel_matrix

ROOT = Path(__file__).resolve().parents[2]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
SDIST = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
# A process that is not of the checkout: -S leaves out the .pth file of the editable install.
USE = """
import sys
sys.path[:0] = sys.argv[1:]
import torch
from m3i_fast import benchmarks, ops, pipelines
views = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
pixels = ops.mask_mix(views, torch.zeros(1, 2, 2, dtype=torch.uint8), torch.tensor([[0]]))
assert pixels.shape == (1, 3, 4, 4)
print(ops.__file__, pipelines.__file__, benchmarks.__file__, sep="\\n")
"""


def tracked(*folders: str) -> set[str]:
    """The checkout's files below folders, also those that git does not know yet."""
    listing = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    told = subprocess.run([*listing, *folders], check=True, capture_output=True, text=True)
    return {name for name in told.stdout.split() if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    subprocess.run([sys.executable, "-c", SDIST, folder], check=True, cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """The wheel that the source distribution makes, without CUDA kernels."""
    folder = sdist.parent
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return build_wheel(folder / sdist.name.removesuffix(".tar.gz"), folder, folder / "build", "OFF")


def build_wheel(source: Path, folder: Path, build: Path, m3i_cuda: str) -> Path:
    settings = {"build-dir": build, "cmake.define.M3I_CUDA": m3i_cuda}
    options = [f"--config-settings={name}={value}" for name, value in settings.items()]
    command = [*PIP, "wheel", "--no-build-isolation", "--no-deps", *options]
    subprocess.run([*command, "--wheel-dir", folder, source], check=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.matrix
def test_the_source_distribution_has_what_a_build_reads_and_no_more(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    parts = tracked("m3i_fast", "pipelines", "benchmarks", "cuda")
    left_out = ("benchmarks/results/", "cuda/emulator/", "cuda/null/")
    wanted = {name for name in parts if not name.startswith(left_out)}
    files = {"pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "CHANGELOG.md"}
    files |= {"CITATION.cff", "PKG-INFO", ".gitignore"}
    assert names == wanted | files
    assert sdist.stat().st_size < 4e6


@pytest.mark.matrix
def test_a_wheel_of_it_has_every_file_of_the_tree_and_the_modules(wheel: Path) -> None:
    assert "-cp310-abi3-" in wheel.name
    files = tracked("m3i_fast", "pipelines", "benchmarks")
    expected = {file if file.startswith("m3i_fast/") else f"m3i_fast/{file}" for file in files}
    expected = {file for file in expected if not file.startswith("m3i_fast/benchmarks/results/")}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {"_C.abi3.so", "_nvtx.abi3.so", f"_dali-{version('nvidia-dali-cuda130')}.so"}
    assert packed == expected | {f"m3i_fast/{module}" for module in modules}
    assert "m3i_fast/py.typed" in packed


@pytest.mark.matrix
def test_its_modules_load_on_the_oldest_linux_that_torch_does(wheel: Path) -> None:
    """Read by auditwheel; manylinux_2_28: glibc 2.28, the libstdc++ of GCC 8."""
    asked = wheel_matrix.symbols_asked(wheel)
    wheel_matrix.expect_floor(wheel)
    assert {"libc.so.6", "libstdc++.so.6"} <= asked["versioned_symbols"].keys()


@pytest.mark.matrix
def test_it_works_in_the_place_of_the_checkout(wheel: Path, tmp_path: Path) -> None:
    use_without_the_checkout(wheel, tmp_path)


def test_a_wheel_of_the_compiled_checkout_works_in_its_place(tmp_path: Path) -> None:
    """Compiles nothing: the modules are those of the editable install."""
    (cache,) = (ROOT / "build").glob("cp310-abi3-*/CMakeCache.txt")
    (m3i_cuda,) = re.findall(r"^M3I_CUDA:\w+=(\w+)$", cache.read_text(), re.M)
    use_without_the_checkout(build_wheel(ROOT, tmp_path, cache.parent, m3i_cuda), tmp_path)


def use_without_the_checkout(wheel: Path, folder: Path) -> None:
    site = folder / "site"
    subprocess.run([*PIP, "install", "--no-deps", "--target", site, wheel], check=True)
    command = [sys.executable, "-S", "-c", USE, str(site), sysconfig.get_path("purelib")]
    used = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)
    assert all(line.startswith(str(site)) for line in used.stdout.split()), used.stdout
