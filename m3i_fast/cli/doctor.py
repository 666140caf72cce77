"""m3i-fast doctor: what this machine can use and, where it cannot, why and what to type."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path

import tyro
from rich.table import Table
from rich.text import Text

from m3i_fast.doctor.findings import FINDERS, Finding, Machine
from m3i_fast.doctor.probes import (
    PROBES,
    Facts,
    ProbeError,
    fatbin_architectures,
    fatbin_ptx_version,
    gather,
)
from m3i_fast.terminal import make_console

MARKS = {
    "ok": Text("ok", "green"),
    "absent": Text("-", "dim"),
    "warning": Text("!", "yellow"),
    "error": Text("x", "red"),
}

# The optional probes and the module that must be there before its import is worth a child process.
OPTIONAL = {
    "transformer_engine": "transformer_engine",
    "apex": "amp_C",
    "cupy": "cupy",
    "nvml": "pynvml",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Doctor:
    """Say what this machine can use. Exit code 0: it can train; 1: something stops it."""

    json: bool = False
    """One JSON object on standard output instead of the table."""


def main(argv: list[str]) -> int:
    command = tyro.cli(Doctor, prog="m3i-fast doctor", args=argv)
    findings = report()
    can_train = all(finding.level != "error" for finding in findings)
    if command.json:
        content = {"can_train": can_train, "findings": [asdict(finding) for finding in findings]}
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
    else:
        show(findings, can_train=can_train)
    return 0 if can_train else 1


def report() -> list[Finding]:
    """Return every finding, in the order to read them; no fault of a library ends the doctor."""
    machine = examine()
    python = Finding(
        subject="Python", level="ok", detail=f"{platform.python_version()}, {sys.executable}"
    )
    return [python, *(finder(machine) for finder in FINDERS), *compilers()]


def examine() -> Machine:
    """Run the probes, each in a child process, as many at once as there are cores."""
    importable = frozenset(name for name in {*OPTIONAL.values(), "apex"} if _finds(name))
    cuda_module = importlib.util.find_spec("m3i_fast._C_cuda")
    wanted = [name for name in PROBES if OPTIONAL.get(name, "") in {"", *importable}]
    if cuda_module is None:
        wanted.remove("kernels_cuda")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        answers = dict(zip(wanted, pool.map(_ask, wanted), strict=True))
    architectures, ptx = None, None
    if cuda_module is not None and cuda_module.origin is not None:
        architectures = tuple(fatbin_architectures(Path(cuda_module.origin)))
        ptx = fatbin_ptx_version(Path(cuda_module.origin))
    return Machine(
        facts={name: answer for name, answer in answers.items() if isinstance(answer, dict)},
        failures={name: answer for name, answer in answers.items() if isinstance(answer, str)},
        versions={_normal(d.metadata["Name"]): d.version for d in distributions()},
        importable=importable,
        cuda_module=architectures,
        ptx=ptx,
        pip=f"{_short(sys.executable)} -m pip",
        in_checkout=(Path(__file__).resolve().parents[2] / "CMakeLists.txt").is_file(),
    )


def compilers() -> list[Finding]:
    """Return a finding for each tool that a build from source uses."""
    findings = []
    for name, pattern in (
        ("g++", r"\d+\.\d+\.\d+"),
        ("nvcc", r"release [\d.]+"),
        ("cmake", r"[\d.]+"),
    ):
        path = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if path is None:
            detail = "not found; only a build from source needs it"
            findings.append(Finding(subject=name, level="absent", detail=detail))
            continue
        shown = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        version = re.search(pattern, shown)
        detail = f"{version.group() if version else 'of unknown version'}, {path}"
        findings.append(Finding(subject=name, level="ok", detail=detail))
    return findings


def show(findings: list[Finding], *, can_train: bool) -> None:
    """Print a table for people, then the commands, unwrapped so that they can be copied."""
    console = make_console()
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        table.add_row(MARKS[finding.level], finding.subject, finding.detail)
    console.print(table)
    for finding in findings:
        if finding.fix:
            console.print(f"\n{finding.subject}:\n  {finding.fix}", soft_wrap=True, highlight=False)
    verdict = ("can train", "green") if can_train else ("cannot train: see x above", "red")
    console.print(Text.assemble("\nThis machine ", verdict))


def _ask(probe: str) -> Facts | str:
    try:
        return gather(probe)
    except ProbeError as error:
        return str(error)


def _finds(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _short(path: str) -> str:
    here = f"{Path.cwd()}/"
    return path.removeprefix(here)
