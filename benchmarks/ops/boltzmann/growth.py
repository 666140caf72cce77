"""How seconds and memory of the losses grow with N: one fresh process a point.

Forward and backward once, after a small call that loads libraries and starts threads. Memory is
the peak above the inputs, less the gradients' bytes; on a CPU it is the process's resident memory.
A loss whose whole matrices would not fit into what the machine has left is left out from that N on,
and its row says where it stops.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from rich import box
from rich.table import Table

from m3i_fast.benchmarks.core.peak_memory import free_bytes, measure_peak
from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.benchmarks.ops.boltzmann.growth_plot import draw
from m3i_fast.benchmarks.ops.boltzmann.losses import (
    CLIP,
    NUM_MATRICES,
    OURS,
    SIGLIP,
    Form,
    Size,
    assert_same,
    can_run,
    make_inputs,
    make_loss,
    run,
)
from m3i_fast.durable_files import write_atomically

SMALLEST = 1024
LARGEST = {"cpu": 32_768, "cuda": 131_072}
WARM_UP = 256
CURVES: tuple[tuple[Form, str], ...] = (
    ("softmax", OURS),
    ("softmax", CLIP),
    ("sigmoid", OURS),
    ("sigmoid", SIGLIP),
)

logger = logging.getLogger(__name__)


class Point(NamedTuple):
    seconds: float
    extra_peak_bytes: int
    loss: float


def counts(largest: int) -> Iterator[int]:
    """Return SMALLEST, its double and so on. Raises ValueError where `largest` is none of them."""
    doublings = (largest // SMALLEST).bit_length() - 1
    if doublings < 0 or largest != SMALLEST << doublings:
        raise ValueError(f"largest: expected {SMALLEST}, or a doubling of it, got {largest}")
    return (SMALLEST << power for power in range(doublings + 1))


def measure_growth(device: str, largest: int | None, dim: int) -> list[dict[str, Any]]:
    """Yield a row for each curve, its points from small to large."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    curves: list[dict[str, Any]] = [
        {
            "kind": "growth",
            "device": device,
            "num_threads": torch.get_num_threads(),
            "dim": dim,
            "dtype": str(dtype).removeprefix("torch."),
            "form": form,
            "function": name,
            "points": [],
            "stops_at": None,
        }
        for form, name in CURVES
        if can_run(name, device)
    ]
    for count in counts(largest or LARGEST[device]):
        losses: dict[str, torch.Tensor] = {}
        for curve in curves:
            point = _extend(curve, count)
            if point is not None:
                value = torch.tensor(point.loss)
                expected = losses.setdefault(curve["form"], value)
                assert_same(f"{curve['function']} of {count} rows", value, expected, dtype)
    return curves


def measure_apart(
    name: str, size: Size, dtype: torch.dtype, device: str, num_threads: int
) -> Point | None:
    """Return `measure_point` of a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure_point, name, size, dtype, device, num_threads).result()


def _extend(curve: dict[str, Any], count: int) -> Point | None:
    """Measure the next point of a curve; None where it has stopped."""
    if curve["stops_at"] is not None:
        return None
    form, name, device = curve["form"], curve["function"], curve["device"]
    dtype: torch.dtype = getattr(torch, curve["dtype"])
    size = Size(form=form, rows=count, columns=count, dim=curve["dim"])
    needed, free = NUM_MATRICES.get(name, 0) * count**2 * dtype.itemsize, free_bytes(device)
    point = None
    if needed <= free:
        point = measure_apart(name, size, dtype, device, curve["num_threads"])
    if point is None:
        curve["stops_at"] = count
        logger.warning(
            "%s, %s left out from N = %d on: needs about %.1f GB, %.1f GB are free",
            form,
            name,
            count,
            needed / 1e9,
            free / 1e9,
        )
        return None
    curve["points"].append({"rows": count, **point._asdict()})
    logger.info(
        "%s, %s, N = %d: %.3g s, %.3g MiB",
        form,
        name,
        count,
        point.seconds,
        point.extra_peak_bytes / 2**20,
    )
    return point


def measure_point(
    name: str, size: Size, dtype: torch.dtype, device: str, num_threads: int
) -> Point | None:
    """Return what one call takes in a fresh process; None where memory does not suffice."""
    torch.set_num_threads(num_threads)
    loss = make_loss(name, size.form)
    small = Size(form=size.form, rows=WARM_UP, columns=WARM_UP, dim=size.dim)
    run(loss, make_inputs(small, dtype, device, backward=True))
    inputs = make_inputs(size, dtype, device, backward=True)
    values: list[torch.Tensor] = []
    try:
        seconds, peak = measure_peak(lambda: values.append(run(loss, inputs)), device)
    except torch.OutOfMemoryError:
        return None
    gradients = sum(t.nbytes for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad)
    return Point(seconds, peak - gradients, float(values[0]))


def table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    title = (
        f"boltzmann on {first['device']}, {first['num_threads']} threads, {first['dtype']}, "
        f"D = {first['dim']}: forward and backward, memory above inputs and gradients"
    )
    shown = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("form, loss", no_wrap=True)
    for column in ("N", "s", "MiB"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        name = f"{row['form']}, {row['function']}"
        for point in row["points"]:
            memory = point["extra_peak_bytes"] / 2**20
            shown.add_row(name, f"{point['rows']:,}", f"{point['seconds']:.3g}", f"{memory:.3g}")
        if row["stops_at"] is not None:
            shown.add_row(name, f"{row['stops_at']:,}", "memory", "does not suffice")
        shown.add_section()
    return shown


def draw_newest(subject: str) -> None:
    """Draw the newest growth rows of each machine beside the ledger."""
    rows = [row for row in ledger.read_rows(subject) if row["figures"]["kind"] == "growth"]
    path = ledger.results_dir() / f"{subject}_growth.svg"
    write_atomically(path, draw(rows).encode())
    logger.info("drawn to %s", path)
