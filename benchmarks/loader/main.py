"""Our loader beside others that do the same work on the same shards, and beside decoding alone.

    m3i-fast bench loader RECIPE [--synthetic-data] [--data.path SHARDS] [--data.num-threads N]

Two rows: the recipe's global views, and the same with local views, the recipe's or eight of 96 for
224 pixels. In each all loaders take turns in one run (`node_windows`), with as many processes or
threads, after their views were found to have the same shapes and, within what chance allows, the
same means and deviations (`loader_peers` says what the others are). Decoding alone takes pictures
from memory in as many threads, by the faster of two decoders: what no loader on this processor is
faster than. Images are source images, however many views each gives; CPU-seconds are of this
process and of those that it started.

Batches that were ready before a window are used up before it begins.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import tyro
from rich.table import Table
from torch import Tensor

from m3i_fast.benchmarks.core.command import read_recipe_command
from m3i_fast.benchmarks.core.harness import publish, ratio_table, summarise
from m3i_fast.benchmarks.core.rate_statistics import summarise_rates
from m3i_fast.benchmarks.core.timed_windows import Schedule, Series, TimedWork, measure_windows
from m3i_fast.benchmarks.loader.other_loaders import (
    DECODERS,
    PILLOW,
    PREFETCH_FACTOR,
    TENSORS,
    DecodeAlone,
    peer,
    read_encoded,
)
from m3i_fast.config import TrainConfig
from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.engine.precision.arithmetic import resolve_device
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.dataset.manifest import is_free, quoted
from m3i_fast.pipelines.loader import Loader
from m3i_fast.recipes import recipes

SUBJECT = "loader"
RECIPE = "m3i_vit_b"
OURS = "m3i_fast"
LOCAL_COUNT, LOCAL_SCALE, LOCAL_SHARE = 8, (0.05, 0.32), 3 / 7  # DINO's, 96 for 224 pixels
TOLERANCE, DEVIATIONS = 0.01, 4.0  # of means in units of 255; standard errors
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Config:
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: recipes()[RECIPE]()
    )
    recipe: Annotated[str, tyro.conf.Suppress] = RECIPE
    synthetic_data: bool = False
    """Make shards for this run in a temporary folder: JPEGs of 500 x 375 pixels, quality 90."""
    num_pictures: int = 512
    """With --synthetic-data: how many."""
    windows: int = 5
    """Samples of each loader."""
    window_seconds: float = 5.0
    """Length of a sample."""
    check_images: int = 512
    """Whose views are compared before anything is timed, of each loader."""
    record: bool = True
    """Append the rows to the ledger, benchmarks/results/loader.jsonl."""

    def __post_init__(self) -> None:
        for name in ("num_pictures", "check_images"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag}: expected at least 1, got {getattr(self, name)}")

    @property
    def schedule(self) -> Schedule:
        return Schedule(
            num_windows=self.windows,
            window_s=self.window_seconds,
            warmup_steps=self.num_ahead,
            max_warmup_s=4 * self.window_seconds,
            lead_steps=1,
        )

    @property
    def num_ahead(self) -> int:
        """Return the most batches that a loader holds ready."""
        data = self.config.data
        return max(data.prefetch, PREFETCH_FACTOR * data.num_threads)


def parse(argv: list[str]) -> Config:
    """Return what `RECIPE --flag value ...` asks for; raises as `read_recipe_command`."""
    return read_recipe_command(
        "loader", argv, lambda name, config: Config(config=config, recipe=name), RECIPE
    )


def local_views(cfg: LoaderConfig) -> ViewConfig:
    """Return the recipe's local views, or those of DINO."""
    whole = cfg.global_views
    if cfg.local_views is not None:
        return cfg.local_views
    side = round(LOCAL_SHARE * whole.size)
    return replace(whole, count=LOCAL_COUNT, size=side, scale=LOCAL_SCALE)


def shards_of(cfg: Config, folder: Path) -> Path:
    """Return the folder of the data. Raises FileNotFoundError, which says how to make them."""
    if cfg.synthetic_data:
        from m3i_fast.pipelines.sources import synthetic

        per_shard = max(cfg.num_pictures // max(8, cfg.config.data.num_threads), 1)
        return synthetic.build(
            folder / "shards", num_samples=cfg.num_pictures, samples_per_shard=per_shard
        )
    path = cfg.config.data.path
    if is_free(path):
        raise FileNotFoundError(
            f"--data.path: no shards at {path}; --synthetic-data makes some for this run, "
            f"`m3i-fast data synthetic {quoted(path)}` makes them to stay"
        )
    return path


# ---- What is timed -------------------------------------------------------------------------------


class Endless:
    """A loader as `measure_windows` repeats it, with the CPU-seconds that it takes."""

    def __init__(self, batches: Iterator[Any], *, num_images: int, num_ahead: int) -> None:
        self.num_images, self._num_ahead = num_images, num_ahead
        self._batches = batches
        self._cpu_s = cpu_seconds()

    def use_up(self) -> None:
        for _ in range(self._num_ahead):
            next(self._batches)

    def step(self) -> None:
        next(self._batches)

    def wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def read(self) -> dict[str, float]:
        before, self._cpu_s = self._cpu_s, cpu_seconds()
        return {"cpu_s": self._cpu_s - before}


def cpu_seconds() -> float:
    """Return the user and system seconds of this process and of all processes below it."""
    return sum(_process_s(pid) for pid in _with_children(str(os.getpid())))


def _with_children(pid: str) -> Iterator[str]:
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # ended
            for child in task.read_text().split():
                yield from _with_children(child)


def _process_s(pid: str) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):  # ended
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS  # utime, stime: proc(5), after the name


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """Means over the first views of some images, and the standard errors of these means."""

    shapes: list[list[int]]
    mean: float
    std: float
    mean_error: float
    std_error: float


def look(batches: Iterator[Any], num_images: int) -> Statistics:
    """Return the statistics of as many batches as hold that many images."""
    views: list[Tensor] = []
    shapes: list[list[int]] = []
    while sum(len(view) for view in views) < num_images:
        batch = next(batches)
        tensors = batch.tensors() if isinstance(batch, Batch) else list(batch)
        shapes = [list(tensor.shape) for tensor in tensors]
        views.append(tensors[0].cpu())
    of_images = torch.cat(views).flatten(1).float() / 255  # [N, 3 S S]
    mean, std = of_images.mean(1), of_images.std(1)
    count = len(of_images) ** 0.5
    return Statistics(
        shapes=shapes,
        mean=float(mean.mean()),
        std=float(std.mean()),
        mean_error=float(mean.std()) / count,
        std_error=float(std.std()) / count,
    )


def expect_same(ours: Statistics, theirs: Statistics, name: str) -> None:
    """Raise RuntimeError where the other loader's views differ in their statistics."""
    if ours.shapes != theirs.shapes:
        raise RuntimeError(f"{name}: expected tensors of {ours.shapes}, got {theirs.shapes}")
    for measure in ("mean", "std"):
        a, b = getattr(ours, measure), getattr(theirs, measure)
        chance = (
            getattr(ours, f"{measure}_error") ** 2 + getattr(theirs, f"{measure}_error") ** 2
        ) ** 0.5
        if not abs(a - b) <= TOLERANCE + DEVIATIONS * chance:
            raise RuntimeError(
                f"{name}: expected views of {measure} {a:.3f} as ours, within "
                f"{TOLERANCE + DEVIATIONS * chance:.3f}, got {b:.3f}"
            )


# ---- Rows ----------------------------------------------------------------------------------------


def rows_of(cfg: Config, path: Path) -> Iterator[dict[str, Any]]:
    """Yield the row with global views alone, then that with local views."""
    data = replace(cfg.config.data, path=path)
    for local in (None, local_views(data)):
        yield _row(cfg, replace(data, local_views=local))


def _row(cfg: Config, data: LoaderConfig) -> dict[str, Any]:
    cuda = resolve_device(cfg.config.device).type == "cuda"
    with ExitStack() as stack:
        ours = Loader(data, device_id=0 if cuda else None)
        stack.callback(ours.close)
        loaders: dict[str, Iterator[Any]] = {OURS: ours}
        loaders |= {kind: peer(data, kind) for kind in (PILLOW, TENSORS)}
        statistics_by_loader = {
            name: look(batches, cfg.check_images) for name, batches in loaders.items()
        }
        for name, others in statistics_by_loader.items():
            expect_same(statistics_by_loader[OURS], others, name)
        encoded = read_encoded(data, data.batch_size)
        for name, decode in DECODERS.items():
            alone = DecodeAlone(encoded, decode, data.num_threads)
            stack.callback(alone.close)
            loaders[name] = alone
        works: dict[str, TimedWork] = {
            name: Endless(
                batches,
                num_images=len(encoded) if name in DECODERS else data.batch_size,
                num_ahead=0 if name in DECODERS else cfg.num_ahead,
            )
            for name, batches in loaders.items()
        }
        series = measure_windows(works, cfg.schedule)
    measured = replace(cfg.config, data=replace(data, path=cfg.config.data.path))
    return {
        "config": measured,  # shards drawn for this are gone, and their place says nothing
        **_settings(cfg, data, cuda),
        **_figures(series),
        "statistics": _statistics(statistics_by_loader),
    }


def _settings(cfg: Config, data: LoaderConfig, cuda: bool) -> dict[str, Any]:
    whole, local = data.global_views, data.local_views
    return {
        "recipe": cfg.recipe,
        "device": "cuda" if cuda else "cpu",
        "num_threads": data.num_threads,
        "dtype": "uint8",
        "batch_size": data.batch_size,
        "data": "synthetic, 500 x 375" if cfg.synthetic_data else data.path.name,
        "global_views": f"{whole.count} x {whole.size}",
        "local_views": f"{local.count} x {local.size}" if local is not None else "none",
    }


def _figures(measured: Mapping[str, Series]) -> dict[str, Any]:
    rates = {n: [w.images_s for w in series.windows] for n, series in measured.items()}
    medians = {name: summarise_rates(values).median for name, values in rates.items()}
    return {
        "timings": {
            name: asdict(summarise([1e3 * w.step_s for w in series.windows]))
            for name, series in measured.items()
        },
        "images_per_s": {n: asdict(summarise_rates(values)) for n, values in rates.items()},
        "times_slower_than_ours": {n: medians[OURS] / rate for n, rate in medians.items()},
        "cpu_s_per_image": {
            name: sum(w.stages["cpu_s"] for w in series.windows)
            / sum(w.num_images for w in series.windows)
            for name, series in measured.items()
        },
        "settled": {name: series.is_settled for name, series in measured.items()},
        "floor": {"decoder": max(DECODERS, key=medians.__getitem__)},
    }


def _statistics(statistics_by_loader: Mapping[str, Statistics]) -> dict[str, dict[str, float]]:
    return {name: {"mean": s.mean, "std": s.std} for name, s in statistics_by_loader.items()}


def table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    heading = f"{first['recipe']}, batch {first['batch_size']}"

    def label(row: dict[str, Any]) -> str:
        local = row["local_views"]
        return f"{row['global_views']}" + ("" if local == "none" else f" + {local}")

    def rate(row: dict[str, Any], name: str) -> str:
        return f"{row['images_per_s'][name]['median']:,.4g}"

    def cpu(row: dict[str, Any], name: str) -> str:
        return f"{1e3 * row['cpu_s_per_image'][name]:.3g}"

    more = {"images/s": rate, "CPU ms": cpu}
    return ratio_table(SUBJECT, heading, rows, label, more)


def main(argv: list[str] | None = None) -> None:
    cfg = parse(sys.argv[1:] if argv is None else argv)
    with TemporaryDirectory() as folder:
        rows = rows_of(cfg, shards_of(cfg, Path(folder)))
        publish(SUBJECT, rows, table, record=cfg.record)
