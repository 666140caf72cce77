"""The steps of `make gpu`: what breaks first and costs least comes first.

On a GPU, in small sizes on the CPU, or on a device whose results are not looked at.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from scripts.gpu import reading
from scripts.gpu.build import BUILD, SITE
from scripts.gpu.steps import ROOT, Step

TESTS_S, SANITIZER_S, TABLES_S, FIRST_S = 1200.0, 300.0, 300.0, 180.0
PROGRAMS = ROOT / "scripts" / "gpu" / "programs"
FIRST_STEP = str(PROGRAMS / "first_step.py")

# The registry of ops, loaded without the package, which is not built yet.
_REGISTRY = runpy.run_path(str(ROOT / "m3i_fast" / "op_registry.py"))
OPS: tuple[Any, ...] = _REGISTRY["OPS"]
_GpuBenchmark = _REGISTRY["GpuBenchmark"]

_STEP = ("--batch-size", "8", "--depth", "1", "--num-samples", "2")
_TUNE = ("--op", "dcnv3", "--card", "cpu", "--most", "2", "--num-samples", "2")
# In the order in which they run: those of the ops and of models.
BENCHMARKS: dict[str, Any] = dict(
    sorted(
        {
            **{op.name: op.gpu for op in OPS},
            "step": _GpuBenchmark(worth=3, limit_s=90, small=_STEP),
            "internimage": _GpuBenchmark(
                worth=6, limit_s=120, small=("--image-size", "64", "--num-samples", "2")
            ),
            "tune": _GpuBenchmark(worth=7, limit_s=300, small=_TUNE, needs=("CuPy", "tyro")),
        }.items(),
        key=lambda item: item[1].worth,
    )
)
SUBJECT_OF = {op.name: op.title for op in OPS} | {"step": "a training step", "tune": "tiles"}
# Benchmarks that --launch-only runs: in small sizes they take seconds, and read nothing computed.
LAUNCHED = ("gaussian", "mask_mix", "internimage")
# The emulator reports what a sanitizer does: accesses out of bounds, and races.
EMULATED = ("tests/cuda/mask_mix/test_kernels.py",)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the steps can use: the inventory of tools, and whether there is a GPU."""

    inventory: dict[str, str | None]
    small: bool
    """Run without a GPU: the emulator, and benchmarks in small sizes on the CPU."""
    launch_only: bool = False
    """Launch without looking at results: tests are collected, benchmarks compare nothing."""
    card: str | None = None
    """Name of the first GPU; None: there is none."""
    capability: tuple[int, int] | None = None
    num_gpus: int = 0
    site: Path = SITE
    """The folder that the package is imported from."""
    kernel_module: Path | None = None
    """The module of CUDA kernels of an installed package."""

    def missing(self, *names: str) -> str | None:
        """Return which of the tools are missing, as a reason to leave out a step; None: none."""
        absent = [name for name in names if self.inventory[name] is None]
        return f"no {' and no '.join(absent)} here" if absent else None

    def kernels(self) -> Iterator[Path]:
        """Yield the built module of CUDA kernels, wherever the package has it."""
        yield from self.site.glob("m3i_fast/_C_cuda*.so")
        yield from filter(None, [self.kernel_module])


def steps(machine: Machine, out: Path, for_pytest: list[str]) -> Iterator[Step]:
    """Yield all steps in order; the first ones answer within minutes whether anything works."""
    yield from first_steps(machine, out)
    yield from more_training_steps(machine)
    yield dali_step(machine)
    yield from sanitizer_steps(machine)
    tests = ["-m", "gpu", f"--junitxml={out / 'tests.xml'}", *for_pytest]
    yield test_step(machine, "tests", ["--collect-only", *tests] if machine.launch_only else tests)
    yield from benchmark_steps(machine, out)
    yield predicted_step(machine, out)
    yield from nsys_steps(machine, out)
    yield code_step(machine, "sass", "--dump-sass")


def first_steps(machine: Machine, out: Path) -> Iterator[Step]:
    """Yield the steps of --first: the machine, each op once, a training step, registers."""
    launch_only = ("--launch-only",) if machine.launch_only else ()
    device = "cpu" if machine.small else "cuda"
    yield Step(
        name="doctor",
        answers="Can this machine train, and what is missing for the rest?",
        expects="every part that is there is usable",
        command=(sys.executable, "-m", "m3i_fast.cli", "doctor", "--json"),
        limit_s=FIRST_S,
        missing=machine.missing("tyro"),
        cwd=machine.site,
        read=reading.findings_of_doctor,
        passing=(0, 1),  # 1: something is not usable, which the checks tell
    )
    yield Step(
        name="kernels",
        answers="Does each op load, run and compute what the CPU does?",
        expects="all of them are right",
        command=(sys.executable, str(PROGRAMS / "first_kernels.py"), device, *launch_only),
        limit_s=2 * FIRST_S,
        cwd=machine.site,
        read=reading.checks_of_program,
    )
    yield Step(
        name="training",
        answers="Has a step the CPU's losses, no wait, and the kernels of this card?",
        expects="the CPU's losses in fp32 and bf16, no host synchronisation, the launches of the "
        "null runtime",
        command=(sys.executable, FIRST_STEP, *launch_only),
        limit_s=2 * FIRST_S,
        cwd=machine.site,
        missing="no GPU" if machine.small else machine.missing("cattrs"),
        read=reading.checks_of_program,
        environment={"NULL_CUDA_TRACE": str(out / "training-trace.jsonl")},
    )
    registers = code_step(machine, "registers", "--dump-resource-usage")
    read = partial(reading.registers_of, machine.capability)
    answers = "Has each kernel the registers that it was designed with?"
    yield replace(registers, answers=answers, expects="within cuda/*/budget.json", read=read)


def more_training_steps(machine: Machine) -> Iterator[Step]:
    """Yield the training on two GPUs, compiled, and in FP8."""
    launch_only = ("--launch-only",) if machine.launch_only else ()
    no_gpu = "no GPU" if machine.small else machine.missing("cattrs")
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    yield Step(
        name="training-ranks",
        answers="Have two GPUs the losses of one?",
        expects="the losses of one, by DDP and by FSDP2",
        command=(sys.executable, *ranks, FIRST_STEP, "--ranks", *launch_only),
        limit_s=2 * FIRST_S,
        cwd=machine.site,
        missing=no_gpu or ("one GPU here" if machine.num_gpus < 2 else None),
        read=reading.checks_of_program,
    )
    generated = "a GPU alone runs what torch.compile generates (--launch-only)"
    yield Step(
        name="training-compiled",
        answers="Does torch.compile compile every block, and keep the losses?",
        expects="the CPU's losses",
        command=(sys.executable, FIRST_STEP, "--compiled", *launch_only),
        limit_s=2 * FIRST_S,
        cwd=machine.site,
        missing=no_gpu or (generated if machine.launch_only else None),
        read=reading.checks_of_program,
    )
    libraries = ("Transformer Engine", "torchao")
    no_fp8 = None if any(map(machine.inventory.get, libraries)) else machine.missing(*libraries)
    if machine.capability is not None and machine.capability < (8, 9):
        no_fp8 = "this card has no FP8"
    yield Step(
        name="training-fp8",
        answers="Do products run in FP8, and what does it change of the losses?",
        expects="the CPU's losses",
        command=(sys.executable, FIRST_STEP, "--fp8", *launch_only),
        limit_s=2 * FIRST_S,
        cwd=machine.site,
        missing=no_gpu or no_fp8,
        read=reading.checks_of_program,
    )


def code_step(machine: Machine, name: str, option: str) -> Step:
    """Return a step that prints something of the code of every kernel."""
    library = next(iter(machine.kernels()), None)
    missing = machine.missing("cuobjdump")
    if library is None:
        missing = missing or "no CUDA kernels in this build"
    if machine.launch_only and name == "sass":
        missing = "it is no other for any device (--launch-only)"
    tool = machine.inventory["cuobjdump"] or "cuobjdump"
    return Step(
        name=name,
        answers="What machine code does the card run?",
        command=(tool, option, str(library)),
        limit_s=TABLES_S,
        missing=missing,
        quiet=True,
    )


def dali_step(machine: Machine) -> Step:
    """Return the step that runs what nothing but a GPU can show of DALI."""
    missing = machine.missing("DALI", "cattrs", "Pillow")
    if machine.launch_only:
        missing = (
            missing or "DALI brings its own CUDA runtime, which no other can take the place of"
        )
    device = "cpu" if machine.small else "cuda"
    return Step(
        name="dali",
        answers="Are batches left alone once handed out, and are crops the CPU's, in any batch?",
        expects="no batch changes, crops within the bounds, equal ones with data.exact_decode",
        command=(sys.executable, str(PROGRAMS / "dali_check.py"), device),
        limit_s=FIRST_S,
        cwd=machine.site,
        missing=missing,
        read=reading.checks_of_program,
    )


def test_step(
    machine: Machine, name: str, arguments: list[str], *before: str, limit_s: float = TESTS_S
) -> Step:
    """Return a step that runs pytest on the build; before: a command that runs it."""
    paths = f"pythonpath={machine.site} ."
    pytest = [sys.executable, "-m", "pytest", "--skip-missing-packages", "-o", paths, "-q"]
    pytest += ["--continue-on-collection-errors"]  # a module that fails is no reason for the others
    return Step(
        name=name,
        answers="Does every test that needs a GPU pass?",
        expects="0 failed",
        command=(*before, *pytest, *arguments),
        limit_s=limit_s,
        read=partial(reading.tests_of, f"{name}.xml"),
    )


def sanitizer_steps(machine: Machine) -> Iterator[Step]:
    """Yield memcheck and racecheck of each op's sanitizer test, or the emulator's tests."""
    if machine.small:
        yield replace(test_step(machine, "emulator", [*EMULATED]), read=None)
        return
    missing = machine.missing("compute-sanitizer")
    if machine.launch_only:
        missing = "a sanitizer watches what a GPU computes (--launch-only)"
    tool = machine.inventory["compute-sanitizer"] or "compute-sanitizer"
    for kind in ("memcheck", "racecheck"):
        before = (tool, "--tool", kind, "--error-exitcode", "9", "--target-processes", "all")
        tests = [op.sanitizer for op in OPS]
        step = test_step(machine, kind, ["-m", "gpu", *tests], *before, limit_s=SANITIZER_S)
        answers = f"Does {kind} find an access or a race that no result shows?"
        yield replace(step, missing=missing, answers=answers, expects="no report", read=None)


def benchmark_steps(machine: Machine, out: Path) -> Iterator[Step]:
    """Yield the benchmarks, the most informative first."""
    for name, benchmark in BENCHMARKS.items():
        missing = machine.missing(*benchmark.needs)
        if machine.small:
            missing = benchmark.skipped_small or missing or machine.missing("tyro", "cattrs")
        program: tuple[str, ...] = ("-m", "m3i_fast.benchmarks")
        if machine.launch_only:
            program = (str(PROGRAMS / "launched_benchmark.py"),)
            if name not in LAUNCHED:
                missing = "it reads what it computes, or takes minutes (--launch-only)"
        arguments = benchmark.small if machine.small or machine.launch_only else ()
        yield Step(
            name=name,
            answers=f"How long does it take, and beside what? ({SUBJECT_OF.get(name, name)})",
            command=(sys.executable, *program, name, *arguments),
            limit_s=benchmark.limit_s,
            cwd=machine.site,
            missing=missing,
            is_benchmark=True,
            read=None if machine.launch_only else partial(reading.figures_of, name),
        )


def predicted_step(machine: Machine, out: Path) -> Step:
    """Return the step that writes predicted beside measured, from the benchmarks' rows."""
    measures = not (machine.small or machine.launch_only)
    return Step(
        name="predicted",
        answers="How far off are the predictions of the cost model, and which one most?",
        expects="within 30 %, as for the published times; the worst ratio comes first",
        command=(
            sys.executable,
            str(PROGRAMS / "predicted.py"),
            str(out),
            *(() if measures else ("--unmeasured",)),
        ),
        limit_s=FIRST_S,
        cwd=machine.site,
        read=reading.checks_of_program,
    )


def nsys_steps(machine: Machine, out: Path) -> Iterator[Step]:
    """Yield a profile of the training step's benchmark, and its tables."""
    missing = machine.missing("nsys") or ("no GPU" if machine.small else None)
    if machine.launch_only:
        missing = "there is no time to see (--launch-only)"
    tool, report = machine.inventory["nsys"] or "nsys", str(out / "step")
    trace = ("-t", "cuda,nvtx", "-s", "none", "-o", report, "--force-overwrite", "true")
    step = (sys.executable, "-m", "m3i_fast.benchmarks", "step")
    place = {"M3I_RESULTS": str(BUILD / "unrecorded")}  # profiling makes the step slower
    profile = Step(
        name="nsys",
        answers="Where does the time of a training step go?",
        command=(tool, "profile", *trace, *step),
        limit_s=TABLES_S,
        cwd=machine.site,
        missing=missing,
        environment=place,
    )
    yield profile
    tables = ("--report", "cuda_gpu_kern_sum", "--report", "nvtx_sum", f"{report}.nsys-rep")
    command = (tool, "stats", "--force-export=true", *tables)
    yield Step(name="nsys-tables", command=command, limit_s=TABLES_S, missing=missing)
