"""The first hour on the null H100: every step runs, what fails is repeated, no row stays.

The kernels are those of build/cuda (--no-build), and nothing of what they compute is looked at
(--launch-only): the tests that need a GPU are collected, benchmarks compare nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from scripts.null_cuda import environment

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ROOT / "build" / "null"
LEDGER = ROOT / "benchmarks" / "results"
LAUNCHED = ("--no-build", "--launch-only")


def start(out: Path, *arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
    """Start the hour on the null H100 in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "scripts.gpu", *arguments],
        env={**environment(LIBRARIES, card="h100", **settings), "OUT": str(out)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )


def results(out: Path) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in json.loads((out / "results.json").read_text())}


@pytest.fixture(scope="module")
def ledger_before() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in LEDGER.iterdir()}


@pytest.fixture(scope="module")
def spoilt(
    tmp_path_factory: pytest.TempPathFactory, ledger_before: dict[str, bytes]
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The first answer, where training fails: no other of its steps launches so much."""
    out = tmp_path_factory.mktemp("hour") / "out"
    done = start(out, *LAUNCHED, "--first", fail="cudaLaunchKernel:1500:719")
    (out / "index.html").rename(out / "first.html")  # the next start writes it anew
    return out, done


@pytest.fixture(scope="module")
def whole(
    spoilt: tuple[Path, subprocess.CompletedProcess[str]],
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The whole hour in the folder where the first answer has failed."""
    return spoilt[0], start(spoilt[0], *LAUNCHED)


def test_a_step_that_fails_is_marked_and_the_next_one_runs(
    spoilt: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, done = spoilt
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr
    assert done.stdout.splitlines()[-3] == "training failed"
    assert "cudaErrorLaunchFailure" in (out / "training.txt").read_text()
    page = (out / "first.html").read_text()
    assert "On the null CUDA runtime as NVIDIA H100 80GB HBM3: launched, and nothing" in page
    assert "Failed: training." in page
    assert page.index('<h2 id="training">') < page.index('<h2 id="registers">')


def test_a_second_start_repeats_the_failed_step_and_goes_on(
    whole: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, done = whole
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    found = results(out)
    ran = {name for name, each in found.items() if each["has_passed"]}
    new = {name for name in ran if not found[name]["is_earlier"]}
    assert ran - new == {"doctor", "kernels", "registers"}
    assert new == {"training", "tests", "gaussian", "mask_mix", "internimage", "predicted"}
    assert "nothing is compared" in (out / "predicted.md").read_text()
    for name in found.keys() - ran:
        assert found[name]["outcome"].startswith("left out: "), name
    with tarfile.open(out.with_name("out.tar.gz")) as packed:
        names = set(packed.getnames())
    assert {"out/index.html", "out/results.json", "out/training.txt", "out/env.json"} <= names
    facts = json.loads((out / "env.json").read_text())
    assert facts["gpu"] == "NVIDIA H100 80GB HBM3 (null CUDA runtime)"
    assert facts["modules"] == ["m3i_fast._C", "m3i_fast._C_cuda"]


def test_each_step_tells_what_it_expected_and_got(
    whole: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """The training has the kernels and launches that expected.json tells of the card."""
    out, _ = whole
    found = results(out)
    page = (out / "index.html").read_text()
    assert all(f'<h2 id="{name}">' in page for name in found)
    kernels = found["kernels"]["checks"]
    assert len(kernels) == 6 and all(check["holds"] for check in kernels)
    (tests,) = found["tests"]["checks"]
    assert tests["holds"] and tests["got"].endswith("collected, none run")
    assert int(tests["got"].split()[0]) > 200
    checks = {check["what"]: check for check in found["training"]["checks"]}
    assert checks["host synchronisations of a step"]["holds"]
    ours = {w: c for w, c in checks.items() if w.endswith("_kernel in a step")}
    assert len(ours) == 23 and all(check["holds"] for check in ours.values())
    assert "boltzmann_sums_hopper_kernel in a step" in ours
    launches = checks["kernels of a step in all"]
    assert launches["expected"].split(",")[0] == launches["got"]
    budgets = {c["what"] for c in found["registers"]["checks"]}
    ops = ("add_layer_norm", "boltzmann", "dcnv3", "gaussian", "mask_mix", "views")
    assert budgets == {f"registers of {op} for sm_90a" for op in ops}


def test_no_row_of_it_enters_the_ledger(
    whole: tuple[Path, subprocess.CompletedProcess[str]], ledger_before: dict[str, bytes]
) -> None:
    out, _ = whole
    assert {path.name: path.read_bytes() for path in LEDGER.iterdir()} == ledger_before
    assert [path.name for path in out.glob("*.jsonl")] == ["training-trace.jsonl"]
    rows = (out / "unrecorded" / "mask_mix.jsonl").read_text().splitlines()
    assert rows and all("(null CUDA runtime)" in json.loads(r)["machine"]["gpu"] for r in rows)


def test_without_the_flag_the_null_runtime_is_refused(tmp_path: Path) -> None:
    done = start(tmp_path / "out", "--no-build")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    (line,) = done.stderr.splitlines()
    assert "got the null CUDA runtime; --launch-only runs what" in line
