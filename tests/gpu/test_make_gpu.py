"""`make gpu`, as far as it goes without a GPU: what it asks for, its steps, and small sizes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from m3i_fast.benchmarks.ledger.rows import read_rows
from m3i_fast.benchmarks.subjects import SUBJECTS
from scripts.gpu import __main__ as hour
from scripts.gpu import machine, plan, reading
from scripts.gpu.page import write_page
from scripts.gpu.plan import Machine
from scripts.gpu.steps import Runner, Step, read_results
from tests.shared.cuda.driver import build_driver

ROOT = Path(__file__).resolve().parents[2]


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
    done = run_gpu(python=python, PATH=str(tmp_path), OUT=str(out), CXX="g++")
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


def test_a_compiler_is_asked_for_and_a_missing_card_is_told() -> None:
    (nvcc,) = machine.missing_nvcc("99.0")
    assert nvcc.startswith("nvcc: expected one of CUDA 99") and "CUDACXX" in nvcc
    assert str(machine.why_no_gpu("13.0", None)).startswith("GPU: torch sees none")
    assert "PYTHON=" in str(machine.why_no_gpu(None, None))
    assert machine.why_no_gpu("13.0", "H100") is None


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build of torch")
def test_a_card_that_torch_cannot_use_ends_the_start(tmp_path: Path) -> None:
    """The build of torch is a CPU build; contract_hour.py has that for another CUDA."""
    out = tmp_path / "out"
    done = run_gpu("--no-build", "--first", OUT=str(out), **build_driver(tmp_path))
    assert done.returncode == 2 and not out.exists(), done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"torch {torch.__version__} in {sys.executable}: ")
    assert "got a CPU build, and the driver, which runs CUDA 12.4, has a Test GPU" in line


# ---- Steps ---------------------------------------------------------------------------------------


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    made = Runner(tmp_path, {"MORE": "yes"}, benchmark_s=100.0)
    yield made
    made.close()


def python(code: str, name: str = "step", **options: Any) -> Step:
    return Step(name=name, command=(sys.executable, "-c", code), **{"limit_s": 60.0, **options})


def printing(path: Path) -> Step:
    code = f"print(open({str(path)!r}).read())"
    return python(code, read=reading.checks_of_program)


def test_a_step_ends_as_it_ends_and_the_next_one_runs(runner: Runner) -> None:
    failed = runner(python("import sys; print('once'); sys.exit(3)"))
    assert failed.has_failed and failed.outcome == "failed with exit status 3"
    assert (runner.out / "step.txt").read_text() == "once\n"
    assert runner(Step(name="none", command=("/no/such",), limit_s=1.0)).has_failed
    passed = runner(python("import os; print(os.environ['MORE'])"))
    assert not passed.has_failed and (runner.out / "step.txt").read_text() == "yes\n"
    left = runner(python("raise SystemExit(1)", missing="no nsys here"))
    assert not left.has_failed and left.outcome == "left out: no nsys here"
    assert [result.has_failed for result in runner.results] == [True, True, False, False]


def test_a_step_that_takes_too_long_is_stopped_with_its_children(runner: Runner) -> None:
    code = (
        "import subprocess, sys; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        "print(child.pid, flush=True); child.wait()"
    )
    stopped = runner(python(code, limit_s=3.0))
    assert stopped.has_failed and stopped.outcome == "stopped after 3 s"
    child = int((runner.out / "step.txt").read_text())
    until = time.monotonic() + 30  # what was killed still has to die
    while is_running(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(process: int) -> bool:
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def test_benchmarks_share_the_time_that_there_is(tmp_path: Path) -> None:
    runner = Runner(tmp_path, {}, benchmark_s=1e-3)
    slow = python("import time; time.sleep(60)", is_benchmark=True)
    assert runner(slow).outcome.startswith("stopped after 0 s")
    late = runner(python("", is_benchmark=True))
    assert late.outcome == "left out: the time of --minutes is used up" and not late.has_failed
    assert runner(python("")).outcome == "passed"
    runner.close()


def test_figures_of_a_card_are_read_and_enter_the_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what is launched only."""
    monkeypatch.setattr(hour, "LEDGER", tmp_path)
    row = json.dumps({"run_id": "a", "figures": {"timings": {"m3i_fast": {"median_ms": 8.0}}}})
    code = f"import os; open(os.environ['M3I_RESULTS'] + '/gaussian.jsonl', 'a').write({row!r})"
    found = {}
    for name, launch_only in (("measured", False), ("launched", True)):
        out = tmp_path / name
        (out / "unrecorded").mkdir(parents=True)
        card = Machine(inventory={}, small=False, card="X", launch_only=launch_only)
        start = hour.Hour(argparse.Namespace(), card, out, "On X.")
        after = partial(start._after_each, [], {})
        runner = Runner(out, start._environment(None), benchmark_s=9.0, after_each=after)
        step = python(code, read=partial(reading.figures_of, "gaussian"))
        found[name] = [check.got for check in runner(step).checks]
        runner.close()
    assert found == {"measured": ["8 ms"], "launched": []}
    assert (tmp_path / "gaussian.jsonl").read_text() == row


def test_a_second_start_repeats_what_has_not_passed(tmp_path: Path) -> None:
    """What failed, what was stopped and what was left out; with again also what passed."""
    counter = tmp_path / "ran.txt"
    note = f"open({str(counter)!r}, 'a').write('{{}} ')"
    steps = [
        python(note.format("good"), "good"),
        python(note.format("bad") + "; raise SystemExit(1)", "bad"),
        python(note.format("late"), "late", missing="no time"),
    ]
    for again in (False, False, True):
        runner = Runner(tmp_path, {}, benchmark_s=1.0, again=again)
        for step in steps:
            runner(step)
        runner.close()
        steps[2] = python(note.format("late"), "late")
    assert counter.read_text().split() == ["good", "bad", "bad", "late", "good", "bad", "late"]


def test_a_second_start_repeats_what_ran_with_another_build_or_command(tmp_path: Path) -> None:
    found = []
    for build, code in (("a", ""), ("a", ""), ("b", ""), ("b", ""), ("b", "pass"), ("b", "pass")):
        runner = Runner(tmp_path, {}, benchmark_s=1.0)
        runner.build = build
        found.append(runner(python(code)).is_earlier)
        runner.close()
    assert found == [False, True] * 3


def test_a_start_that_is_cut_off_loses_no_earlier_result(tmp_path: Path) -> None:
    for names in (("first", "second"), ("first",), ("first", "second")):
        runner = Runner(tmp_path, {}, benchmark_s=1.0)
        results = [runner(python("", name)) for name in names]
        runner.close()
    assert [result.is_earlier for result in results] == [True, True]


def test_what_a_step_finds_is_held_against_what_was_expected(runner: Runner) -> None:
    check = {"what": "a", "expected": "1", "got": "2", "holds": False, "kind": "note"}
    (runner.out / "found.txt").write_text(f"before\ncheck {json.dumps(check)}")
    found = runner(printing(runner.out / "found.txt"))
    assert found.has_passed and found.outcome == "1 of 1 not as expected"
    assert [c.got for c in found.surprises] == ["2"]
    assert read_results(runner.out)["step"].checks == found.checks
    broken = runner(python("print('check {')", "broken", read=reading.checks_of_program))
    assert broken.has_failed and "JSONDecodeError" in broken.checks[0].got
    status = runner(python("raise SystemExit(1)", "status", passing=(0, 1)))
    assert status.has_passed and not status.has_failed


def test_a_wrong_result_fails_the_step_until_it_is_right(tmp_path: Path) -> None:
    """As a NaN among the losses, which no exit status tells. What is noted fails nothing."""
    note = {"what": "launches", "expected": "1", "got": "2", "holds": False, "kind": "note"}
    wrong = {"what": "losses", "expected": "9.6", "got": "nan", "holds": False}
    step = printing(tmp_path / "found.txt")
    outcomes, pages = [], []
    for loss in (wrong, wrong, {**wrong, "holds": True}, wrong):
        (tmp_path / "found.txt").write_text(f"check {json.dumps(note)}\ncheck {json.dumps(loss)}")
        runner = Runner(tmp_path, {}, benchmark_s=1.0)
        result = runner(step)
        runner.close()
        outcomes.append((result.outcome, result.has_failed, result.is_earlier))
        page = write_page(tmp_path, header="", steps=[step], results=runner.results)
        pages.append("Failed: step." in page.read_text())
    assert outcomes[:2] == [("1 of 2 wrong", True, False)] * 2
    assert outcomes[2] == ("1 of 2 not as expected", False, False)
    assert outcomes[3] == ("1 of 2 not as expected", False, True)
    assert pages == [True, True, False, False]


def test_the_page_shows_what_ran_and_what_is_to_come(runner: Runner) -> None:
    first, second = python("print('<said>')", "first"), python("", "second", answers="Why?")
    runner(first)
    page = write_page(runner.out, header="On X.", steps=[first, second], results=runner.results)
    text = page.read_text()
    assert "Still to come: second." in text and "Why?" in text
    assert "&lt;said&gt;" in text and "<said>" not in text
    assert "1 of 1" in text


@pytest.mark.parametrize("small", [False, True])
def test_the_plan_names_what_exists(small: bool, tmp_path: Path) -> None:
    inventory = dict.fromkeys((*machine.SEARCHED, *machine.OPTIONAL, "nvcc"), "there")
    found = list(plan.steps(Machine(inventory=inventory, small=small), tmp_path, ["-x"]))
    assert len({step.name for step in found}) == len(found)
    for step in found:
        for argument in step.command:
            if argument.startswith("tests/"):
                assert (ROOT / argument.partition("::")[0]).is_file()
        if "m3i_fast.benchmarks" in step.command:
            name = step.command[step.command.index("m3i_fast.benchmarks") + 1]
            module = SUBJECTS[name][0].replace(".", "/")
            assert (ROOT / "benchmarks" / f"{module}.py").is_file()
    names = [step.name for step in found if step.is_benchmark]
    assert names == list(plan.BENCHMARKS)
    none = Machine(inventory=dict.fromkeys(inventory), small=small)
    left = {step.name for step in plan.steps(none, tmp_path, []) if step.missing}
    assert {"registers", "sass", "nsys", "nsys-tables", "tune", "training-fp8"} <= left
    assert ("memcheck" in left) == (not small)


def test_steps_of_training_are_left_out_by_the_card() -> None:
    inventory = dict.fromkeys((*machine.SEARCHED, *machine.OPTIONAL, "nvcc"), "there")
    inventory["Transformer Engine"] = None
    found = {}
    for capability, num_gpus in (((9, 0), 1), ((8, 0), 2)):
        card = Machine(inventory=inventory, small=False, capability=capability, num_gpus=num_gpus)
        found[capability] = {s.name for s in plan.more_training_steps(card) if not s.missing}
    assert found[9, 0] == {"training-compiled", "training-fp8"}
    assert found[8, 0] == {"training-compiled", "training-ranks"}


@pytest.mark.nightly  # contract_hour.py has the hour in CI
def test_without_a_gpu_all_runs_in_small_sizes(tmp_path: Path) -> None:
    done = run_gpu("--small", "--minutes", "6", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WITHOUT A GPU (--small)" in done.stdout
    facts = json.loads((tmp_path / "env.json").read_text())
    assert facts["torch"] == torch.__version__ and facts["modules"][0] == "m3i_fast._C"
    assert ("m3i_fast._C_cuda" in facts["modules"]) == (torch.version.cuda is not None)
    (suite,) = ElementTree.parse(tmp_path / "tests.xml").getroot()
    assert int(suite.attrib["tests"]) > 100 and suite.attrib["errors"] == "0"
    assert suite.attrib["skipped"] == suite.attrib["tests"]
    summary = (tmp_path / "summary.md").read_text()
    assert "All steps that could run passed." in summary and "| emulator | passed |" in summary
    measured = set(plan.BENCHMARKS) - {"dcnv3"}  # takes minutes
    for name in measured:
        rows = list(read_rows(name, folder=tmp_path))
        assert rows and all(row["subject"] == name for row in rows), name
        assert f"## {name}" in summary
    assert {path.stem for path in tmp_path.glob("*.jsonl")} == measured


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


def test_a_missing_package_skips_the_tests_on_its_pictures_alike(tmp_path: Path) -> None:
    source = "import sys\nsys.modules['resvg_py'] = None\ndef test_data(dataset): pass\n"
    skipped = collect(tmp_path, source, "--skip-missing-packages")
    assert skipped.returncode == 0 and "1 passed, 1 skipped" in skipped.stdout, skipped.stdout
    failed = collect(tmp_path, source)
    assert failed.returncode == 1 and "1 error" in failed.stdout, failed.stdout


def test_a_missing_module_of_ours_is_an_error(tmp_path: Path) -> None:
    done = collect(tmp_path, "import m3i_fast.no_such_module\n", "--skip-missing-packages")
    assert done.returncode == 2 and "No module named 'm3i_fast.no_such" in done.stdout, done.stdout
