"""The steps of `make gpu`, on a GPU or in small sizes on the CPU."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.gpu.build import BUILD, SITE
from scripts.gpu.steps import ROOT, Step

TESTS_S, SANITIZER_S, TABLES_S = 1200.0, 300.0, 300.0

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
# The emulator reports what a sanitizer does: accesses out of bounds, and races.
EMULATED = ("tests/cuda/mask_mix/test_kernels.py",)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the steps can use: the inventory of tools, and whether there is a GPU."""

    inventory: dict[str, str | None]
    small: bool
    """Run without a GPU: the emulator, and benchmarks in small sizes on the CPU."""

    def missing(self, *names: str) -> str | None:
        """Return which of the tools are missing, as a reason to leave out a step; None: none."""
        absent = [name for name in names if self.inventory[name] is None]
        return f"no {' and no '.join(absent)} here" if absent else None


def steps(machine: Machine, out: Path, for_pytest: list[str]) -> Iterator[Step]:
    """Yield all steps in order: kernels' code, tests, sanitizers, benchmarks, a profile."""
    yield from code_steps(machine, out)
    yield test_step("tests", ["-m", "gpu", f"--junitxml={out / 'tests.xml'}", *for_pytest])
    yield from sanitizer_steps(machine)
    yield from benchmark_steps(machine)
    yield from nsys_steps(machine, out)


def code_steps(machine: Machine, out: Path) -> Iterator[Step]:
    """Yield the steps that print registers, spills, shared memory and code of every kernel."""
    library = next(iter(SITE.glob("m3i_fast/_C_cuda*.so")), None)
    missing = machine.missing("cuobjdump")
    if library is None:
        missing = missing or "no CUDA kernels in this build"
    tool = machine.inventory["cuobjdump"] or "cuobjdump"
    for name, option in (("registers", "--dump-resource-usage"), ("sass", "--dump-sass")):
        command = (tool, option, str(library))
        yield Step(name=name, command=command, limit_s=TABLES_S, missing=missing, quiet=True)


def test_step(name: str, arguments: list[str], *before: str, limit_s: float = TESTS_S) -> Step:
    """Return a step that runs pytest on the build; before: a command that runs it."""
    paths = f"pythonpath={SITE.relative_to(ROOT)} ."
    pytest = [sys.executable, "-m", "pytest", "--skip-missing-packages", "-o", paths, "-q"]
    return Step(name=name, command=(*before, *pytest, *arguments), limit_s=limit_s)


def sanitizer_steps(machine: Machine) -> Iterator[Step]:
    """Yield memcheck and racecheck of each op's sanitizer test, or the emulator's tests."""
    if machine.small:
        yield test_step("emulator", [*EMULATED])
        return
    missing = machine.missing("compute-sanitizer")
    tool = machine.inventory["compute-sanitizer"] or "compute-sanitizer"
    for kind in ("memcheck", "racecheck"):
        before = (tool, "--tool", kind, "--error-exitcode", "9", "--target-processes", "all")
        tests = [op.sanitizer for op in OPS]
        step = test_step(kind, ["-m", "gpu", *tests], *before, limit_s=SANITIZER_S)
        yield Step(**{**vars(step), "missing": missing})


def benchmark_steps(machine: Machine) -> Iterator[Step]:
    """Yield the benchmarks, the most informative first."""
    for name, benchmark in BENCHMARKS.items():
        missing = machine.missing(*benchmark.needs)
        if machine.small:
            missing = benchmark.skipped_small or missing or machine.missing("tyro", "cattrs")
        arguments = benchmark.small if machine.small else ()
        yield Step(
            name=name,
            command=(sys.executable, "-m", "m3i_fast.benchmarks", name, *arguments),
            limit_s=benchmark.limit_s,
            cwd=SITE,
            missing=missing,
            is_benchmark=True,
        )


def nsys_steps(machine: Machine, out: Path) -> Iterator[Step]:
    """Yield a profile of the training step's benchmark, and its tables."""
    missing = machine.missing("nsys") or ("no GPU" if machine.small else None)
    tool, report = machine.inventory["nsys"] or "nsys", str(out / "step")
    trace = ("-t", "cuda,nvtx", "-s", "none", "-o", report, "--force-overwrite", "true")
    step = (sys.executable, "-m", "m3i_fast.benchmarks", "step")
    place = {"M3I_RESULTS": str(BUILD / "unrecorded")}  # profiling makes the step slower
    profile = Step(
        name="nsys",
        command=(tool, "profile", *trace, *step),
        limit_s=TABLES_S,
        cwd=SITE,
        missing=missing,
        environment=place,
    )
    yield profile
    tables = ("--report", "cuda_gpu_kern_sum", "--report", "nvtx_sum", f"{report}.nsys-rep")
    command = (tool, "stats", "--force-export=true", *tables)
    yield Step(name="nsys-tables", command=command, limit_s=TABLES_S, missing=missing)
