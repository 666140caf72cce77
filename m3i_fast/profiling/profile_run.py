"""Profile steps of a run that is thrown away, and write what they took."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from m3i_fast.config import TrainConfig
from m3i_fast.config.telemetry import TelemetryConfig
from m3i_fast.costs.gpus import card_of
from m3i_fast.durable_files import write_atomically
from m3i_fast.engine.parallel.ranks import leave_world
from m3i_fast.engine.precision.arithmetic import resolve_device
from m3i_fast.engine.trainer import Trainer
from m3i_fast.json_files import read_json
from m3i_fast.observe.environment import environment
from m3i_fast.profiling.capture import (
    NoProfiler,
    NsysProfiler,
    ProfilerControl,
    TorchProfiler,
    Windows,
    profile_steps,
)
from m3i_fast.profiling.nsys.export import read_nsys
from m3i_fast.profiling.nsys.program import export, run_under_nsys
from m3i_fast.profiling.recording import Recording
from m3i_fast.profiling.summary import HostWait, Pace, Peak, summarise
from m3i_fast.profiling.summary_page import write_page
from m3i_fast.profiling.summary_text import markdown
from m3i_fast.profiling.torch_trace import read_trace

logger = logging.getLogger(__name__)

Profiler = Literal["nsys", "torch"]
AskedProfiler = Literal["auto", "nsys", "torch"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileRun:
    """What is profiled, and the folder that the result is written to."""

    recipe: str
    config: TrainConfig
    windows: Windows
    out: Path
    arguments: Sequence[str]
    """Arguments of `m3i-fast profile`, with which nsys starts it again."""


def write_profile(run: ProfileRun, asked: AskedProfiler) -> dict[str, Any] | None:
    """Profile a run and write the files of its folder.

    Returns what summary.json holds, or None on all ranks but the first. Raises ValueError where
    nsys is asked for and cannot be had, and as `Trainer`.
    """
    device = resolve_device(run.config.device)
    profiler = choose_profiler(asked, device)
    run.out.mkdir(parents=True, exist_ok=True)
    if os.environ.get("RANK", "0") != "0":
        measure(run, NoProfiler())
        return None
    return write_summary(run, record(run, profiler, device), profiler, device)


def measure_inside_nsys(run: ProfileRun) -> None:
    """Run the steps where nsys already records this process, and leave windows.json."""
    measure(run, NsysProfiler(resolve_device(run.config.device)))


def choose_profiler(asked: AskedProfiler, device: torch.device) -> Profiler:
    """Choose a profiler and log why; ValueError where nsys is asked for and cannot be had."""
    missing = None
    if shutil.which("nsys") is None:
        missing = "it is not on PATH; it comes with CUDA's toolkit and as Nsight Systems"
        if asked == "nsys":
            raise ValueError(f"--profiler: expected torch or auto, got nsys: {missing}")
    elif asked == "auto" and device.type != "cuda":
        missing = f"on device {device.type} it records no operators"
    if asked == "torch" or missing:
        reason = f" (nsys: {missing})" if asked == "auto" else ""
        logger.info("profiling with torch.profiler%s", reason)
        return "torch"
    logger.info("profiling with nsys, %s", shutil.which("nsys"))
    return "nsys"


def record(run: ProfileRun, profiler: Profiler, device: torch.device) -> Recording:
    """Record the profiled steps; leave what was measured beside them in windows.json.

    Raises RuntimeError where torch.profiler recorded nothing of the GPU that trained.
    """
    if profiler == "nsys":
        report = run_under_nsys(["profile", *run.arguments, "--inside-nsys"], run.out, device)
        return read_nsys(export(report))
    trace = run.out / "trace.json.gz"
    measure(run, TorchProfiler(trace, device))
    recording = read_trace(trace)
    if recording.device != device.type:
        raise RuntimeError(
            f"--profiler: expected kernels of the {device.type} device in {trace}, got operators "
            "of the CPU alone: CUPTI, by which torch.profiler sees a GPU, did not start (its own "
            "line is above). Another profiler may hold it, or the driver admits administrators "
            "alone (NVreg_RestrictProfilingToAdminUsers=0 changes that); --profiler nsys records "
            "without it"
        )
    return recording


def measure(run: ProfileRun, control: ProfilerControl) -> None:
    """Take the steps of a run that is thrown away, and leave windows.json in the folder."""
    cfg = replace(
        run.config,
        checkpoint_every=run.config.num_steps,
        log_every=_log_every(run),
        evaluate_every=0,
        telemetry=TelemetryConfig(hz=0),  # its rows are of no run that anyone watches
    )
    with tempfile.TemporaryDirectory(prefix="m3i-profile-") as folder:
        trainer = Trainer(cfg, Path(folder) / "run")
        try:
            measured = profile_steps(trainer, control, run.windows)
        finally:
            trainer.close()
        del trainer
        leave_world()
    if not isinstance(control, NoProfiler):
        _write_json(
            run.out / "windows.json",
            {
                "pace": asdict(measured.pace),
                "stages": dict(measured.stages),
                "waits": [asdict(wait) | {"stack": list(wait.stack)} for wait in measured.waits],
            },
        )


def _log_every(run: ProfileRun) -> int:
    """Return an interval of logged steps, whose monitors cost, that windows have alike or none."""
    each = run.config.log_every
    return each if run.windows.steps % each == 0 else run.config.num_steps


def write_summary(
    run: ProfileRun, recording: Recording, profiler: Profiler, device: torch.device
) -> dict[str, Any]:
    """Write the files of the folder, and return summary.json's content."""
    windows = read_json(run.out / "windows.json", {"pace": dict, "stages": dict, "waits": [dict]})
    here = environment()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else here.cpu
    summary = summarise(
        recording,
        recipe=run.recipe,
        profiler={"nsys": "nsys", "torch": "torch.profiler"}[profiler],
        device=name,
        pace=Pace(**windows["pace"]),
        own=windows["stages"] if device.type == "cpu" else None,
        waits=[HostWait(**wait | {"stack": tuple(wait["stack"])}) for wait in windows["waits"]],
        peak=peak_of(name) if device.type == "cuda" else None,
    )
    run.config.save(run.out / "config.json")
    here.save(run.out / "env.json")
    write_atomically(run.out / "summary.md", markdown(summary).encode())
    write_page(summary, run.out / "profile.html")
    _write_json(run.out / "summary.json", summary)  # last: it says that all is there
    return summary


def peak_of(name: str) -> Peak | None:
    """Return the dense BF16 peak of the card that the driver calls so; log why there is none."""
    card = card_of(name)
    if isinstance(card, str):
        logger.warning("no shares of a peak: %s", card)
        return None
    return Peak(name=card.name, flop_s=card.bf16_flop_s, byte_s=card.memory_byte_s)


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(tree, indent=1) + "\n").encode())
