"""What the cutting of views takes, in closed form of the sizes of a picture and of its views.

Crops have the mean area of their group, in the shape of the picture. Times on a CPU are those of
rows of the ledger, in proportion: the resize to its taps, colours and blur to the view's pixels and
to how likely they are. No time of a GPU is measured: there are bytes, and loads of shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from m3i_fast.config.data import ViewConfig
from m3i_fast.costs.gpus import Card

# A view of 224 pixels of a picture of 375 x 500 on one core, in milliseconds: rows `2 x 224, resize
# alone` and `2 x 224` of benchmarks/results/views.jsonl, whose colours the second config has.
LEDGER_RUN = "c597208c640246d5"
RESIZE_MS, WHOLE_MS = 0.1632, 0.3086
PICTURE = (375, 500)  # height and width
CACHE_BYTE_S = 5.5e12  # assumed of every card
LANES = 32  # loads of a multiprocessor from shared memory in a clock
MEASURED = ViewConfig(blur_probability=0.5, solarize_probability=0.1)


@dataclass(frozen=True, slots=True)
class ViewWork:
    """Count the work of all views of one picture on a GPU."""

    memory: float
    """Bytes from the card's memory and to it."""
    cache: float
    """Bytes read and written in its cache."""
    loads: float
    """Loads of a lane from shared memory."""


def taps_of_resize(cfg: ViewConfig, height: float, width: float) -> float:
    """Return the taps for a crop of a size in pixels, each of three channels: across, then down."""
    half = 2 if cfg.interpolation == "cubic" else 1

    def taps(pixels: float) -> float:
        return 2 * half * max(pixels / cfg.size, 1.0)

    return height * cfg.size * taps(width) + cfg.size**2 * taps(height)


def loads_of_blur(cfg: ViewConfig) -> float:
    """Return the loads of both directions: two values and a weight a step, for seven pixels."""
    radius = min(cfg.blur_kernel // 2, round(5.5 * sum(cfg.blur_sigma) / 2))
    return 2 * 3 * cfg.size**2 * (3 * radius + 7) / 7


def view_work(groups: Sequence[ViewConfig], height: int, width: int) -> ViewWork:
    """Return the work for one picture; a group has `count` views.

    A picture's views run side by side, so it is read from memory once. In cache crops are read,
    views written, and read and written again for contrast and for a blur.
    """
    picture = 3 * height * width
    read = written = cache = loads = 0.0
    for cfg in groups:
        side = _side(cfg)
        view = 3 * cfg.size**2
        contrasted = cfg.jitter_probability * (cfg.contrast > 0)
        read += cfg.count * side**2 * picture
        written += cfg.count * view
        cache += cfg.count * 2 * view * (contrasted + cfg.blur_probability)
        resize = 4 * taps_of_resize(cfg, side * height, side * width)  # a weight and three bytes
        loads += cfg.count * (resize + cfg.blur_probability * loads_of_blur(cfg))
    return ViewWork(min(read, picture) + written, read + written + cache, loads)


def view_times(work: ViewWork, card: Card) -> tuple[float, float, float]:
    """Return the seconds that memory, cache and loads take, each alone, on a whole GPU."""
    return (
        work.memory / card.memory_byte_s,
        work.cache / CACHE_BYTE_S,
        work.loads / (LANES * card.multiprocessors * card.clock_hz),
    )


def cpu_view_s(cfg: ViewConfig, height: int, width: int) -> float:
    """Return the seconds of one core for one view of a group."""
    resize = RESIZE_MS * _taps(cfg, height, width) / _taps(MEASURED, *PICTURE)
    pixels = (cfg.size / MEASURED.size) ** 2
    colours = (WHOLE_MS - RESIZE_MS) * pixels * _likely(cfg) / _likely(MEASURED)
    return 1e-3 * (resize + colours)


def _side(cfg: ViewConfig) -> float:
    """Return the side of a crop of the mean area over the picture's."""
    return (sum(cfg.scale) / 2) ** 0.5


def _taps(cfg: ViewConfig, height: int, width: int) -> float:
    return taps_of_resize(cfg, _side(cfg) * height, _side(cfg) * width)


def _likely(cfg: ViewConfig) -> float:
    """Return how many passes of colours and of blur a view has in the mean."""
    return cfg.jitter_probability * cfg.jitters + cfg.blur_probability
