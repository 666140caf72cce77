"""Our loader beside others that do the same work on the same shards, and beside decoding alone.

    m3i-fast bench loader RECIPE [--synthetic-data] [--data.path SHARDS] [--data.num-threads N]

Three rows a source: one global view, the recipe's global views, and these with local views, the
recipe's or eight of 96 for 224 pixels. In each all loaders take turns in one run (`core/
timed_windows`), with as many processes or threads, after their views were found to have the same
shapes and, within what chance allows, the same means and deviations (`peers` says what the others
are). Decoding alone takes pictures from memory in as many threads, by each decoder that is
installed: what no loader on this processor is faster than. Images are source images, however many
views each gives; CPU-seconds and bytes read are of this process and of those that it started.

A window begins when the others have filled their queues, and after what was ready is used up.
Shards come from the page cache, which the check has filled, from a copy in memory (`--sources
memory`), or from a bucket of moto's S3 server on loopback (`--sources bucket`), which shares the
cores with all loaders and is not counted: ours reads clumps of samples and keeps none for the next
epoch, webdataset whole shards by curl, the others a sample by a request.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.table import Table

from m3i_fast.benchmarks.core.command import read_recipe_command
from m3i_fast.benchmarks.core.harness import publish, ratio_table, summarise
from m3i_fast.benchmarks.core.rate_statistics import summarise_rates
from m3i_fast.benchmarks.core.timed_windows import (
    COMPARED,
    Schedule,
    Series,
    TimedWork,
    measure_windows,
)
from m3i_fast.benchmarks.loader.bucket import in_bucket
from m3i_fast.benchmarks.loader.decoders import DECODERS, DecodeAlone
from m3i_fast.benchmarks.loader.measuring import Endless, Statistics, expect_same, look
from m3i_fast.benchmarks.loader.peers import PEERS
from m3i_fast.benchmarks.loader.work import StoredSamples, Work
from m3i_fast.config import TrainConfig
from m3i_fast.config.data import BackendName, LoaderConfig, ViewConfig
from m3i_fast.engine.precision.arithmetic import resolve_device
from m3i_fast.pipelines.dataset.manifest import is_free, quoted
from m3i_fast.pipelines.loader import Loader
from m3i_fast.recipes import recipes

SUBJECT = "loader"
RECIPE = "m3i_vit_b"
OURS, OURS_BY_TORCH = "m3i_fast", "m3i_fast, torch"
LOCAL_COUNT, LOCAL_SCALE, LOCAL_SHARE = 8, (0.05, 0.32), 3 / 7  # DINO's, 96 for 224 pixels
MEMORY = Path("/dev/shm")
Views = Literal["one", "global", "local"]
Source = Literal["page_cache", "memory", "bucket"]


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
    views: tuple[Views, ...] = ("one", "global", "local")
    """Rows: one global view, the recipe's global views, these and local ones."""
    sources: tuple[Source, ...] = ("page_cache",)
    """Where shards are read from: the page cache, a copy of them in /dev/shm, or a bucket on
    loopback."""
    peers: tuple[str, ...] = tuple(PEERS)
    """Loaders of others by name; those that are not installed are left out, and named."""
    shuffle_buffer: int = 1024
    """Samples in the shuffle buffer of peers that read shards in order."""
    windows: int = 5
    """Samples of each loader."""
    window_seconds: float = 5.0
    """Length of a sample."""
    check_images: int = 512
    """Whose views are compared before anything is timed, of each loader."""
    record: bool = True
    """Append the rows to the ledger, benchmarks/results/loader.jsonl."""

    def __post_init__(self) -> None:
        for name in ("num_pictures", "check_images", "shuffle_buffer"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag}: expected at least 1, got {getattr(self, name)}")
        if unknown := sorted(set(self.peers) - set(PEERS)):
            raise ValueError(f"--peers: expected some of {list(PEERS)}, got {unknown}")
        for name in ("views", "sources"):
            if not getattr(self, name):
                raise ValueError(f"--{name}: expected at least one, got none")

    def schedule(self, num_ahead: int) -> Schedule:
        """Return when to time loaders that hold at most so many batches ready."""
        return Schedule(
            num_windows=self.windows,
            window_s=self.window_seconds,
            warmup_steps=num_ahead + COMPARED,  # of which the last ones are made while waited for
            max_warmup_s=4 * self.window_seconds,
            lead_steps=1,
        )

    def absent(self, source: Source) -> dict[str, str]:
        """Return why peers are left out, by name."""
        why = {name: PEERS[name].absence for name in self.peers}
        if source == "bucket":
            why = {n: w or _only_files(n) for n, w in why.items()}
        return {name: reason for name, reason in why.items() if reason}


def _only_files(name: str) -> str:
    return "" if PEERS[name].reads_buckets else "it reads files alone"


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


def with_views(cfg: LoaderConfig, views: Views) -> LoaderConfig:
    """Return the config of a row's views."""
    if views == "one":
        return replace(cfg, global_views=replace(cfg.global_views, count=1), local_views=None)
    return replace(cfg, local_views=local_views(cfg) if views == "local" else None)


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


def placed(path: Path, source: Source, stack: ExitStack) -> Path:
    """Return the folder to read: the shards', or a copy in memory until the stack is closed.

    Raises OSError where memory has no room for the copy.
    """
    if source != "memory":
        return path
    folder = Path(stack.enter_context(TemporaryDirectory(prefix="m3i-bench-", dir=MEMORY)))
    needed = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if needed > (free := shutil.disk_usage(MEMORY).free):
        raise OSError(
            f"--sources memory: expected {needed:,} bytes free in {MEMORY}, got {free:,}; name "
            "fewer shards by --data.path, or --sources page_cache"
        )
    return Path(shutil.copytree(path, folder / path.name))


# ---- Rows ----------------------------------------------------------------------------------------


def rows_of(cfg: Config, path: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each source and views."""
    for source in cfg.sources:
        with ExitStack() as stack:
            data = replace(cfg.config.data, path=placed(path, source, stack))
            ours, address = data, None
            if source == "bucket":
                ours, address = stack.enter_context(in_bucket(data))
            for views in cfg.views:
                yield _row(cfg, with_views(data, views), with_views(ours, views), source, address)


def _row(
    cfg: Config, data: LoaderConfig, ours: LoaderConfig, source: Source, address: str | None
) -> dict[str, Any]:
    """Time all loaders. data: the shards in a folder. ours: where our loader reads them."""
    cuda = resolve_device(cfg.config.device).type == "cuda"
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of an operator: loaders have threads or processes of their own
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, num_threads)
        work = Work.of(data, shuffle_buffer=cfg.shuffle_buffer, device_id=0 if cuda else None)
        work = replace(work, address=address)
        loaders = _loaders(ours, work, [n for n in cfg.peers if n not in cfg.absent(source)], stack)
        statistics_by_loader = {
            name: look(batches, cfg.check_images) for name, batches in loaders.items()
        }
        for name, others in statistics_by_loader.items():
            expect_same(statistics_by_loader[OURS], others, name)
        ahead = {name: _num_ahead(name, data) for name in loaders}
        works: dict[str, TimedWork] = {
            name: Endless(batches, num_images=data.batch_size, num_ahead=ahead[name])
            for name, batches in loaders.items()
        }
        works |= _decoders(data)
        series = measure_windows(works, cfg.schedule(max(ahead.values())))
    return {
        "config": _config(cfg, ours),
        **_settings(cfg, data, source, cuda),
        "host_bytes_per_image": statistics_by_loader[OURS].bytes_per_image,
        **_figures(series),
        "statistics": _statistics(statistics_by_loader),
        "left_out": cfg.absent(source),
    }


def _config(cfg: Config, ours: LoaderConfig) -> TrainConfig:
    """Return the recipe with what a row changes; its objective may not allow one global view.

    Shards drawn for this are gone, and a copy's place says nothing: the path is the one asked for.
    """
    changed = ("local_views", "lanes", "fetch_ahead", "cache_gib")  # the last three in a bucket
    data = replace(cfg.config.data, **{name: getattr(ours, name) for name in changed})
    return replace(cfg.config, data=data)


def _loaders(
    data: LoaderConfig, work: Work, peers: Sequence[str], stack: ExitStack
) -> dict[str, Iterator[Any]]:
    """Return ours by both backends, on a GPU by DALI alone, and the installed peers, by name."""
    backends: dict[str, BackendName] = {OURS: "dali"}
    if work.device_id is None:
        backends[OURS_BY_TORCH] = "torch"
    ours: dict[str, Iterator[Any]] = {}
    for name, backend in backends.items():
        one = replace(data, backend=backend, cache_dir=data.cache_dir / backend)
        loader = Loader(one, device_id=work.device_id)
        stack.callback(loader.close)
        ours[name] = loader
    theirs = {name: PEERS[name].batches(work) for name in peers}
    for batches in theirs.values():
        if hasattr(batches, "close"):  # a generator holds threads until it ends
            stack.callback(batches.close)
    return {**ours, **theirs}


def _num_ahead(name: str, data: LoaderConfig) -> int:
    """Return the most batches that a loader holds ready."""
    if name not in PEERS:
        return data.prefetch
    return PEERS[name].num_ahead(Work.of(data, shuffle_buffer=1, device_id=None))


def _decoders(data: LoaderConfig) -> dict[str, TimedWork]:
    shards = Work.of(data, shuffle_buffer=1, device_id=None).shards
    encoded = StoredSamples(shards).encoded(data.batch_size)
    return {
        name: Endless(
            DecodeAlone(decoder.make(encoded, data.num_threads)),
            num_images=len(encoded),
            num_ahead=0,
        )
        for name, decoder in DECODERS.items()
        if decoder.is_installed
    }


def _settings(cfg: Config, data: LoaderConfig, source: Source, cuda: bool) -> dict[str, Any]:
    whole, local = data.global_views, data.local_views
    return {
        "recipe": cfg.recipe,
        "device": "cuda" if cuda else "cpu",
        "num_threads": data.num_threads,
        "dtype": "uint8",
        "batch_size": data.batch_size,
        "data": "synthetic, 500 x 375" if cfg.synthetic_data else data.path.name,
        "source": source,
        "global_views": f"{whole.count} x {whole.size}",
        "local_views": f"{local.count} x {local.size}" if local is not None else "none",
    }


def _figures(measured: Mapping[str, Series]) -> dict[str, Any]:
    rates = {n: [w.images_s for w in series.windows] for n, series in measured.items()}
    medians = {name: summarise_rates(values).median for name, values in rates.items()}
    decoders = [name for name in measured if name in DECODERS]
    return {
        "timings": {
            name: asdict(summarise([1e3 * w.step_s for w in series.windows]))
            for name, series in measured.items()
        },
        "images_per_s": {n: asdict(summarise_rates(values)) for n, values in rates.items()},
        "times_slower_than_ours": {n: medians[OURS] / rate for n, rate in medians.items()},
        "cpu_s_per_image": _per_image(measured, "cpu_s"),
        "read_bytes_per_image": _per_image(measured, "read_bytes"),
        "settled": {name: series.is_settled for name, series in measured.items()},
        "floor": {"decoder": max(decoders, key=medians.__getitem__)},
    }


def _per_image(measured: Mapping[str, Series], what: str) -> dict[str, float]:
    return {
        name: sum(w.stages[what] for w in series.windows)
        / sum(w.num_images for w in series.windows)
        for name, series in measured.items()
    }


def _statistics(statistics_by_loader: Mapping[str, Statistics]) -> dict[str, dict[str, float]]:
    return {name: {"mean": s.mean, "std": s.std} for name, s in statistics_by_loader.items()}


def table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    heading = f"{first['recipe']}, batch {first['batch_size']}"

    def label(row: dict[str, Any]) -> str:
        local = row["local_views"]
        views = f"{row['global_views']}" + ("" if local == "none" else f" + {local}")
        return views + ("" if row["source"] == "page_cache" else f", {row['source']}")

    def rate(row: dict[str, Any], name: str) -> str:
        return f"{row['images_per_s'][name]['median']:,.4g}"

    def cpu(row: dict[str, Any], name: str) -> str:
        return f"{1e3 * row['cpu_s_per_image'][name]:.3g}"

    def read(row: dict[str, Any], name: str) -> str:
        return f"{row['read_bytes_per_image'][name] / 1e3:.3g}"

    more = {"img/s": rate, "CPU ms": cpu, "read kB": read}
    shown = ratio_table(SUBJECT, heading, rows, label, more)
    handed = ", ".join(f"{row['host_bytes_per_image'] / 1e3:.4g}" for row in rows)
    left_out = {name: why for row in rows for name, why in row["left_out"].items()}
    absent = [f"left out: {name}: {why}" for name, why in left_out.items()]
    shown.caption = "\n".join([f"a batch holds {handed} kB an image", *absent])
    return shown


def main(argv: list[str] | None = None) -> None:
    cfg = parse(sys.argv[1:] if argv is None else argv)
    with TemporaryDirectory() as folder:
        rows = rows_of(cfg, shards_of(cfg, Path(folder)))
        publish(SUBJECT, rows, table, record=cfg.record)
