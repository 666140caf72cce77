"""Weak scaling of the losses over gloo processes of one thread each: more ranks, as many rows each.

Ours with a process group beside open_clip's ClipLoss as it is trained with on several GPUs,
`local_loss` and `gather_with_grad`. A step is forward and backward; all ranks start it together,
and it lasts as long as the slowest of them. With b rows a rank and W ranks, a rank multiplies b
rows by W b columns: its work grows as W. `efficiency` is therefore (W t_V) / (V t_W), V the fewest
ranks measured: 1 where the time grows as the work, less where ranks wait for each other or for a
core. Memory is the most of all ranks, above inputs and gradients.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich import box
from rich.table import Table
from torch import Tensor

from m3i_fast.benchmarks.core.harness import Timing, summarise
from m3i_fast.benchmarks.core.peak_memory import measure_peak
from m3i_fast.benchmarks.ops.boltzmann.losses import (
    CLIP,
    OURS,
    Inputs,
    Loss,
    Size,
    assert_same,
    make_inputs,
    run,
)
from m3i_fast.ops import boltzmann


def measure_ranks(
    ranks: list[int], rows_per_rank: int, dim: int, num_samples: int
) -> Iterator[dict[str, Any]]:
    """Yield a row for each number of ranks."""
    first: dict[str, Any] | None = None
    for count in ranks:
        row = _row(count, rows_per_rank, dim, num_samples)
        first = first or row
        work = row["ranks"] / first["ranks"]
        row["efficiency"] = {
            name: work * first["timings"][name]["median_ms"] / timing["median_ms"]
            for name, timing in row["timings"].items()
        }
        yield row


def _row(ranks: int, rows_per_rank: int, dim: int, num_samples: int) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        arguments = ranks, rows_per_rank, dim, num_samples, Path(folder)
        mp.start_processes(_work, arguments, nprocs=ranks, start_method="spawn")
        results = [json.loads(_result(Path(folder), rank).read_text()) for rank in range(ranks)]
    timings = {
        name: summarise([max(of_ranks) for of_ranks in zip(*samples, strict=True)])
        for name in (OURS, CLIP)
        for samples in [[of_rank["samples_ms"][name] for of_rank in results]]
    }
    ours = timings[OURS].median_ms
    return {
        "kind": "ranks",
        "device": "cpu",
        "num_threads": 1,
        "ranks": ranks,
        "rows_per_rank": rows_per_rank,
        "dim": dim,
        "dtype": "float32",
        "pass": "forward+backward",
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "times_slower_than_ours": {name: t.median_ms / ours for name, t in timings.items()},
        "extra_peak_bytes": {
            name: max(of_rank["extra_peak_bytes"][name] for of_rank in results) for name in timings
        },
    }


def _result(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.json"


# ---- One rank ------------------------------------------------------------------------------------


def _work(
    rank: int, ranks: int, rows_per_rank: int, dim: int, num_samples: int, folder: Path
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    size = Size(form="softmax", rows=rows_per_rank, columns=rows_per_rank, dim=dim)
    inputs = make_inputs(size, torch.float32, "cpu", backward=True, seed=rank)
    functions = {name: partial(run, loss, inputs) for name, loss in _losses(rank, ranks).items()}
    _check(functions, ranks)
    gradients = sum(t.nbytes for t in inputs if isinstance(t, Tensor) and t.requires_grad)
    peaks = {name: _in_step(function)[1] - gradients for name, function in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for index in range(num_samples):
        for name in list(functions)[:: 1 if index % 2 else -1]:
            dist.barrier()
            begun = time.perf_counter()
            functions[name]()
            samples[name].append((time.perf_counter() - begun) * 1e3)
    _result(folder, rank).write_text(json.dumps({"samples_ms": samples, "extra_peak_bytes": peaks}))
    dist.destroy_process_group()


def _losses(rank: int, ranks: int) -> dict[str, Loss]:
    from open_clip.loss import ClipLoss

    clip = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=ranks)

    def ours(i: Inputs) -> Tensor:
        return boltzmann(i.z_hat, i.z, i.scale, process_group=dist.group.WORLD, equal_sizes=True)

    return {OURS: ours, CLIP: lambda i: clip(i.z_hat, i.z, i.scale)}


def _check(functions: Mapping[str, Callable[[], Tensor]], ranks: int) -> None:
    """Ours is the loss of all rows on every rank, theirs of the rank's own: equal on average."""
    expected = functions[OURS]()
    value = functions[CLIP]()
    dist.all_reduce(value)
    assert_same(f"{CLIP} of {ranks} ranks", value / ranks, expected, torch.float32)


def _in_step(function: Callable[[], object]) -> tuple[float, int]:
    """All ranks together: none is still busy with what came before."""
    dist.barrier()
    return measure_peak(function, "cpu")


def table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    title = (
        f"boltzmann over gloo ranks of one thread, {first['rows_per_rank']} rows each, "
        f"D = {first['dim']}: forward and backward"
    )
    shown = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("ranks", no_wrap=True)
    for column in ("ms", "p20 - p80", "x ours", "efficiency", "MiB a rank"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        for name, timing in row["timings"].items():
            t = Timing(**timing)
            shown.add_row(
                f"{row['ranks']}  {name}",
                f"{t.median_ms:.3g}",
                f"{t.p20_ms:.3g} - {t.p80_ms:.3g}",
                f"{row['times_slower_than_ours'][name]:.2f}",
                f"{row['efficiency'][name]:.2f}",
                f"{row['extra_peak_bytes'][name] / 2**20:.3g}",
            )
        shown.add_section()
    return shown
