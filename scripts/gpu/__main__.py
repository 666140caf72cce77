"""Build with plain CMake, run the GPU tests and benchmarks, and keep their output in one folder.

    make gpu [PYTHON=python3.12] [OUT=folder] [ARGS="[--minutes 8] [--small] [pytest's arguments]"]

Nothing is downloaded or installed: python, torch, nvcc and CMake are the machine's own, and the
build goes to build/gpu, where the package is laid out as links to the sources. A step that fails or
takes too long is recorded, and the next one runs. Without a GPU, or with --small, the same steps
run on the CPU: the GPU tests are collected and skipped, the emulator replaces the sanitizer, and
the benchmarks run in small sizes, whose rows are not added to the ledger.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

from scripts import install
from scripts.gpu import machine as here
from scripts.gpu.build import SITE, build, describe
from scripts.gpu.plan import Machine, steps
from scripts.gpu.steps import ROOT, Runner, Step
from scripts.gpu.summary import write_summary

LEDGER = ROOT / "benchmarks" / "results"


def main(arguments: list[str] | None = None) -> int:
    """Run all steps; returns 0 if all passed, 1 if some failed, 2 if a requirement is missing."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="limit of all benchmarks together (8)"
    )
    parser.add_argument(
        "--small", action="store_true", help="run on the CPU in small sizes, also where a GPU is"
    )
    options, for_pytest = parser.parse_known_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes: expected more than 0, got {options.minutes}")
    torch_cuda, card = here.torch_facts() if find_spec("torch") else (None, None)
    reason = "--small" if options.small else here.why_no_gpu(torch_cuda, card)
    problems = [*here.missing_packages(), *here.missing_tools()]
    if torch_cuda is not None and reason is None:
        problems += here.missing_nvcc(torch_cuda)
    if problems:
        sys.stderr.write("\n".join(problems) + "\n")
        return 2

    nvcc = install.find_nvcc(int(torch_cuda.split(".")[0])) if torch_cuda else None
    machine = Machine(inventory=here.inventory(nvcc), small=reason is not None)
    out = _folder(None if machine.small else card)
    environment = {"PYTHONPATH": str(SITE)}
    if machine.small:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "M3I_RESULTS": str(out)}
    runner = Runner(out, environment, benchmark_s=60 * options.minutes)
    header = f"On {card}." if reason is None else f"WITHOUT A GPU ({reason}): small sizes on a CPU."
    runner.say(f"{header}\n")
    before = _sizes()
    wanted: list[Step] = []
    try:
        if build(runner, nvcc):
            if wrong := describe(out, machine.inventory, nvcc):
                runner.fail("describe", wrong)
            else:
                wanted = list(steps(machine, out, for_pytest))
                for step in wanted:
                    runner(step)
    finally:  # also after an interrupt
        _copy_rows(out, before)
        write_summary(out, header=header, steps=wanted, results=runner.results)
        runner.close()
    failed = [result.name for result in runner.results if result.has_failed]
    print(f"{', '.join(failed)} failed" if failed else "all passed", f"results in {out}", sep="\n")
    return 1 if failed else 0


def _folder(card: str | None) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", (card or "none").lower()).strip("-")
    default = ROOT / "results" / f"gpu-{slug}-{datetime.now():%Y-%m-%d-%H%M}"
    out = Path(os.environ.get("OUT") or default).absolute()
    out.mkdir(parents=True, exist_ok=True)
    return out


def _sizes() -> dict[Path, int]:
    return {path: path.stat().st_size for path in LEDGER.glob("*.jsonl")}


def _copy_rows(out: Path, before: dict[Path, int]) -> None:
    """Copy the rows that were added to the ledger, a file a subject."""
    for path in LEDGER.glob("*.jsonl"):
        if new := path.read_bytes()[before.get(path, 0) :]:
            (out / path.name).write_bytes(new)


if __name__ == "__main__":
    sys.exit(main())
