"""Run a case of the matrix on the null CUDA runtime, and count what its steady step asks for."""

from __future__ import annotations

import json
import subprocess
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from m3i_fast.benchmarks.core.random_batch import Repeated, draw_batch
from m3i_fast.benchmarks.launches.matrix import TEACHER, Case
from m3i_fast.benchmarks.launches.one_case import STEADY, STEADY_ALONE, case_config
from m3i_fast.benchmarks.launches.trace import (
    BACKWARD,
    StepTrace,
    read_trace,
    split_at_marks,
)
from m3i_fast.config import TrainConfig
from m3i_fast.costs.gpus import CARDS
from m3i_fast.costs.traffic import Nodes
from m3i_fast.engine.trainer import Trainer
from m3i_fast.planning.plan import Plan, make_plan
from m3i_fast.recipes import recipes

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / "build" / "cuda" / "bin" / "python"
# Assumed of an eager operator of torch: less than this a launch, and the host cannot keep up.
HOST_US = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """What a case did: its steady step with what followed in the trainer, and bytes at its peak."""

    case: Case
    step: StepTrace
    memory: Mapping[str, int]
    """Of torch's allocator: allocated, requested, reserved."""

    @property
    def peak(self) -> int:
        """Return the bytes that plan predicts: allocated, with CUDA graphs reserved.

        What a graph's memory holds is no tensor's, and is never given back.
        """
        has_graphs = "--cuda-graphs" in self.case.flags
        return self.memory["reserved" if has_graphs else "allocated"]


def count(case: Case, folder: Path, *, plant: str | None = None) -> Counted:
    """Run a case and read its trace.

    folder: where the trace goes, and the teacher of a case that needs one. Raises
    FileNotFoundError without build/cuda, RuntimeError with the output of a case that failed.
    """
    if not PYTHON.is_file():
        raise FileNotFoundError(f"{PYTHON.relative_to(ROOT)}: make first-contact builds it")
    trace = folder / "trace.jsonl"
    trace.unlink(missing_ok=True)
    settings = {"trace": trace, "root": ROOT, "lines": 1}
    settings |= {"card": case.card, "devices": case.devices}
    command = [str(PYTHON), "-m", "scripts.null_cuda", *(f"{k}={v}" for k, v in settings.items())]
    command += [str(PYTHON), "-m", "m3i_fast.benchmarks.launches.one_case", case.recipe]
    command += ["--step-alone"] * case.step_alone + (["--plant", plant] if plant else [])
    command += flags_of(case, folder)
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{case.name}: exit {done.returncode}\n{done.stderr[-3000:]}")
    return Counted(
        case=case,
        step=_steady(case, split_at_marks(read_trace(trace))),
        memory=json.loads(done.stdout.splitlines()[-1]),
    )


def flags_of(case: Case, folder: Path) -> list[str]:
    """Return the flags of a case, a teacher's run in the place of TEACHER."""
    if TEACHER not in case.flags:
        return list(case.flags)
    run = folder / "teacher"
    if not run.exists():
        cfg = case_config("demo_supervised", ["--device", "cpu", "--num-steps", "1"])
        Trainer(cfg, run, data=Repeated(draw_batch(cfg))).train()
    return [str(run) if flag == TEACHER else flag for flag in case.flags]


def _steady(case: Case, steps: list[StepTrace]) -> StepTrace:
    """Return the steady step and what followed it up to the next."""
    names = [step.name for step in steps]
    at = names.index(f"step {STEADY_ALONE if case.step_alone else STEADY}")
    return StepTrace(steps[at].name, [*steps[at].records, *steps[at + 1].records])


# ---- What is counted -----------------------------------------------------------------------------


def counts_of(step: StepTrace) -> dict[str, Any]:
    """Return the counts of a step as JSON has them."""
    launches = [r for r in step.of("launch") if "capture" not in r]
    copies = {f"{a} to {b}": n for (a, b), n in sorted(step.copies.items())}
    return {
        "launches": step.num_launches,
        "host_launches": step.host_launches,
        "library_calls": len([r for r in step.of("library") if "capture" not in r]),
        "own_launches": sum("m3i::" in launch["name"] for launch in launches),
        "fills": len(step.of("fill")),
        "waits": len(step.of("wait")),
        "pageable_copies": len(pageable_copies(step)),
        "allocations": len(step.of("allocate")),
        "faults": sum(len(step.of(kind)) for kind in ("error", "fault", "unsupported")),
        "streams": sorted(step.streams),
        "copies": copies,
        "copied_bytes": {f"{a} to {b}": n for (a, b), n in sorted(step.copied_bytes.items())},
    }


def pageable_copies(step: StepTrace) -> list[dict[str, Any]]:
    """Return the copies with host memory that is not pinned: for each the host waits."""
    return [copy for copy in step.of("copy") if "pageable" in (copy["from"], copy["to"])]


def launches_by_line(step: StepTrace) -> dict[str, Counter[str]]:
    """Return file -> FILE:LINE, or `backward of FILE:LINE` -> launches; relative to the checkout.

    Replays, and launches without a line, are of the file "?".
    """
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for record in (*step.of("launch"), *step.of("library")):
        if "capture" not in record:
            line = record.get("line", "?").replace(f"{ROOT}/", "")
            found[line.removeprefix(BACKWARD).rpartition(":")[0] or "?"][line] += 1
    return dict(found)


def by_text(lines: Mapping[str, Counter[str]]) -> dict[str, dict[str, int]]:
    """Return the same with each line's text in the place of its number, which edits above move."""
    return {
        file: dict(sum((Counter({text_of(line): n}) for line, n in of_file.items()), Counter()))
        for file, of_file in sorted(lines.items())
    }


def text_of(line: str) -> str:
    """Return what stands in FILE:LINE of the checkout, after `backward of ` where that stands."""
    backward = BACKWARD if line.startswith(BACKWARD) else ""
    file, _, number = line.removeprefix(BACKWARD).rpartition(":")
    source = _source(file)
    return backward + (source[int(number) - 1].strip() if source else "?")


@cache
def _source(file: str) -> list[str]:
    path = ROOT / file
    return path.read_text().splitlines() if path.is_file() else []


# ---- What plan predicts --------------------------------------------------------------------------


def config_of(case: Case, folder: Path) -> TrainConfig:
    """Return the config that a case trains."""
    return case_config(case.recipe, flags_of(case, folder))


def plan_of(case: Case, cfg: TrainConfig) -> Plan:
    """Return what `m3i-fast plan` says of the counted step, on one card of the case."""
    return make_plan(cfg, card=CARDS[case.card], nodes=Nodes(1, 8))


def predicted_bytes(plan: Plan) -> int:
    """Return the peak of torch's allocator in a plan of one rank."""
    return round(sum(plan.strategies[0].memory.parts.values()))


def figures_of(
    counted: Counted, cfg: TrainConfig, plan: Plan, *, with_lines: bool
) -> dict[str, Any]:
    """Return the figures of a row of the ledger.

    with_lines: also the launches of each line, which the gate compares.
    """
    case, counts = counted.case, counts_of(counted.step)
    figures = {
        "counted_on": "the null CUDA runtime, without a GPU",
        "case": case.name,
        "recipe": case.recipe,
        "flags": " ".join(case.flags),
        "card": case.card,
        "devices": case.devices,
        "step_alone": case.step_alone,
        "batch_size": plan.batch_size,
        "counts": counts,
        "memory": {
            **counted.memory,
            "peak": counted.peak,
            "predicted": predicted_bytes(plan),
        },
        "host": _host(cfg, plan, recipes()[case.recipe]().data.batch_size, counts),
    }
    if with_lines:
        figures["lines"] = by_text(launches_by_line(counted.step))
    return figures


def _host(
    cfg: TrainConfig, plan: Plan, batch_size: int, counts: Mapping[str, Any]
) -> dict[str, Any]:
    """Return plan's time of a step of the recipe's own batch, for each launch of the host.

    The time is that of the counted batch, in proportion.
    """
    scale = batch_size / plan.batch_size * cfg.parallel.accumulate
    each = 1e6 * plan.strategies[0].speed.step_s * scale / counts["host_launches"]
    return {"batch_size": batch_size, "us_a_launch": each, "bound": each < HOST_US}
