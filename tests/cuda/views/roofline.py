"""What views' kernel takes of a GPU, by closed forms of a recipe's sizes: a prediction.

`python -m tests.cuda.views.roofline` writes cuda/views/ROOFLINE.md.
"""

from __future__ import annotations

import json

from m3i_fast.config.data import ViewConfig
from m3i_fast.costs.gpus import CARDS
from m3i_fast.costs.view_cost import CACHE_BYTE_S, LANES, view_times, view_work
from tests.shared.cuda.nvcc import CUDA

FOLDER = CUDA / "views"
PAGE = FOLDER / "ROOFLINE.md"
HEIGHT, WIDTH = 375, 500  # pixels of the picture

CARD = CARDS["h100"]

BLURRED = {"blur_probability": 0.5}
RECIPES: dict[str, tuple[ViewConfig, ...]] = {
    "1 x 224, resize alone": (ViewConfig(count=1, jitter_probability=0.0, gray_probability=0.0),),
    "2 x 224": (ViewConfig(count=2, **BLURRED),),
    "2 x 224 + 8 x 96": (
        ViewConfig(count=2, **BLURRED),
        ViewConfig(count=8, size=96, scale=(0.05, 0.3), **BLURRED),
    ),
}


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
        "the probabilities of the recipe. Assumed: memory at "
        f"{CARD.memory_byte_s / 1e12} TB/s, cache at",
        f"{CACHE_BYTE_S / 1e12} TB/s, {CARD.multiprocessors} multiprocessors at "
        f"{CARD.clock_hz / 1e9} GHz with {LANES}",
        "loads of shared memory in a clock. Not counted: arithmetic (colours in fp32, above all",
        "the hue), weights in float64, barriers, bank conflicts.",
        "",
        "| views | memory, MB | cache, MB | loads, million | memory, us | cache, us | loads, us |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, groups in RECIPES.items():
        work = view_work(groups, HEIGHT, WIDTH)
        cells = [f"{n / 1e6:.2f}" for n in (work.memory, work.cache, work.loads)]
        cells += [f"{1e6 * seconds:.2f}" for seconds in view_times(work, CARD)]
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
