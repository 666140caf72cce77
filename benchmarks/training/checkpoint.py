"""How long a checkpoint keeps a training step waiting: written at once, and in the background.

    m3i-fast bench checkpoint --mib 1024

Saves the same state, in turn, with either saver into a fresh directory of --directory, and times
the call that a step waits for, and the whole save. Beside it, how a step of the same process (a
product of matrices) slows down while a thread writes, and for how long at most a thread that writes
keeps Python from the others: ours, and torch's own writer of safetensors.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from rich import box
from rich.table import Table
from torch import nn

from m3i_fast.benchmarks.core.command import read_command
from m3i_fast.benchmarks.core.harness import Device, publish, resolve
from m3i_fast.config.optim import OptimConfig
from m3i_fast.engine.checkpoint.checkpoints import tensors_of
from m3i_fast.engine.checkpoint.saver import Saver
from m3i_fast.engine.optim.optimizers import Optimizers, build_optimizer

SUBJECT = "checkpoint"
WIDTH = 1024
_MIB_A_LAYER = 3 * 4 * WIDTH**2 / 2**20  # fp32: weights and two moments


@dataclass(frozen=True, kw_only=True)
class Config:
    mib: int = 512
    """Size of a checkpoint: weights and AdamW's moments."""
    rounds: int = 7
    """Saves of either kind; the first of each is not counted."""
    directory: Path | None = None
    """Where to write; the system's temporary directory unless given."""
    device: Device = "auto"
    """Where the state is."""
    record: bool = True
    """Append a row to the ledger."""


def main(argv: list[str] | None = None) -> None:
    config = read_command(Config, SUBJECT, argv)
    publish(SUBJECT, _rows(config), _table, record=config.record)


def _rows(config: Config) -> Iterator[dict[str, Any]]:
    yield measure_saves(config)


def measure_saves(config: Config) -> dict[str, Any]:
    """Return a row's figures: medians in milliseconds."""
    device = resolve(config.device)
    model, optimizer = _state(config.mib, device)
    factor = torch.randn(512, 512, device=device)
    folder = Path(tempfile.mkdtemp(dir=config.directory))
    savers = {
        name: Saver(folder / name, keep=1, background=name == "background")
        for name in ("at_once", "background")
    }
    times: dict[str, list[float]] = {}
    try:
        for number in range(config.rounds + 1):
            alone = _steps_per_s(factor, seconds=0.2)
            for name, saver in savers.items():
                begun = time.perf_counter()
                saver.save(step=number, model=model, optimizer=optimizer, state={})
                waited = time.perf_counter() - begun
                while saver.is_writing:
                    beside = _steps_per_s(factor, seconds=0.02)
                    times.setdefault("step_slowdown", []).append(alone / beside)
                saver.wait()
                whole = time.perf_counter() - begun
                if number:
                    times.setdefault(f"{name}_waited_ms", []).append(1e3 * waited)
                    times.setdefault(f"{name}_whole_ms", []).append(1e3 * whole)
        pauses = _pauses(folder, model, optimizer)
    finally:
        for saver in savers.values():
            saver.close()
        shutil.rmtree(folder)
    figures: dict[str, Any] = {name: statistics.median(v) for name, v in times.items()}
    share = figures["background_waited_ms"] / figures["at_once_waited_ms"]
    return {"mib": config.mib, "device": device, **figures, "waited_share": share, **pauses}


def _pauses(folder: Path, model: nn.Module, optimizer: Optimizers) -> dict[str, float]:
    def ours() -> None:
        with Saver(folder / "ours", keep=1) as saver:
            saver.save(step=0, model=model, optimizer=optimizer, state={})

    def torchs() -> None:
        writer = dcp.HuggingFaceStorageWriter(str(folder / "torch"), save_distributed=True)
        dcp.save(tensors_of(model, optimizer), storage_writer=writer, no_dist=True)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        return {f"pause_{f.__name__}_ms": 1e3 * _longest_pause(f) for f in (ours, torchs)}


def _longest_pause(write: Callable[[], None]) -> float:
    """Seconds that this thread was kept from running Python while another one writes."""
    thread = threading.Thread(target=write)
    thread.start()
    longest, last = 0.0, time.perf_counter()
    while thread.is_alive():
        time.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest


def _state(mib: int, device: str) -> tuple[nn.Module, Optimizers]:
    num_layers = max(1, round(mib / _MIB_A_LAYER))
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num_layers)))
    model.to(device)
    optimizer = build_optimizer(OptimConfig(), model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def _steps_per_s(factor: torch.Tensor, *, seconds: float) -> float:
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        factor @ factor
        count += 1
    if factor.is_cuda:
        torch.cuda.synchronize()
    return count / (time.perf_counter() - begun)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("MiB", "device", "save", "step waits, ms", "whole save, ms"):
        table.add_column(column, justify="right")
    for row in rows:
        for name in ("at_once", "background"):
            figures = (f"{row[f'{name}_{kind}_ms']:.1f}" for kind in ("waited", "whole"))
            table.add_row(str(row["mib"]), row["device"], name.replace("_", " "), *figures)
    table.caption = ", ".join(
        f"{row['waited_share']:.1%} of the wait; a step beside the thread takes "
        f"{row.get('step_slowdown', 1):.2f} times as long; longest pause of Python "
        f"{row['pause_ours_ms']:.0f} ms, of torch's writer {row['pause_torchs_ms']:.0f} ms"
        for row in rows
    )
    return table
