"""How many pictures a second a loader gives: published figures, rows of the ledger, assumptions.

A picture is read, decoded and cut into views. On a GPU the engines for JPEG decode a share of them,
threads the rest, and the views are cut on the card; without one threads do all. Each of these
bounds the loader alone, and the slowest bounds it together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.costs.gpus import Card
from m3i_fast.costs.view_cost import CACHE_BYTE_S, LANES, PICTURE, cpu_view_s, view_times, view_work

Bound = Literal["decoding", "views", "reading"]
ENGINES, THREADS, VIEWS, READING = "JPEG engines", "threads", "views on the card", "reading"

# `decode, torchvision` (libjpeg-turbo) of the row `2 x 224` of benchmarks/results/loader.jsonl:
# CPU time for a JPEG of 375 x 500 pixels and quality 90.
LEDGER_RUN = "b21b7cc8a8c6403a"
DECODE_MS = 0.986
# torchvision's pull request 8496: an A100 decodes 1,000 JPEGs of 551 x 676 pixels in the mean in
# 127.65 ms, by its five engines.
ENGINE_PIXEL_S = 1000 * 551 * 676 / 0.12765 / 5
HARDWARE_SHARE = 0.65  # DALI's default of hw_decoder_load: its pull request 6366
LAUNCH_S = 5e-6  # of a kernel, for a batch
BYTES = 110e3  # ImageNet's mean, at PICTURE
PACKED_SIDE, PACKED_BYTES = 256, 27e3  # `data pack --for-gpu 256`: docs/start/data_at_scale.md
FOLDER_BYTE_S = 25e9  # of a node, assumed: the peak that DGX A100's data sheet has of its drives
BUCKET_BYTE_S = 12.5e9  # of a node, assumed: a port of 100 Gbit/s
DRIVES = "assumed: the peak of a DGX A100's NVMe drives, by its data sheet"
PORT = "assumed: a port of 100 Gbit/s, or the card's network adapters where those are slower"
WORTH = 1.05  # times the pictures, or a change is not named


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Describe the stored pictures, and how fast a node reads them."""

    height: int = PICTURE[0]
    width: int = PICTURE[1]
    kilobytes: float | None = None
    """Kilobytes of a picture; None: 110 at 375 x 500, in proportion to the pixels."""
    read_byte_s: float = FOLDER_BYTE_S
    """Bytes a second of a node."""
    read_as: str = DRIVES
    """What that rate is."""

    @property
    def pixels(self) -> int:
        """Return the pixels of a picture."""
        return self.height * self.width

    @property
    def size(self) -> float:
        """Return the bytes of a picture."""
        if self.kilobytes is not None:
            return 1e3 * self.kilobytes
        return BYTES * self.pixels / (PICTURE[0] * PICTURE[1])

    def packed(self) -> Source:
        """Return the pictures as `data pack --for-gpu 256` leaves them."""
        scale = PACKED_SIDE / min(self.height, self.width)
        if scale >= 1:
            return self
        height, width = round(self.height * scale), round(self.width * scale)
        pixels = PACKED_SIDE**2 * PICTURE[1] / PICTURE[0]  # of those that have PACKED_BYTES
        size = min(PACKED_BYTES * height * width / pixels, self.size)
        return replace(self, height=height, width=width, kilobytes=size / 1e3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Help:
    """Name one change, and the pictures a second of a rank's loader with it."""

    change: str
    images_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderCost:
    """Hold what loading takes of one rank; rates are source pictures a second."""

    rates: Mapping[str, float]
    """What each part gives alone."""
    bound: Bound
    """What bounds the loader, whether or not training is slower."""
    hardware_share: float
    """Share of the pictures that the engines decode."""
    num_threads: int
    cores: float
    """Cores of the node for one rank."""
    decode_s: float
    """Seconds of a core for decoding one picture."""
    views_s: float
    """Seconds of a core for all views of one picture, or of the card where it cuts them."""
    thread_s: float
    """Seconds of a core for one picture, with the share that engines and card take left out."""
    picture_bytes: float
    helps: tuple[Help, ...] = field(default=())
    """What makes the loader faster, the most first."""

    @property
    def images_s(self) -> float:
        """Return the pictures a second of the loader."""
        return min(self.rates.values())

    @property
    def filled_cores(self) -> float:
        """Return the cores that the threads can fill."""
        return min(self.num_threads, self.cores)


def loader_cost(
    cfg: LoaderConfig, card: Card, source: Source, *, cores: float, local_ranks: int = 1
) -> LoaderCost:
    """Return what loading takes of a rank, and the changes that would help.

    cores: of the node, for one rank. local_ranks: ranks that share the node's reading.
    """

    def of(cfg: LoaderConfig, source: Source) -> LoaderCost:
        return _cost(cfg, card, source, cores=cores, local_ranks=local_ranks)

    cost = of(cfg, source)
    helps = [
        Help(change=name, images_s=of(changed, pictures).images_s)
        for name, changed, pictures in _changes(cfg, source, cost)
    ]
    useful = [one for one in helps if one.images_s >= WORTH * cost.images_s]
    return replace(cost, helps=tuple(sorted(useful, key=lambda one: -one.images_s)))


def _cost(
    cfg: LoaderConfig, card: Card, source: Source, *, cores: float, local_ranks: int
) -> LoaderCost:
    groups = [cfg.global_views, *([cfg.local_views] if cfg.local_views is not None else [])]
    groups = [_of_mean_size(group) if cfg.any_shape else group for group in groups]
    on_card = card.is_gpu and cfg.backend != "torch"
    share = 0.0
    if on_card and card.jpeg_engines:
        share = HARDWARE_SHARE if cfg.decoder_load is None else cfg.decoder_load
    decode_s = 1e-3 * DECODE_MS * source.pixels / (PICTURE[0] * PICTURE[1])
    work = view_work(groups, source.height, source.width)
    of_core = sum(group.count * cpu_view_s(group, source.height, source.width) for group in groups)
    views_s = of_core
    if on_card:
        views_s = max(view_times(work, card)) + LAUNCH_S / cfg.batch_size
    thread_s = (1 - share) * decode_s + (0.0 if on_card else views_s)
    rates = {READING: source.read_byte_s / local_ranks / source.size}
    bounds: dict[str, Bound] = {READING: "reading", ENGINES: "decoding", VIEWS: "views"}
    bounds[THREADS] = "decoding" if on_card or decode_s >= views_s else "views"
    if thread_s:
        rates[THREADS] = min(cfg.num_threads, cores) / thread_s
    if share:
        rates[ENGINES] = card.jpeg_engines * ENGINE_PIXEL_S / source.pixels / share
    if on_card:
        rates[VIEWS] = 1 / views_s
    return LoaderCost(
        rates=rates,
        bound=bounds[min(rates, key=rates.__getitem__)],
        hardware_share=share,
        num_threads=cfg.num_threads,
        cores=cores,
        decode_s=decode_s,
        views_s=views_s,
        thread_s=thread_s,
        picture_bytes=source.size,
    )


def _of_mean_size(group: ViewConfig) -> ViewConfig:
    """Return squares of the mean area of views of any shape, each side as likely as another."""
    low, high = group.sizes
    size = round(math.sqrt((low**2 + low * high + high**2) / 3))
    return replace(group, size=size, size_range=None, blur_kernel_size=None)


def _changes(
    cfg: LoaderConfig, source: Source, cost: LoaderCost
) -> Iterator[tuple[str, LoaderConfig, Source]]:
    """Yield changes that can help, each with the config and the pictures that it leaves.

    None of them changes what is trained: fewer views would also ask for more pictures.
    """
    yield "m3i-fast data pack SOURCE DIR --for-gpu 256", cfg, source.packed()
    threads = int(cost.cores) - 1  # one is training's own
    if threads > cfg.num_threads:
        yield f"--data.num-threads {threads}", replace(cfg, num_threads=threads), source
    if cost.hardware_share:
        engines = cost.rates[ENGINES] * cost.hardware_share
        balanced = engines / (engines + cost.filled_cores / cost.decode_s)
        load = round(balanced, 2)
        yield f"--data.hw-decoder-load {load:g}", replace(cfg, hw_decoder_load=load), source
    if cfg.hw_decoder_load == 0.0:
        yield "no --data.hw-decoder-load 0", replace(cfg, hw_decoder_load=None), source


def assumptions(cfg: LoaderConfig, card: Card, source: Source, cores: float) -> list[str]:
    """Return what a loader's cost rests on, a sentence each."""
    shown = [
        f"pictures of {source.height} x {source.width} pixels and {source.size / 1e3:,.0f} kB "
        "(--picture, --picture-kb), JPEGs",
        f"a node reads {source.read_byte_s / 1e9:g} GB/s (--read-gb-s; {source.read_as})",
        f"decoding on a core: {DECODE_MS:g} ms at 375 x 500, in proportion to the pixels "
        f"(benchmarks/results/loader.jsonl, run {LEDGER_RUN}, an AMD EPYC)",
        f"{cores:g} cores a rank (--cores), which nothing else takes",
    ]
    if card.is_gpu and cfg.backend != "torch":
        shown.append(
            f"engines for JPEG: {card.jpeg_engines} in a {card.name}, each "
            f"{ENGINE_PIXEL_S / 1e6:,.0f} million pixels a second, as one of the five of an A100 "
            "(torchvision's pull request 8496); they take baseline JPEGs, "
            f"{HARDWARE_SHARE:.0%} of a batch where neither data.hw_decoder_load nor "
            "data.exact_decode is set (DALI's pull request 6366); the rest costs a core what "
            "decoding there does"
        )
        shown.append(
            "views on the card: the longest of bytes over the memory's rate, bytes over a cache's "
            f"of {CACHE_BYTE_S / 1e12:g} TB/s (assumed) and loads from shared memory, {LANES} a "
            "clock and multiprocessor, and one launch a batch: a lower bound, as in "
            "m3i-fast bench roofline"
        )
    else:
        shown.append(
            "views on a core: rows of benchmarks/results/views.jsonl, the resize in proportion to "
            "its taps, colours and blur to the view's pixels and their probabilities"
        )
    return shown
