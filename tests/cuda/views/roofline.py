"""What views' kernel takes of a GPU, by closed forms of a recipe's sizes: a prediction.

`python -m tests.cuda.views.roofline` writes cuda/views/ROOFLINE.md.
"""

from __future__ import annotations

import json

from m3i_fast.config.data import ViewConfig
from m3i_fast.costs.view_cost import ViewWork, view_work
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


def times_us(work: ViewWork) -> tuple[float, float, float]:
    """Return how long memory, cache and loads take, each alone, on all multiprocessors."""
    clocks = work.loads / LANES / MULTIPROCESSORS
    return (
        work.memory / MEMORY_TB_S / 1e6,
        work.cache / CACHE_TB_S / 1e6,
        clocks / CLOCK_GHZ / 1e3,
    )


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
        work = view_work(groups, HEIGHT, WIDTH)
        cells = [f"{n / 1e6:.2f}" for n in (work.memory, work.cache, work.loads)]
        cells += [f"{us:.2f}" for us in times_us(work)]
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
