"""What boltzmann's kernels by warpgroups take of a GPU, from their policy: a prediction.

`python -m tests.cuda.boltzmann.roofline` writes cuda/boltzmann/ROOFLINE.md.
"""

from __future__ import annotations

import json

from m3i_fast.benchmarks.tune.tile_roofline import (
    Gpu,
    Policy,
    Product,
    hopper_policy,
    predict,
    shared_bytes_per_clock,
)
from tests.shared.cuda.nvcc import CUDA

FOLDER = CUDA / "boltzmann"
PAGE = FOLDER / "ROOFLINE.md"
SIZES = ((32768, 512), (32768, 1024), (8192, 512))  # N = M, D


def _introduction(policy: Policy, gpu: Gpu) -> str:
    budget = json.loads((FOLDER / "budget.json").read_text())["sm_90a"]
    kernels = [used for name, used in budget.items() if "_hopper_" in name]
    (launched,) = {used["registers"] for used in kernels}
    assert not any(used["spill_bytes"] for used in kernels)
    kib = (policy.rows // policy.blocks + policy.columns) * policy.depth * 2 // 1024
    moved = f"{shared_bytes_per_clock(policy, gpu):.0f} bytes"
    return f"""# boltzmann on an H100: a prediction

No GPU has run these kernels yet. `python -m tests.cuda.boltzmann.roofline` writes this page from
the policy (`sm90/tiling.h`, `tiles.json`) and the budget; a test compares.

Assumed: {gpu.multiprocessors} multiprocessors at {gpu.clock_ghz:.2f} GHz, in a clock each
{gpu.flop_per_clock} flop in bfloat16, {gpu.exponentials_per_clock} exponentials, and
{gpu.shared_bytes_per_clock} bytes of shared memory; from the second-level cache
{gpu.cache_tb_s} TB/s. Not counted: how a launch begins and ends, what is reduced after it,
misses of the cache, limits of power.

- A multiprocessor has one block of {policy.consumers + 1} warpgroups, launched with {launched}
  registers a thread: {policy.registers[0]} stay with copies, {policy.registers[1]} go to products.
- A ring of {policy.stages} stages of {kib} KiB.
- {moved} of shared memory a clock where the tensor cores are at their rate.
"""


def _row(gpu: Gpu, launches: int, product: Product) -> list[str]:
    bounds = product.tensor_clocks, product.cache_clocks, product.exponential_clocks
    times = [f"{launches * clocks / gpu.clock_ghz / 1e6:.2f}" for clocks in bounds]
    return [str(launches), str(product.tiles), str(product.waves), *times]


def render(policy: Policy, gpu: Gpu) -> str:
    lines = [
        _introduction(policy, gpu),
        "| N = M | D | kernel | launches | tiles | waves | tensor cores, ms | cache | exp |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    totals = ["", "Forward and backward, each kernel at its slower bound:", ""]
    for rows, width in SIZES:
        made = predict(policy, gpu, rows, width)
        for name, (launches, product) in made.items():
            cells = [str(rows), str(width), name, *_row(gpu, launches, product)]
            lines.append("| " + " | ".join(cells) + " |")
        clocks = sum(launches * product.clocks for launches, product in made.values())
        seconds = clocks / gpu.clock_ghz / 1e9
        rate = 8 * rows * rows * width / seconds / 1e12
        totals.append(
            f"- N = M = {rows}, D = {width}: {seconds * 1e3:.1f} ms, {rate:.0f} Tflop/s of 8 N M D"
        )
    return "\n".join([*lines, *totals, ""])


if __name__ == "__main__":
    PAGE.write_text(render(hopper_policy(), Gpu()))
