"""The first hour on a card: build, try, test and measure, each beside what was expected of it.

    make gpu [PYTHON=python3.12] [OUT=folder] [ARGS="[--first] [--minutes 8] [pytest's arguments]"]

Nothing is downloaded or installed: python, torch, nvcc and CMake are the machine's own, and the
build goes to build/gpu, where the package is laid out as links to the sources. What is most likely
to break and costs least comes first. A step that fails or takes too long is recorded, and the next
one runs; after each the page index.html in the folder is written anew. A second start repeats what
has not passed, and every step if the build has changed. A card that torch cannot use ends the start
before any work. Without a GPU, or with --small, the same steps run on the CPU: the GPU tests are
collected and skipped, the emulator replaces the sanitizer, and the benchmarks run in small sizes,
whose rows are not added to the ledger.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tarfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from scripts import install
from scripts.gpu import machine as here
from scripts.gpu.build import SITE, build, describe, find_installed
from scripts.gpu.page import write_page
from scripts.gpu.plan import BENCHMARKS, Machine, first_steps, steps
from scripts.gpu.steps import ROOT, Runner, Step
from scripts.gpu.summary import write_summary

LEDGER = ROOT / "benchmarks" / "results"


def read_arguments(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return our options and those of pytest."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="limit of all benchmarks together (8)"
    )
    for name, meaning in {
        "--first": "end after the first answer: the machine, each op once, a training step",
        "--again": "repeat also the steps that passed at an earlier start in this folder",
        "--no-build": "take the m3i_fast that this python has installed",
        "--launch-only": "launch, and look at no result: tests are collected, benchmarks compare "
        "nothing, and no row enters the ledger. For the null CUDA runtime (cuda/null)",
        "--small": "run on the CPU in small sizes, also where a GPU is",
    }.items():
        parser.add_argument(name, action="store_true", help=meaning)
    options, for_pytest = parser.parse_known_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes: expected more than 0, got {options.minutes}")
    return options, for_pytest


def missing_requirements(options: argparse.Namespace, facts: here.Facts, small: bool) -> list[str]:
    """List what has to be there or asked for before any work."""
    problems = here.missing_packages()
    if facts.torch is not None and not options.small:
        problems += here.unusable_card(facts)
    if not options.no_build:
        problems += here.missing_tools()
        if facts.cuda is not None and not small:
            problems += here.missing_nvcc(facts.cuda)
    if facts.is_null and not small and not options.launch_only:
        problems.append(
            "GPU: expected one that computes, got the null CUDA runtime; --launch-only runs what "
            "can be launched on it"
        )
    return problems


def main(arguments: list[str] | None = None) -> int:
    """Run all steps; returns 0 if all passed, 1 if some failed, 2 if a requirement is missing."""
    options, for_pytest = read_arguments(arguments)
    facts = here.torch_facts()
    reason = "--small" if options.small else here.why_no_gpu(facts.cuda, facts.card)
    problems = missing_requirements(options, facts, reason is not None)
    installed = find_installed(sys.executable) if options.no_build else None
    if options.no_build and installed is None:
        problems.append(f"m3i_fast: expected it installed in {sys.executable} (--no-build)")
    if problems:
        sys.stderr.write("\n".join(problems) + "\n")
        return 2

    nvcc = install.find_nvcc(int(facts.cuda.split(".")[0])) if facts.cuda else None
    site, kernels = installed or (SITE, None)
    machine = Machine(
        inventory=here.inventory(nvcc),
        small=reason is not None,
        launch_only=options.launch_only,
        card=None if reason else facts.card,
        capability=None if reason else facts.capability,
        num_gpus=0 if reason else facts.num_gpus,
        site=site,
        kernel_module=kernels,
    )
    header = f"On {facts.card}." if reason is None else f"WITHOUT A GPU ({reason}): small sizes."
    if facts.is_null and reason is None:
        header = f"On the null CUDA runtime as {facts.card}: launched, and nothing was computed."
    hour = Hour(options, machine, _folder(facts, machine.small), header)
    return hour.run(nvcc, for_pytest)


@dataclass
class Hour:
    """One start: its options, its machine, its folder, and the line that heads its pages."""

    options: argparse.Namespace
    machine: Machine
    out: Path
    header: str

    def run(self, nvcc: Path | None, for_pytest: list[str]) -> int:
        """Run the steps, write pages and summary, pack the folder; as `main`."""
        wanted = self._steps(for_pytest)
        sizes = {path: path.stat().st_size for path in self.out.glob("*.jsonl")}
        runner = Runner(
            self.out,
            self._environment(nvcc),
            benchmark_s=60 * self.options.minutes,
            again=self.options.again,
            after_each=partial(self._after_each, wanted, sizes),
        )
        runner.say(f"{self.header}\n")
        try:
            if self.options.no_build or build(runner, nvcc):
                built = {"m3i_fast._C"} | (
                    {"m3i_fast._C_cuda"} if self._has_kernels(nvcc) else set()
                )
                try:
                    runner.build = describe(
                        self.out, self.machine.inventory, built, self.machine.site,
                        not self.options.no_build,
                    )  # fmt: skip
                except ValueError as error:
                    runner.fail("describe", str(error))
                else:
                    wanted[:] = self._steps(for_pytest)  # some read the kernels that are built now
                    for step in wanted:
                        runner(step)
        finally:  # also after an interrupt
            self._after_each(wanted, sizes, runner)
            write_summary(self.out, header=self.header, steps=wanted, results=runner.results)
            runner.close()
            packed = pack(self.out)
        failed = [result.name for result in runner.results if result.has_failed]
        print(f"{', '.join(failed)} failed" if failed else "all passed")
        print(f"page {self.out / 'index.html'}", f"all of it {packed}", sep="\n")
        return 1 if failed else 0

    def _has_kernels(self, nvcc: Path | None) -> bool:
        return self.machine.kernel_module is not None if self.options.no_build else nvcc is not None

    def _steps(self, for_pytest: list[str]) -> list[Step]:
        if self.options.first:
            return list(first_steps(self.machine, self.out))
        return list(steps(self.machine, self.out, for_pytest))

    def _environment(self, nvcc: Path | None) -> dict[str, str]:
        unrecorded = self.machine.launch_only and not self.machine.small
        rows = self.out / "unrecorded" if unrecorded else self.out
        environment = {"PYTHONPATH": str(self.machine.site), "M3I_RESULTS": str(rows)}
        if nvcc is not None:
            environment["CUDACXX"] = str(nvcc)
        if self.machine.small:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        return environment

    def _after_each(self, wanted: list[Step], sizes: dict[Path, int], runner: Runner) -> None:
        """Append a card's new rows to the ledger, and write the page of what is known so far."""
        measures = not (self.machine.small or self.machine.launch_only)
        for path in self.out.glob("*.jsonl") if measures else ():
            if path.stem in BENCHMARKS and path.stat().st_size > sizes.get(path, 0):
                with (LEDGER / path.name).open("ab") as ledger:
                    ledger.write(path.read_bytes()[sizes.get(path, 0) :])
                sizes[path] = path.stat().st_size
        write_page(self.out, header=self.header, steps=wanted, results=runner.results)


def pack(out: Path) -> Path:
    """Pack the folder into one file beside it, to be sent, and return it."""
    packed = out.with_name(f"{out.name}.tar.gz")
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(out, arcname=out.name)
    return packed


def _folder(facts: here.Facts, small: bool) -> Path:
    """Return OUT, or a folder of the card's: the same at a second start."""
    name = "none" if small or facts.card is None else facts.card
    slug = re.sub(r"[^a-z0-9]+", "-", ("null " * facts.is_null + name).lower()).strip("-")
    out = Path(os.environ.get("OUT") or ROOT / "results" / f"gpu-{slug}").absolute()
    out.mkdir(parents=True, exist_ok=True)
    return out


if __name__ == "__main__":
    sys.exit(main())
