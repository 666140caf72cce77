"""The wheel: one binary for every Python from 3.10, with the mapped folders and all their files."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

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


@pytest.mark.slow
def test_wheel_has_everything_and_works(tmp_path: Path) -> None:
    build = [
        "--no-build-isolation",
        "--no-deps",
        f"--config-settings=build-dir={tmp_path / 'build'}",
    ]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    command = [*pip, "wheel", *build, "--config-settings=cmake.define.M3I_CUDA=OFF"]
    subprocess.run([*command, "--wheel-dir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name

    listing = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listing += ["m3i_fast", "pipelines", "benchmarks"]
    files = subprocess.run(listing, check=True, capture_output=True, text=True).stdout.split()
    expected = {file if file.startswith("m3i_fast/") else f"m3i_fast/{file}" for file in files}
    expected = {file for file in expected if not file.startswith("m3i_fast/benchmarks/results/")}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {"_C.abi3.so", "_nvtx.abi3.so", f"_dali-{version('nvidia-dali-cuda130')}.so"}
    assert packed == expected | {f"m3i_fast/{module}" for module in modules}

    # -S: without the .pth file of the editable install, which would answer first.
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    command = [sys.executable, "-S", "-c", USE, str(site), sysconfig.get_path("purelib")]
    used = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert all(line.startswith(str(site)) for line in used.stdout.split()), used.stdout
