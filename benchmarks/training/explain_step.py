"""Where the time of a recipe's step goes, and how near its products come to this machine's rate.

A step is recorded by torch.profiler on one batch in memory, and divided by stage and by family of
operators. The rate that it is held against is that of one large square product of the same dtype,
timed in the same run: what the faster of the machine's libraries reaches where nothing else is in
the way.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from m3i_fast.benchmarks.core.harness import Device, measure, resolve
from m3i_fast.benchmarks.core.product_rate import SQUARE, rate_gflop_s, square_products
from m3i_fast.benchmarks.core.random_batch import draw_any_batch
from m3i_fast.config import TrainConfig
from m3i_fast.costs.gemm_shapes import gemm_shapes
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.engine.precision.arithmetic import (
    Arithmetic,
    capabilities_of,
    resolve_precision,
)
from m3i_fast.engine.train_step import build_train_step
from m3i_fast.objectives.step_context import Stage, no_stage
from m3i_fast.observe.stages import STAGES, family_of
from m3i_fast.profiling.kernel_families import family
from m3i_fast.profiling.recording import BETWEEN, STEP, Recording, self_times
from m3i_fast.profiling.torch_trace import read_trace

COLUMNS = {
    "gemm": "products",
    "attention": "attention",
    "norm": "norms",
    "elementwise": "elementwise",
    "memcpy": "copies",
    "other": "other",
}
"""Families of operators by the title of their column; those of our ops are `ours`."""


def build_step(train: TrainConfig, arithmetic: Arithmetic, stage: Stage) -> Callable[[], object]:
    """Return the step of a recipe on one drawn batch, to be called again and again."""
    device = torch.device(train.device)
    batch = draw_any_batch(train).to(device)
    step = build_train_step(train, World(device), arithmetic, stage=stage)

    def take() -> object:
        step.steps_taken %= train.num_steps
        return step(batch)

    return take


def record(step: Callable[[], object], *, num_steps: int) -> Recording:
    """Record steps whose stages are marked by record_function; the first ones are not recorded."""
    for _ in range(2):
        step()
    kinds = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds, record_shapes=True, acc_events=True) as recorded:
        for _ in range(num_steps):
            with record_function(STEP):
                step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(path))
        return read_trace(path)


def stage_rows(recording: Recording) -> list[dict[str, Any]]:
    """Return a row a stage: milliseconds a step by family of operators, and GFLOP of products.

    On a CPU `host` is the time of the stage outside all operators, on the thread of the steps:
    Python. On a GPU all times are those of kernels, and `host` is 0. Terms of the loss are one
    stage. Stages without any time are left out.
    """
    num_steps = len(recording.steps)
    times: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for activity in recording.activities:
        kind = family(activity.name)
        row = times[_title(activity.stage)]
        row[kind if kind in COLUMNS else "ours"] += activity.self_ns / num_steps / 1e6
        if recording.device == "cuda":
            row["ms"] += activity.self_ns / num_steps / 1e6
        row["gflop"] += activity.flops / num_steps / 1e9
    ranges = [] if recording.device == "cuda" else [*recording.steps, *recording.stages]
    for each, self_ns in zip(ranges, self_times(ranges), strict=True):
        times[_title(each.name)]["ms"] += self_ns / num_steps / 1e6
    order = [*STAGES.values(), BETWEEN]
    return [
        {"stage": name, **_with_host(times[name])}
        for name in order
        if name in times and times[name]["ms"] > 0
    ]


def _title(stage: str) -> str:
    return BETWEEN if stage in (BETWEEN, STEP) else STAGES[family_of(stage)]


def _with_host(times: dict[str, float]) -> dict[str, float]:
    kinds = {kind: times[kind] for kind in (*COLUMNS, "ours")}
    host = max(times["ms"] - sum(kinds.values()), 0.0)
    return {"ms": times["ms"], **kinds, "host": host, "gflop": times["gflop"]}


def explain(train: TrainConfig, *, num_samples: int) -> dict[str, Any]:
    """Return the figures of a recipe's step on its device: its stages and its share of the rate."""
    device = torch.device(train.device)
    arithmetic = resolve_precision(
        capabilities_of(device),
        gemm_shapes(train),
        train.precision,
        train.backend,
        compiled=train.compile,
    )
    products = square_products(device, arithmetic.compute_dtype)
    step = build_step(train, arithmetic, no_stage)
    timings = measure({"step": step, **products}, device=device, num_samples=num_samples)
    recorded = build_step(train, arithmetic, record_function)
    rows = stage_rows(record(recorded, num_steps=min(num_samples, 5)))
    step_ms, batch_size = timings["step"].median_ms, draw_any_batch(train).batch_size
    rate = rate_gflop_s({name: timings[name].median_ms for name in products})
    gflop = sum(row["gflop"] for row in rows)
    return {
        "device": train.device,
        "num_threads": torch.get_num_threads(),
        "dtype": str(arithmetic.compute_dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "step_ms": step_ms,
        "images_per_s": 1e3 * batch_size / step_ms,
        "recorded_ms": sum(row["ms"] for row in rows),
        "gflop": gflop,
        "gflop_s": 1e3 * gflop / step_ms,
        "rate_gflop_s": rate,
        "share_of_rate": 1e3 * gflop / step_ms / rate,
        "stages": rows,
    }


def explained(recipe: str, figures: dict[str, Any]) -> tuple[Table, Table]:
    """Return a table of what the stages take and reach, and one of what they take it for."""
    rows = figures["stages"]
    total = {key: sum(row[key] for row in rows) for key in rows[0] if key != "stage"}
    rows = [*rows, {"stage": "all", **total}]
    rates = _table(
        f"{recipe} on {figures['device']}, {figures['num_threads']} threads, "
        f"{figures['dtype']}, batch {figures['batch_size']}: {figures['step_ms']:.1f} ms, "
        f"{figures['images_per_s']:.3g} images/s",
        f"GFLOP/s: of products, attention and ops alone. The whole step, as it was timed without "
        f"a profiler, reaches {figures['gflop_s']:.4g}, {figures['share_of_rate']:.0%} of the "
        f"{figures['rate_gflop_s']:.4g} of one {SQUARE} x {SQUARE} x {SQUARE} product.",
        ("ms", "share", "GFLOP", "GFLOP/s", "of rate"),
    )
    for row in rows:
        share = f"{row['ms'] / total['ms']:.1%}"
        rates.add_row(row["stage"], f"{row['ms']:.2f}", share, *_reached(row, figures))
    kinds = {**COLUMNS, "ours": "our ops", "host": "Python"}
    times = _table("ms of a recorded step by kind of operator", "", kinds.values())
    for row in rows:
        times.add_row(row["stage"], *(f"{row[kind]:.1f}" for kind in kinds))
    return rates, times


def _table(title: str, caption: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False)
    table.add_column("stage")
    for column in columns:
        table.add_column(column, justify="right", min_width=7)
    return table


def _reached(row: dict[str, Any], figures: dict[str, Any]) -> tuple[str, str, str]:
    if not row["gflop"]:
        return "-", "-", "-"
    reached = 1e3 * row["gflop"] / (row["gemm"] + row["attention"] + row["ours"])
    share = reached / figures["rate_gflop_s"]
    return f"{row['gflop']:.3g}", f"{reached:.4g}", f"{share:.0%}"


def with_batch(train: TrainConfig, *, batch_size: int, device: Device) -> TrainConfig:
    """Return a recipe as it is measured: on this device, eager, with this many pictures a step.

    Of views of any shape a step has as many as the recipe's budget of tokens holds.
    """
    data = replace(train.data, batch_size=batch_size)
    resolved: Device = "cuda" if resolve(device) == "cuda" else "cpu"
    return replace(train, data=data, device=resolved, compile=False)
