"""m3i-fast profile RECIPE [--field value], profile diff A B: where the time of a step goes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from m3i_fast.cli import console
from m3i_fast.config import TrainConfig
from m3i_fast.costs.gpus import card_of
from m3i_fast.engine.parallel.ranks import leave_world
from m3i_fast.engine.precision.arithmetic import resolve_device
from m3i_fast.engine.run.data_fields import take_data_fields
from m3i_fast.engine.trainer import Trainer
from m3i_fast.flags import read_flags, typed_flags
from m3i_fast.json_files import read_json
from m3i_fast.observe.environment import environment
from m3i_fast.profiling import diff as profile_diff
from m3i_fast.profiling.capture import (
    Control,
    CudaControl,
    NoControl,
    TorchControl,
    Windows,
    profile_steps,
)
from m3i_fast.profiling.nsys import read_nsys
from m3i_fast.profiling.nsys_capture import export, run_under_nsys
from m3i_fast.profiling.page import write_page
from m3i_fast.profiling.recording import Recording
from m3i_fast.profiling.summary import HostWait, Pace, Peak, read_summary, summarise
from m3i_fast.profiling.text import markdown
from m3i_fast.profiling.torch_trace import read_trace
from m3i_fast.recipes import find_recipe
from m3i_fast.storage import write_atomically

logger = logging.getLogger(__name__)

USAGE = """\
usage: m3i-fast profile RECIPE [--out DIR] [--profiler auto|nsys|torch] [--warmup N] [--steps N]
                               [--field value ...]
       m3i-fast profile --config FILE [...]
       m3i-fast profile diff A B          (two --out folders, or their summary.json)
"""

Profiler = Literal["nsys", "torch"]


@dataclass(frozen=True, kw_only=True)
class ProfileCommand:
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    out: Path
    """Folder of summary.md, summary.json, profile.html, config.json, env.json and the recording."""
    profiler: Literal["auto", "nsys", "torch"] = "auto"
    """auto: nsys where a GPU trains and nsys is on PATH, else torch.profiler."""
    warmup: int = 10
    """Steps before anything is measured: compilation, allocation, the loader's queue."""
    steps: int = 5
    """Steps that are profiled; as many before and after them are only timed."""
    inside_nsys: bool = False
    """Set by this command where it runs itself again under nsys."""

    @property
    def windows(self) -> Windows:
        return Windows(warmup=self.warmup, steps=self.steps)


def main(argv: list[str]) -> int:
    if argv[:1] == ["diff"]:
        return diff(argv[1:])
    if not argv or argv[0] in ("-h", "--help"):
        console.print(f"{USAGE}\nm3i-fast recipes lists the recipes", highlight=False)
        return 0 if argv else 2
    name, command = parse(argv)
    if command.inside_nsys:
        measure(command, CudaControl())
        return 0
    if (command.out / "summary.json").exists():
        raise FileExistsError(f"--out: {command.out} holds a profile: name another folder")
    device = resolve_device(command.config.device)
    profiler = choose_profiler(command.profiler, device)
    command.out.mkdir(parents=True, exist_ok=True)
    if os.environ.get("RANK", "0") != "0":
        measure(command, NoControl())
        return 0
    recording = record(command, profiler, device, argv)
    summary = write_summary(name, command, recording, profiler, device)
    for note in summary["notes"]:
        logger.warning("%s", note)
    written = f"{command.out / 'summary.md'}, {command.out / 'profile.html'}"
    console.print(written, highlight=False, soft_wrap=True)
    return 0


def parse(argv: list[str]) -> tuple[str, ProfileCommand]:
    """The recipe's name, and what is asked for.

    Raises as `find_recipe`, `read_flags` and `take_data_fields`, and ValueError for steps that the
    run has not.
    """
    name, config, rest = find_recipe(argv)
    command = read_flags(
        ProfileCommand,
        rest,
        prog=f"m3i-fast profile {argv[0]}",
        default=ProfileCommand(config=config, out=Path("runs") / f"profile-{name}"),
    )
    command.windows.expect_in(command.config.num_steps)
    config = take_data_fields(command.config, typed_flags(rest))
    return name, replace(command, config=config)


def choose_profiler(asked: Literal["auto", "nsys", "torch"], device: torch.device) -> Profiler:
    """Says which and why; ValueError where nsys is asked for and cannot be had."""
    missing = None
    if device.type != "cuda":
        missing = f"device {device.type} has no kernels for it to record"
    elif shutil.which("nsys") is None:
        missing = "it is not on PATH; it comes with CUDA's toolkit and as Nsight Systems"
    if asked == "nsys" and missing:
        raise ValueError(f"--profiler: expected torch or auto, got nsys: {missing}")
    if asked == "torch" or missing:
        reason = f" (nsys: {missing})" if asked == "auto" else ""
        logger.info("profiling with torch.profiler%s", reason)
        return "torch"
    logger.info("profiling with nsys, %s", shutil.which("nsys"))
    return "nsys"


def record(
    command: ProfileCommand, profiler: Profiler, device: torch.device, argv: list[str]
) -> Recording:
    """The profiled steps; what was measured beside them is left in --out."""
    if profiler == "nsys":
        report = run_under_nsys(["profile", *argv, "--inside-nsys"], command.out)
        return read_nsys(export(report))
    trace = command.out / "trace.json.gz"
    measure(command, TorchControl(trace, device))
    return read_trace(trace)


def measure(command: ProfileCommand, control: Control) -> None:
    """Run the steps of a run that is thrown away, and leave windows.json in --out."""
    cfg = replace(command.config, checkpoint_every=command.config.num_steps)
    with tempfile.TemporaryDirectory(prefix="m3i-profile-") as folder:
        try:
            trainer = Trainer(cfg, Path(folder) / "run")
            try:
                pace, waits = profile_steps(trainer, control, command.windows)
            finally:
                trainer.close()
        finally:
            leave_world()
    if not isinstance(control, NoControl):
        _write_json(
            command.out / "windows.json",
            {
                "pace": {n: getattr(pace, n) for n in ("before_ms", "profiled_ms", "after_ms")},
                "waits": [
                    {"name": w.name, "stage": w.stage, "stack": list(w.stack), "calls": w.calls}
                    for w in waits
                ],
            },
        )


def write_summary(
    recipe: str,
    command: ProfileCommand,
    recording: Recording,
    profiler: Profiler,
    device: torch.device,
) -> dict[str, Any]:
    """The files of --out; returns summary.json's."""
    windows = read_json(command.out / "windows.json", {"pace": dict, "waits": [dict]})
    here = environment()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else here.cpu
    summary = summarise(
        recording,
        recipe=recipe,
        profiler={"nsys": "nsys", "torch": "torch.profiler"}[profiler],
        device=name,
        pace=Pace(**windows["pace"]),
        waits=[HostWait(**wait | {"stack": tuple(wait["stack"])}) for wait in windows["waits"]],
        peak=peak_of(name) if device.type == "cuda" else None,
    )
    command.config.save(command.out / "config.json")
    here.save(command.out / "env.json")
    write_atomically(command.out / "summary.md", markdown(summary).encode())
    write_page(summary, command.out / "profile.html")
    _write_json(command.out / "summary.json", summary)  # last: it says that all is there
    return summary


def peak_of(name: str) -> Peak | None:
    """Return the dense BF16 peak of the card that the driver calls so; say why there is none."""
    card = card_of(name)
    if isinstance(card, str):
        logger.warning("no shares of a peak: %s", card)
        return None
    return Peak(name=card.name, flop_s=card.bf16_flop_s, byte_s=card.memory_byte_s)


def diff(argv: list[str]) -> int:
    if len(argv) != 2 or argv[0] in ("-h", "--help"):
        console.print(USAGE, highlight=False)
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    found = profile_diff.compare(*(read_summary(Path(name)) for name in argv))
    print(profile_diff.markdown(found))  # noqa: T201  what was asked for: it can be piped
    return 0


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(tree, indent=1) + "\n").encode())
