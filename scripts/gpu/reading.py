"""What the steps of `make gpu` found out, read from their outputs and files."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from xml.etree import ElementTree

from scripts.gpu.steps import ROOT, Check
from scripts.install import TESTED_CUDA

NAMED = 5  # names of one kind that a check lists at most


def checks_of_program(_: Path, output: str) -> list[Check]:
    """Return the checks that a program printed, a line of JSON after `check ` each."""
    lines = (line for line in output.splitlines() if line.startswith("check "))
    return [Check(**json.loads(line.removeprefix("check "))) for line in lines]


def findings_of_doctor(_: Path, output: str) -> list[Check]:
    """Return a note for each finding of `m3i-fast doctor --json`; what is absent is no fault."""
    findings = json.loads(output[output.index("{\n") :])["findings"]
    return [
        Check(
            what=finding["subject"],
            expected="usable",
            got=finding["detail"],
            holds=None if finding["level"] == "absent" else finding["level"] == "ok",
            kind="note",
            source=f"to type: {finding['fix']}" if finding["fix"] else "",
        )
        for finding in findings
    ]


# ---- Tests ---------------------------------------------------------------------------------------


def tests_of(report: str, out: Path, output: str) -> list[Check]:
    """Return what a junit report in the folder tells, or what was collected where there is none."""
    if collected := re.search(r"(\d+)(?:/\d+)? tests? collected", output):
        got = f"{collected[1]} collected, none run"
        holds = int(collected[1]) > 0
        return [Check(what="tests", expected="collected without an error", got=got, holds=holds)]
    path = out / report
    if not path.is_file():
        return [Check(what="tests", expected="a report", got=f"no {report}", holds=False)]
    (suite,) = ElementTree.parse(path).getroot()
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    wrong = [case for case in suite if {"failure", "error"} & {child.tag for child in case}]
    names = [f"{case.get('classname')}::{case.get('name')}" for case in wrong]
    bad = counts["failures"] + counts["errors"]
    got = f"{bad} failed of {counts['tests']}, {counts['skipped']} skipped"
    if names:
        got += f": {', '.join(names[:NAMED])}{' and others' if len(names) > NAMED else ''}"
    return [Check(what="tests", expected="0 failed", got=got, holds=bad == 0)]


# ---- Registers -----------------------------------------------------------------------------------


def registers_of(capability: tuple[int, int] | None, _: Path, output: str) -> list[Check]:
    """Compare the registers of every kernel with its budget, by architecture.

    Of a card only the code that it takes is compared, and of a build without a card all of it. The
    ptxas of another CUDA than that of the budgets may give a kernel more: a note.
    """
    used, has_budget = _resources(output), False
    ptx = re.search(r"ptx code:.*?code version = \[(\d+),(\d+)\]", output, re.DOTALL)
    cuda = f"{int(ptx[1]) + 4}.{ptx[2]}" if ptx else "unknown"  # CUDA 13.0 has PTX 9.0
    checks = []
    for path in sorted((ROOT / "cuda").glob("*/budget.json")):
        for architecture, budget in json.loads(path.read_text()).items():
            if capability and not architecture.startswith("sm_{}{}".format(*capability)):
                continue
            has_budget = True
            found = {k: v for k, v in used.get(architecture, {}).items() if k in budget}
            if not found:
                continue
            over = {k: v for k, v in found.items() if v > budget[k]["registers"]}
            got = f"all {len(found)} within" if not over else f"over: {over}"
            checks.append(
                Check(
                    what=f"registers of {path.parent.name} for {architecture}",
                    expected=f"{len(budget)} kernels within the budget",
                    got=got,
                    holds=not over and len(found) == len(budget),
                    kind="must" if cuda == TESTED_CUDA else "note",
                    source=f"{path.relative_to(ROOT)}, CUDA {TESTED_CUDA}; here CUDA {cuda}",
                )
            )
    if checks:
        return checks
    got = f"kernels for {', '.join(sorted(used))}" if used else "none found"
    holds = False if has_budget or not used else None  # a B200 has kernels, and no budget
    return [Check(what="registers", expected="kernels with a budget", got=got, holds=holds)]


def _resources(output: str) -> dict[str, dict[str, int]]:
    """Return registers by kernel and architecture from `cuobjdump --dump-resource-usage`."""
    names = sorted(set(re.findall(r"^ Function (\S+):", output, re.MULTILINE)))
    shown = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    short = {}
    for mangled, name in zip(names, shown.stdout.splitlines(), strict=True):
        found = re.search(r"(\w+(?:<.*>)?)\(", name)
        short[mangled] = found[1].replace("m3i::", "") if found else mangled
    used: dict[str, dict[str, int]] = {}
    architecture = kernel = ""
    for line in output.splitlines():
        if found := re.match(r"arch = (sm_\w+)", line):
            architecture = found[1]
        elif found := re.match(r" Function (\S+):", line):
            kernel = short[found[1]]
        elif found := re.match(r"\s+REG:(\d+)", line):
            used.setdefault(architecture, {})[kernel] = int(found[1])
    return used


# ---- Benchmarks ----------------------------------------------------------------------------------


def figures_of(subject: str, out: Path, _: str) -> list[Check]:
    """Return a figure for each row of a benchmark's last run: our time, how much slower others are.

    Predictions stand beside them in the step `predicted`.
    """
    path = out / f"{subject}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [
        Check(
            what=f"{subject}: {_setting(row['figures'])}",
            expected="",
            got=_times(row["figures"]),
            holds=None,
        )
        for row in rows
        if row["run_id"] == rows[-1]["run_id"]
    ]


def _setting(figures: dict[str, object]) -> str:
    told = ("timings", "times_slower_than_ours", "kind", "device", "num_threads")
    plain = {k: v for k, v in figures.items() if k not in told and isinstance(v, (int, str))}
    return ", ".join(f"{value}" if key in ("dtype", "pass") else f"{key} {value}"
                     for key, value in list(plain.items())[:6])  # fmt: skip


def _times(figures: dict[str, dict[str, dict[str, float]]]) -> str:
    times = {name: timing["median_ms"] for name, timing in figures.get("timings", {}).items()}
    ours = times.pop("m3i_fast", None)
    if ours is None:
        return ", ".join(f"{name} {ms:.3g} ms" for name, ms in times.items()) or "see its output"
    others = ", ".join(f"{name} {ms / ours:.2f} times as long" for name, ms in times.items())
    return f"{ours:.3g} ms; {others}" if others else f"{ours:.3g} ms"
