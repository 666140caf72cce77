"""The loader of views of any size beside the loader of squares, on the same shards in one run.

    m3i-fast bench packed_loader [--data SHARDS] [--num-threads N]

`packed` hands out batches of a budget of patches, by each backend; `squares` views of one size, as
many patches each as those of `packed` have on average, in batches of as many pictures. Both read,
decode and cut the same pictures by the same draws of boxes and colours, and take turns in windows
of one run. Rates are of what a window's batches hold: pictures, however many views each gives, and
patches of all views. CPU-seconds are of this process. Shards come from the page cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich import box
from rich.table import Table

from m3i_fast.benchmarks.core.command import read_command
from m3i_fast.benchmarks.core.harness import Device, publish, resolve, summarise
from m3i_fast.benchmarks.core.rate_statistics import summarise_rates
from m3i_fast.benchmarks.core.timed_windows import COMPARED, Schedule, Series, measure_windows
from m3i_fast.benchmarks.loader.measuring import Endless
from m3i_fast.config.data import BackendName, LoaderConfig, ViewConfig
from m3i_fast.pipelines.any_shape.batch import PackedBatch
from m3i_fast.pipelines.any_shape.loader import PackedLoader
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.loader import Loader

SUBJECT = "packed_loader"
COUNTED = "pictures", "patches"
_LOOKED_AT = 8  # batches, of which patches a view are the mean


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    device: Device = "auto"
    """auto: the GPU where torch sees one, which then decodes and cuts, by DALI alone."""
    data: Path | None = None
    """Shards; without, JPEGs of 500 x 375 pixels are made for this run in a temporary folder."""
    num_pictures: int = 512
    """Without --data: how many."""
    token_budget: int = 16384
    """Most patches of a batch of all views."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    sides: tuple[int, int] = (6, 14)
    """Least and most patches along a side of the square of which a view has the area."""
    num_views: int = 2
    """Views of a picture."""
    ratio: tuple[float, float] = (0.5, 2.0)
    """Least and most width / height of a view's box."""
    num_threads: int = 2
    """Threads of each loader."""
    windows: int = 5
    """Samples of each loader."""
    window_seconds: float = 5.0
    """Length of a sample."""
    record: bool = True
    """Append the row to the ledger, benchmarks/results/packed_loader.jsonl."""

    def __post_init__(self) -> None:
        for name in ("num_pictures", "token_budget", "patch_size", "num_views", "num_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    def loader(self, path: Path) -> LoaderConfig:
        """Return what both loaders read, but for the sizes of views."""
        views = ViewConfig(count=self.num_views, ratio=self.ratio)
        return LoaderConfig(path=path, global_views=views, num_threads=self.num_threads)


class CountedBatches(Endless):
    """A loader as `measure_windows` repeats it, whose batches differ in what they hold."""

    def __init__(
        self, batches: Iterator[Any], count: Callable[[Any], tuple[int, int]], *, num_ahead: int
    ) -> None:
        super().__init__(batches, num_images=1, num_ahead=num_ahead)
        self._count, self._held = count, [0, 0]

    def step(self) -> None:
        for i, number in enumerate(self._count(next(self._batches))):
            self._held[i] += number

    def read(self) -> dict[str, float]:
        """Return what was spent since the last read, and the pictures and patches of batches."""
        held, self._held = self._held, [0, 0]
        return {**super().read(), **dict(zip(COUNTED, map(float, held), strict=True))}


def count_packed(batch: PackedBatch) -> tuple[int, int]:
    """Return the pictures of a batch, and the patches of all of their views."""
    return batch.batch_size, sum(len(patches) for patches in batch.patches)


def count_squares(batch: Batch, patch_size: int) -> tuple[int, int]:
    """Return the pictures of a batch, and the patches of all of their views."""
    pixels = sum(views.shape[0] * views.shape[2] * views.shape[3] for views in batch.global_views)
    return batch.batch_size, pixels // patch_size**2


def packed_of(cfg: Config, data: LoaderConfig, device_id: int | None) -> PackedLoader:
    """Make the loader of views of any size."""
    return PackedLoader(
        data,
        token_budget=cfg.token_budget,
        patch_size=cfg.patch_size,
        global_sides=cfg.sides,
        device_id=device_id,
    )


def squares_like(cfg: Config, data: LoaderConfig) -> LoaderConfig:
    """Return squares of as many patches as views of any size have on average, and as many."""
    loader = packed_of(cfg, replace(data, backend="torch"), None)
    counts = [count_packed(next(loader)) for _ in range(_LOOKED_AT)]
    loader.close()
    pictures, patches = map(sum, zip(*counts, strict=True))
    side = max(round(math.sqrt(patches / pictures / cfg.num_views)), 1)
    size = side * cfg.patch_size
    views = replace(data.global_views, size=size)
    return replace(data, global_views=views, batch_size=max(round(pictures / _LOOKED_AT), 1))


def measure_row(cfg: Config, path: Path) -> dict[str, Any]:
    """Time both loaders by each backend."""
    device = resolve(cfg.device)
    device_id = 0 if device == "cuda" else None
    backends: tuple[BackendName, ...] = ("dali", "torch") if device_id is None else ("dali",)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of an operator: loaders have threads of their own
    data = cfg.loader(path)
    squares = squares_like(cfg, data)
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, num_threads)
        works: dict[str, CountedBatches] = {}
        for backend in backends:
            packed = packed_of(cfg, replace(data, backend=backend), device_id)
            plain = Loader(replace(squares, backend=backend), device_id=device_id)
            for name, loader, count in (
                ("packed", packed, count_packed),
                ("squares", plain, lambda batch: count_squares(batch, cfg.patch_size)),
            ):
                stack.callback(loader.close)
                works[f"{name}, {backend}"] = CountedBatches(loader, count, num_ahead=data.prefetch)
        schedule = Schedule(
            num_windows=cfg.windows,
            window_s=cfg.window_seconds,
            warmup_steps=data.prefetch + COMPARED,
            max_warmup_s=2 * cfg.window_seconds,  # steps of packed batches are never alike
            lead_steps=1,
        )
        series = measure_windows(works, schedule)
    return {
        "device": device,
        "num_threads": cfg.num_threads,
        "data": "synthetic, 500 x 375" if cfg.data is None else cfg.data.name,
        "token_budget": cfg.token_budget,
        "patch_size": cfg.patch_size,
        "least_side": cfg.sides[0],
        "most_side": cfg.sides[1],
        "num_views": cfg.num_views,
        "square_size": squares.global_views.size,
        "square_batch": squares.batch_size,
        **figures(series),
    }


def figures(measured: Mapping[str, Series]) -> dict[str, Any]:
    """Return rates of pictures and patches, and those of squares beside packed views'."""
    rates = {
        what: {
            name: summarise_rates([w.stages[what] / w.seconds for w in series.windows])
            for name, series in measured.items()
        }
        for what in COUNTED
    }

    def beside(what: str) -> dict[str, float]:
        return {
            backend: rates[what][f"packed, {backend}"].median / found.median
            for name, found in rates[what].items()
            for kind, _, backend in [name.partition(", ")]
            if kind == "squares"
        }

    return {
        "timings": {
            name: asdict(summarise([1e3 * w.step_s for w in series.windows]))
            for name, series in measured.items()
        },
        **{
            f"{what}_per_s": {name: asdict(found) for name, found in of.items()}
            for what, of in rates.items()
        },
        **{f"{what}_beside_squares": beside(what) for what in COUNTED},
        "cpu_s_per_picture": {
            name: sum(w.stages["cpu_s"] for w in series.windows)
            / sum(w.stages["pictures"] for w in series.windows)
            for name, series in measured.items()
        },
    }


def table(rows: list[dict[str, Any]]) -> Table:
    (row,) = rows
    shown = Table(
        title=f"{row['num_views']} views of {row['data']} in patches of {row['patch_size']}, "
        f"squares of {row['square_size']} pixels, on {row['device']}, {row['num_threads']} threads",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
    )
    shown.add_column("", no_wrap=True)
    for column in ("pictures/s", "p5 - p95", "k patches/s", "x squares", "CPU ms"):
        shown.add_column(column, justify="right", no_wrap=True)
    for name, found in row["pictures_per_s"].items():
        kind, _, backend = name.partition(", ")
        ratio = row["patches_beside_squares"][backend] if kind == "packed" else 1.0
        shown.add_row(
            name,
            f"{found['median']:,.0f}",
            f"{found['p5']:,.0f} - {found['p95']:,.0f}",
            f"{row['patches_per_s'][name]['median'] / 1e3:,.0f}",
            f"{ratio:.2f}",
            f"{1e3 * row['cpu_s_per_picture'][name]:.3g}",
        )
    return shown


def main(argv: list[str] | None = None) -> None:
    cfg = read_command(Config, SUBJECT, argv)
    with TemporaryDirectory() as folder:
        path = cfg.data
        if path is None:
            from m3i_fast.pipelines.sources import synthetic

            path = synthetic.build(Path(folder) / "shards", num_samples=cfg.num_pictures)
        publish(SUBJECT, [measure_row(cfg, path)], table, record=cfg.record)
