"""Build with plain CMake, run the GPU tests and benchmarks, keep all that they say in one folder.

    make gpu [PYTHON=python3.12] [OUT=folder] [ARGS="[--dry-run] [pytest's arguments]"]

Nothing is downloaded and nothing installed: python, torch, nvcc and CMake are the machine's own,
the build goes to build/gpu, and the package is laid out there as links to the sources. --dry-run
does all that needs no GPU and uses none: it builds (the CUDA kernels where torch has CUDA and there
is an nvcc), loads what it built, collects the tests, which are skipped, and imports the benchmarks.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

from scripts import install

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"
LEDGER = ROOT / "benchmarks" / "results"
# Those with rows of a GPU, the longest last.
BENCHMARKS = ("mask_mix", "gaussian", "mi_loss", "internimage", "dcnv3")
OLDEST_CMAKE, OLDEST_TORCH = (3, 26), (2, 10)

# An editable install of this package in the same python would be found before any path.
SITECUSTOMIZE = """import sys

own = [f for f in sys.meta_path if "m3i_fast" in getattr(f, "known_source_files", ())]
sys.meta_path[:] = [f for f in sys.meta_path if f not in own]
"""

DESCRIBE = """import json, sys
from dataclasses import asdict
from m3i_fast.observe.environment import environment
from m3i_fast.ops import library

names = ("m3i_fast._C", "m3i_fast._C_cuda")
modules = {name: sys.modules[name].__file__ for name in names if name in sys.modules}
print(json.dumps({**asdict(environment()), "command": "make gpu", "modules": modules}))
"""


# ---- What has to be there ------------------------------------------------------------------------


def missing_packages() -> list[str]:
    elsewhere = f"install it for {sys.executable}, or name another python: make gpu PYTHON=..."
    needed = {
        "torch": "with CUDA, 2.10 or newer",
        "pytest": "the tests need it",
        "rich": "the benchmarks need it",
    }
    found = [
        f"{name}: not installed ({why}); {elsewhere}"
        for name, why in needed.items()
        if find_spec(name) is None
    ]
    if find_spec("torch") and numbers(version := metadata.version("torch")) < OLDEST_TORCH:
        found.append(f"torch: expected 2.10 or newer, got {version}; {elsewhere}")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        found.append(f"Python.h: not found; install the headers of {sys.executable} (python3-dev)")
    return found


def missing_tools() -> list[str]:
    found = []
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        found.append(f"{compiler}: not found; install a C++17 compiler, or set CXX")
    if not shutil.which("cmake"):
        found.append("cmake: not found; install CMake 3.26 or newer, or add it to PATH")
    else:
        shown = subprocess.run(["cmake", "--version"], capture_output=True, text=True).stdout
        if numbers(shown) < OLDEST_CMAKE:
            found.append(f"cmake: expected 3.26 or newer, got {shown.splitlines()[0]}")
    return found


def missing_gpu(torch_cuda: str | None, card: str | None) -> list[str]:
    """Beyond what a dry run needs; `card` is torch's name of the first GPU."""
    if torch_cuda is None:
        return [
            f"torch: a build with CUDA is needed, {sys.executable} has one without; name another "
            "python: make gpu PYTHON=..."
        ]
    found = []
    major = int(torch_cuda.split(".")[0])
    if install.find_nvcc(major) is None:
        found.append(
            f"nvcc: expected one of CUDA {major}, as torch, found none; install NVIDIA's CUDA "
            f"{major} toolkit, or set CUDACXX to its nvcc"
        )
    if card is None:
        found.append("GPU: torch sees none (nvidia-smi tells why); ARGS=--dry-run does the rest")
    return found


def numbers(text: str) -> tuple[int, ...]:
    """(3, 26) of "cmake version 3.26.4"."""
    found = re.search(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def torch_facts() -> tuple[str | None, str | None]:
    """The CUDA version of torch's build, and the name of the first GPU."""
    import torch

    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return torch.version.cuda, card


# ---- Steps ---------------------------------------------------------------------------------------


def run(
    log: TextIO, *command: str | Path, cwd: Path = ROOT, environment: dict[str, str] | None = None
) -> int:
    """One step, shown and logged line by line; its exit status."""
    begun = time.monotonic()
    write(log, f"+ {' '.join(map(str, command))}\n")
    with subprocess.Popen(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as child:
        assert child.stdout
        for line in child.stdout:
            write(log, line)
    write(log, f"  exit status {child.returncode}, {time.monotonic() - begun:.0f} s\n")
    return child.returncode


def write(log: TextIO, text: str) -> None:
    for stream in (log, sys.stdout):
        stream.write(text)
        stream.flush()


Run = Callable[..., int]


def build(run: Run, nvcc: Path | None) -> None:
    """build/gpu/site: the package as it is installed, with the modules built here."""
    generator = "Ninja" if shutil.which("ninja") else "Unix Makefiles"
    configure = ["cmake", "--fresh", "-S", ROOT, "-B", BUILD, "-G", generator]
    configure += ["-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DM3I_CUDA={'ON' if nvcc else 'OFF'}"]
    if nvcc:
        configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
    lay_out()
    for command in (
        configure,
        ["cmake", "--build", BUILD, "--parallel", str(os.cpu_count())],
        ["cmake", "--install", BUILD, "--prefix", SITE],
    ):
        if status := run(*command):
            sys.exit(status)


def lay_out() -> None:
    """Links to the sources, in the folders that pyproject.toml maps them to."""
    package = SITE / "m3i_fast"
    shutil.rmtree(SITE, ignore_errors=True)
    package.mkdir(parents=True)
    for source in (*(ROOT / "m3i_fast").iterdir(), ROOT / "pipelines", ROOT / "benchmarks"):
        if source.name != "__pycache__" and source.suffix != ".so":
            (package / source.name).symlink_to(source)
    (SITE / "sitecustomize.py").write_text(SITECUSTOMIZE)


def describe(run: Run, log: TextIO, out: Path, nvcc: Path | None) -> None:
    """env.json and nvidia-smi.txt; ends the program where not the modules built here are loaded."""
    for tool in filter(None, (nvcc, "cmake")):
        run(tool, "--version")
    if shutil.which("nvidia-smi"):
        shown = subprocess.run(["nvidia-smi", "-q"], capture_output=True, text=True)
        (out / "nvidia-smi.txt").write_text(shown.stdout + shown.stderr)
    done = subprocess.run(
        [sys.executable, "-c", DESCRIBE],
        cwd=SITE,
        env={**os.environ, "PYTHONPATH": str(SITE)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        write(log, done.stderr)
        sys.exit("m3i_fast: what was built does not load; the reason is above")
    facts = json.loads(done.stdout.splitlines()[-1])
    wanted = {"m3i_fast._C", *(["m3i_fast._C_cuda"] if nvcc else [])}
    ours = {name for name, file in facts["modules"].items() if Path(file).is_relative_to(SITE)}
    if ours != wanted:
        sys.exit(f"m3i_fast: expected {sorted(wanted)} of {SITE}, got {facts['modules']}")
    facts["modules"] = sorted(ours)
    (out / "env.json").write_text(json.dumps(facts, indent=2) + "\n")


def test(run: Run, out: Path, arguments: list[str]) -> int:
    paths = f"pythonpath={SITE.relative_to(ROOT)} ."
    selection = ["-m", "gpu", "--skip-missing-packages", "-o", paths]
    report = f"--junitxml={out / 'tests.xml'}"
    return run(sys.executable, "-m", "pytest", *selection, report, *arguments)


def benchmark(run: Run, out: Path, name: str) -> int:
    """The benchmark's exit status; its rows are appended to the ledger and copied to the folder."""
    ledger = LEDGER / f"{name}.jsonl"
    before = ledger.stat().st_size if ledger.exists() else 0
    status = run(sys.executable, "-m", f"m3i_fast.benchmarks.{name}", cwd=SITE)
    if ledger.exists():
        (out / ledger.name).write_bytes(ledger.read_bytes()[before:])
    return status


def main(arguments: list[str] | None = None) -> int:
    """0: all tests passed and all benchmarks ran; 1: some did not; 2: something is missing."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="all that needs no GPU")
    options, for_pytest = parser.parse_known_args(arguments)
    dry_run: bool = options.dry_run
    problems = [*missing_packages(), *missing_tools()]
    torch_cuda, card = torch_facts() if find_spec("torch") else (None, None)
    if not dry_run and find_spec("torch"):
        problems += missing_gpu(torch_cuda, card)
    if problems:
        sys.stderr.write("\n".join(problems) + "\n")
        return 2

    slug = re.sub(r"[^a-z0-9]+", "-", (card or "none").lower()).strip("-")
    default = ROOT / "results" / f"gpu-{slug}-{datetime.now():%Y-%m-%d-%H%M}"
    out = Path(os.environ.get("OUT") or default).absolute()
    out.mkdir(parents=True, exist_ok=True)
    nvcc = install.find_nvcc(int(torch_cuda.split(".")[0])) if torch_cuda else None
    environment = {"PYTHONPATH": str(SITE)} | ({"CUDA_VISIBLE_DEVICES": ""} if dry_run else {})
    with (out / "log.txt").open("w") as log:
        logged: Run = partial(run, log, environment=environment)
        build(logged, nvcc)
        describe(logged, log, out, nvcc)
        statuses = {"tests": test(logged, out, for_pytest)}
        for name in BENCHMARKS:
            if dry_run:
                code = f"import m3i_fast.benchmarks.{name}"
                statuses[name] = logged(sys.executable, "-c", code, cwd=SITE)
            else:
                statuses[name] = benchmark(logged, out, name)
        failed = [name for name, status in statuses.items() if status]
        write(log, f"{', '.join(failed)} failed\n" if failed else "all passed\n")
    print(f"results in {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
