"""`make gpu`, as far as it goes without a GPU: what it asks for, and a dry run of all the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from scripts import gpu

ROOT = Path(__file__).resolve().parent.parent


def run_gpu(
    *arguments: str, python: str | Path = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-m", "scripts.gpu", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_all_that_is_missing_is_named_before_any_work(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", symlinks=True)
    python, out = tmp_path / "bare" / "bin" / "python", tmp_path / "out"
    done = run_gpu("--dry-run", python=python, PATH=str(tmp_path), OUT=str(out), CXX="g++")
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    for name, advice in {
        "torch": f"install it for {python}, or name another python: make gpu PYTHON=...",
        "pytest": "install it for",
        "rich": "install it for",
        "g++": "install a C++17 compiler, or set CXX",
        "cmake": "install CMake 3.26 or newer",
    }.items():
        (line,) = [line for line in lines if line.startswith(f"{name}: not ")]
        assert advice in line
    assert len(lines) == 5, lines
    assert not out.exists()


def test_compiler_and_card_are_asked_for() -> None:
    nvcc, card = gpu.missing_gpu("99.0", None)
    assert nvcc.startswith("nvcc: expected one of CUDA 99") and "CUDACXX" in nvcc
    assert card.startswith("GPU: torch sees none") and "--dry-run" in card
    (line,) = gpu.missing_gpu(None, None)
    assert line.startswith("torch: a build with CUDA is needed") and "PYTHON=" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_nothing_is_built(tmp_path: Path) -> None:
    done = run_gpu(OUT=str(tmp_path / "out"))
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert ("GPU: torch sees none" if torch.version.cuda else "torch: a build") in done.stderr


@pytest.mark.slow
def test_dry_run_builds_loads_and_collects(tmp_path: Path) -> None:
    done = run_gpu("--dry-run", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((tmp_path / "env.json").read_text())
    assert facts["torch"] == torch.__version__ and facts["modules"][0] == "m3i_fast._C"
    assert ("m3i_fast._C_cuda" in facts["modules"]) == (torch.version.cuda is not None)
    (suite,) = ElementTree.parse(tmp_path / "tests.xml").getroot()
    assert int(suite.attrib["tests"]) > 100 and suite.attrib["errors"] == "0"
    assert suite.attrib["skipped"] == suite.attrib["tests"]
    assert "import m3i_fast.benchmarks.dcnv3" in (tmp_path / "log.txt").read_text()
    assert not list(tmp_path.glob("*.jsonl"))


def collect(folder: Path, source: str, *options: str) -> subprocess.CompletedProcess[str]:
    """pytest with this folder's conftest on one file of a session that has another, of one test."""
    (folder / "test_import.py").write_text(source)
    (folder / "test_nothing.py").write_text("def test_nothing(): pass\n")
    command = [sys.executable, "-m", "pytest", "-ra", "-p", "tests.conftest", *options, str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_missing_package_skips_its_tests_by_the_option_alone(tmp_path: Path) -> None:
    source = "import no_such_package.part\n"
    skipped = collect(tmp_path, source, "--skip-missing-packages")
    assert skipped.returncode == 0 and "1 passed, 1 skipped" in skipped.stdout, skipped.stdout
    assert "no_such_package is not installed" in skipped.stdout
    failed = collect(tmp_path, source)
    assert failed.returncode == 2 and "1 error" in failed.stdout, failed.stdout


def test_a_missing_module_of_ours_is_an_error(tmp_path: Path) -> None:
    done = collect(tmp_path, "import m3i_fast.no_such_module\n", "--skip-missing-packages")
    assert done.returncode == 2 and "No module named 'm3i_fast.no_such" in done.stdout, done.stdout
