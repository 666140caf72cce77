"""What views' kernel takes of a GPU, by closed forms of a recipe's sizes: a prediction.

`python -m tests.cuda.views.roofline` writes cuda/views/ROOFLINE.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from m3i_fast.config.data import ViewConfig
from tests.shared.cuda.nvcc import CUDA

FOLDER = CUDA / "views"
PAGE = FOLDER / "ROOFLINE.md"
HEIGHT, WIDTH = 375, 500  # pixels of the picture

MULTIPROCESSORS, CLOCK_GHZ, LANES = 132, 1.83, 32  # loads of shared memory in a clock
MEMORY_TB_S, CACHE_TB_S = 3.35, 5.5

BLURRED = {"blur_probability": 0.5}
RECIPES: dict[str, tuple[ViewConfig, ...]] = {
    "1 x 224, resize alone": (ViewConfig(count=1, jitter_probability=0.0, gray_probability=0.0),),
    "2 x 224": (ViewConfig(count=2, **BLURRED),),
    "2 x 224 + 8 x 96": (
        ViewConfig(count=2, **BLURRED),
        ViewConfig(count=8, size=96, scale=(0.05, 0.3), **BLURRED),
    ),
}


@dataclass(frozen=True, slots=True)
class Work:
    """Of one picture: bytes from memory and in cache, and loads of a lane from shared memory."""

    memory: float
    cache: float
    loads: float

    def times_us(self) -> tuple[float, float, float]:
        """Return how long each takes if nothing else does, with all multiprocessors at work."""
        clocks = self.loads / LANES / MULTIPROCESSORS
        return (
            self.memory / MEMORY_TB_S / 1e6,
            self.cache / CACHE_TB_S / 1e6,
            clocks / CLOCK_GHZ / 1e3,
        )


def loads_of_resize(cfg: ViewConfig, height: float, width: float) -> float:
    """Return the loads for a crop: a weight and three bytes a tap, across and then down."""
    half = 2 if cfg.interpolation == "cubic" else 1

    def taps(pixels: float) -> float:
        return 2 * half * max(pixels / cfg.size, 1.0)

    across = height * cfg.size * taps(width)
    return 4 * (across + cfg.size**2 * taps(height))


def loads_of_blur(cfg: ViewConfig) -> float:
    """Return the loads of both directions: two values and a weight a step, for seven pixels."""
    radius = min(cfg.blur_kernel // 2, round(5.5 * sum(cfg.blur_sigma) / 2))
    return 2 * 3 * cfg.size**2 * (3 * radius + 7) / 7


def work_of(groups: tuple[ViewConfig, ...]) -> Work:
    """Return the work for one picture, of crops of their mean area, in the picture's shape."""
    picture = 3 * HEIGHT * WIDTH
    read = written = cache = loads = 0.0
    for cfg in groups:
        side = (sum(cfg.scale) / 2) ** 0.5
        view = 3 * cfg.size**2
        contrasted = cfg.jitter_probability * (cfg.contrast > 0)
        read += cfg.count * side**2 * picture
        written += cfg.count * view
        cache += cfg.count * 2 * view * (contrasted + cfg.blur_probability)
        resize = loads_of_resize(cfg, side * HEIGHT, side * WIDTH)
        loads += cfg.count * (resize + cfg.blur_probability * loads_of_blur(cfg))
    return Work(min(read, picture) + written, read + written + cache, loads)


def render() -> str:
    budget = json.loads((FOLDER / "budget.json").read_text())["sm_90a"]
    ((kernel, used),) = budget.items()
    assert used["spill_bytes"] == 0
    lines = [
        "# views on an H100: a prediction",
        "",
        "No GPU has run this kernel yet. `python -m tests.cuda.views.roofline` writes this page",
        "from the budget and a recipe's sizes; a test compares.",
        "",
        f"`{kernel}`: {used['registers']} registers a thread, none spilled; 38 KiB of shared",
        "memory a block: four blocks on a multiprocessor. One launch a batch.",
        "",
        f"Of one decoded picture of {HEIGHT} x {WIDTH} pixels, with crops of their mean area and",
        f"the probabilities of the recipe. Assumed: memory at {MEMORY_TB_S} TB/s, cache at",
        f"{CACHE_TB_S} TB/s, {MULTIPROCESSORS} multiprocessors at {CLOCK_GHZ} GHz with {LANES}",
        "loads of shared memory in a clock. Not counted: arithmetic (colours in fp32, above all",
        "the hue), weights in float64, barriers, bank conflicts.",
        "",
        "| views | memory, MB | cache, MB | loads, million | memory, us | cache, us | loads, us |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, groups in RECIPES.items():
        work = work_of(groups)
        cells = [f"{n / 1e6:.2f}" for n in (work.memory, work.cache, work.loads)]
        cells += [f"{us:.2f}" for us in work.times_us()]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    lines += [
        "",
        "A picture's views run side by side, so it is read from memory once. In cache crops are",
        "read, views written, and read and written again for contrast and for a blur.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(render())
