"""The first hour on the null H100: every step runs, what fails is repeated, no row stays.

The kernels are those of build/cuda (--no-build), and nothing of what they compute is looked at
(--launch-only): the tests that need a GPU are collected, benchmarks compare nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from m3i_fast.op_registry import OPS
from scripts.gpu.reading import checks_of_program
from scripts.null_cuda import environment, program
from tests.shared.cuda.driver import build_driver

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
    """The first answer, where training fails: no other of its steps launches so much.

    Registers then get the digest of another build.
    """
    out = tmp_path_factory.mktemp("hour") / "out"
    done = start(out, *LAUNCHED, "--first", fail="cudaLaunchKernel:1500:719")
    (out / "index.html").rename(out / "first.html")  # the next start writes it anew
    found = results(out)
    found["registers"]["build"] = "another"
    (out / "results.json").write_text(json.dumps([*found.values()]))
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


def test_a_second_start_repeats_what_failed_or_has_another_build_and_goes_on(
    whole: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, done = whole
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    found = results(out)
    ran = {name for name, each in found.items() if each["has_passed"]}
    new = {name for name in ran if not found[name]["is_earlier"]}
    assert ran - new == {"doctor", "kernels"}
    repeated = {"training", "registers"}
    benchmarks = {"gaussian", "mask_mix", "internimage"}
    assert new == {*repeated, "training-fp8", "tests", *benchmarks, "predicted"}
    assert "nothing is compared" in (out / "predicted.md").read_text()
    for name in found.keys() - ran:
        assert found[name]["outcome"].startswith("left out: "), name
    with tarfile.open(out.with_name("out.tar.gz")) as packed:
        names = set(packed.getnames())
    assert {"out/index.html", "out/results.json", "out/training.txt", "out/env.json"} <= names
    facts = json.loads((out / "env.json").read_text())
    assert facts["gpu"] == "NVIDIA H100 80GB HBM3 (null CUDA runtime)"
    assert facts["modules"] == ["m3i_fast._C", "m3i_fast._C_cuda"]
    modules = [find_spec(name) for name in facts["modules"]]
    content = b"".join(Path(str(module and module.origin)).read_bytes() for module in modules)
    assert facts["build"] == hashlib.sha256(content).hexdigest()
    assert {found[name]["build"] for name in ran} == {facts["build"]}


def test_each_step_tells_what_it_expected_and_got(
    whole: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """The training has the kernels and launches that expected.json lists for the card."""
    out, _ = whole
    found = results(out)
    page = (out / "index.html").read_text()
    assert all(f'<h2 id="{name}">' in page for name in found)
    *calls, compared = found["kernels"]["checks"]
    assert compared["what"] == "kernels of a bf16 step that a call has" and compared["holds"]
    assert {check["what"].partition(" on cuda")[0] for check in calls} == {op.title for op in OPS}
    assert all(check["holds"] for check in calls)
    (tests,) = found["tests"]["checks"]
    assert tests["holds"] and tests["got"].endswith("collected, none run")
    assert int(tests["got"].split()[0]) > 200
    checks = {check["what"]: check for check in found["training"]["checks"]}
    assert checks["host synchronisations of a step"]["holds"]
    expected = json.loads((ROOT / "scripts" / "gpu" / "expected.json").read_text())["9.0"]
    assert torch.__version__.startswith(expected["torch"])
    ours = {w.removesuffix(" in a step"): c for w, c in checks.items() if w.endswith("> in a step")}
    assert ours.keys() == expected["kernels"].keys()
    assert {(check["kind"], check["holds"]) for check in ours.values()} == {("must", True)}
    launches = checks["kernels of a step in all"]
    assert launches["expected"] == launches["got"] == str(expected["launches"])
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


def test_a_driver_that_is_too_old_ends_the_start(tmp_path: Path) -> None:
    """A driver of CUDA 12.4 for this torch, which finds so itself."""
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "scripts.gpu", "--no-build"],
        env={**os.environ, **build_driver(tmp_path), "OUT": str(out)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and not out.exists(), done.stdout + done.stderr
    assert "driver on your system is too old (found version 12040)" in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"torch {torch.__version__} in {sys.executable}: ")
    assert f"got one for CUDA {torch.version.cuda}, and the driver, which runs CUDA 12.4" in line


# ---- Losses --------------------------------------------------------------------------------------

COMPUTED = """
import sys
import torch
from m3i_fast.benchmarks.launches.on_host import ComputeOnHost
from m3i_fast.ops.library import m3i
from scripts.gpu.programs import first_step

torch.backends.cudnn.enabled = False
factor = float(sys.argv[1])

def planted(*args):
    views = m3i.mask_mix(*args)
    return views * factor if factor != 1 and views.dtype == torch.bfloat16 else views

with ComputeOnHost({m3i.mask_mix.default: planted}):
    first_step.main()
"""


def computed(folder: Path, *command: str, devices: int = 1) -> list[tuple[str, bool]]:
    """Run first_step.py on null devices that compute; return whether the losses of each hold."""
    (folder / "computed.py").write_text(COMPUTED)
    trace = folder / "trace-%p.jsonl" if devices > 1 else folder / "trace.jsonl"
    done = subprocess.run(
        program(*command),
        env={**environment(LIBRARIES, devices=devices, trace=trace), "PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    checks = [c for c in checks_of_program(folder, done.stdout) if c.what.startswith("losses")]
    return [(check.what.removeprefix("losses of 3 steps, "), bool(check.holds)) for check in checks]


@pytest.mark.parametrize(("factor", "right"), [("1", True), ("1.5", False), ("nan", False)])
def test_losses_are_the_cpus_unless_a_bf16_kernel_is_wrong(
    tmp_path: Path, factor: str, right: bool
) -> None:
    """Planted: mixed views in bf16 that are 1.5 times as large, or NaN."""
    assert computed(tmp_path, "computed.py", factor) == [("fp32", True), ("bf16", right)]


def test_losses_of_two_gpus_are_those_of_one(tmp_path: Path) -> None:
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    found = computed(tmp_path, *ranks, "computed.py", "1", "--ranks", devices=2)
    assert found == [("DDP on 2 GPUs", True), ("FSDP2 on 2 GPUs", True)]
