"""What boltzmann's kernels by warpgroups take of a GPU, from their policy: a prediction.

`python -m tests.cuda.boltzmann_roofline` writes cuda/boltzmann/ROOFLINE.md.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from math import ceil

from tests.cuda.nvcc import CUDA

FOLDER = CUDA / "boltzmann"
PAGE = FOLDER / "ROOFLINE.md"
SIZES = ((32768, 512), (32768, 1024), (8192, 512))  # N = M, D


@dataclass(frozen=True, slots=True)
class Gpu:
    """An H100 SXM by its data sheet; the rate of its second-level cache is an assumption."""

    multiprocessors: int = 132
    clock_ghz: float = 1.83  # at which 989 Tflop/s are reached
    flop_per_clock: int = 4096  # of a multiprocessor, dense, bfloat16
    exponentials_per_clock: int = 16  # of a multiprocessor
    shared_bytes_per_clock: int = 128
    cache_tb_s: float = 5.5


@dataclass(frozen=True, slots=True)
class Policy:
    """What stands in the sources."""

    rows: int  # of a cluster's tile
    columns: int
    depth: int
    stages: int
    blocks: int  # of a cluster
    consumers: int  # warpgroups that multiply
    registers: tuple[int, int]  # of a thread that copies, and that multiplies
    sums_elements: int
    grads_elements: int


def _find(pattern: str, *names: str) -> list[int]:
    for name in names:
        if found := re.search(pattern, (FOLDER / name).read_text()):
            return [int(group) for group in found.groups()]
    raise AssertionError(f"{pattern}: not in {names}")


def read_policy() -> Policy:
    names = "boltzmann_hopper.h", "boltzmann_tiling.h"
    rows, columns, depth, stages = _find(r"kHopperTile\{(\d+), (\d+), (\d+), (\d+),", *names)
    (blocks,), (consumers,) = (
        _find(rf"{name} = (\d+);", *names) for name in ("kClusterBlocks", "kConsumers")
    )
    registers = _find(r"kProducerRegisters = (\d+), kConsumerRegisters = (\d+);", *names)
    (sums_shift,) = _find(r"kSumsElements = int64_t\{1\} << (\d+);", *names)
    (grads_mib,) = _find(r"architecture >= 90 \? (\d+) : \d+\} << 20", *names)
    return Policy(
        *(rows, columns, depth, stages, blocks, consumers),
        (registers[0], registers[1]),
        1 << sums_shift,
        (grads_mib << 20) // 2,
    )


@dataclass(frozen=True, slots=True)
class Product:
    """Tiles that the clusters of one launch share out, and its bounds in clocks."""

    tiles: int
    waves: int
    tensor_clocks: float
    cache_clocks: float
    exponential_clocks: float

    @property
    def clocks(self) -> float:
        """Of the slower one; exponentials lie beside the other warpgroup's products."""
        return max(self.tensor_clocks, self.cache_clocks)


def predict_product(
    policy: Policy, gpu: Gpu, tiles: int, terms: int, exponentials: bool
) -> Product:
    waves = ceil(tiles / (gpu.multiprocessors // policy.blocks))
    steps = waves * ceil(terms / policy.depth)
    block = policy.rows // policy.blocks * policy.columns  # elements of a thread block's tile
    own_boxes = (policy.rows + policy.columns) // policy.blocks * policy.depth * 2
    cache = gpu.cache_tb_s * 1e3 / gpu.clock_ghz / gpu.multiprocessors  # bytes a clock
    return Product(
        tiles,
        waves,
        steps * 2 * block * policy.depth / gpu.flop_per_clock,
        steps * own_boxes / cache,
        waves * block / gpu.exponentials_per_clock if exponentials else 0,
    )


def predict(policy: Policy, gpu: Gpu, rows: int, width: int) -> dict[str, tuple[int, Product]]:
    """By kernel, how many launches it takes for N = M = `rows`, and one of them."""
    made = {}
    for name, elements in (("sums", policy.sums_elements), ("grads", policy.grads_elements)):
        side = min(rows, int(elements**0.5))
        launches = ceil(rows / side) ** 2
        tiles = ceil(side / policy.rows) * ceil(side / policy.columns)
        made[name] = launches, predict_product(policy, gpu, tiles, width, True)
        if name == "grads":
            tiles = 2 * ceil(side / policy.rows) * ceil(width / policy.columns)
            made["features"] = launches, predict_product(policy, gpu, tiles, side, False)
    return made


def shared_bytes_per_clock(policy: Policy, gpu: Gpu) -> float:
    """While the tensor cores work: what wgmma reads, B once a warpgroup, and what copies write."""
    block_rows = policy.rows // policy.blocks
    read = (block_rows + policy.consumers * policy.columns) * policy.depth * 2
    written = (block_rows + policy.columns) * policy.depth * 2
    clocks = 2 * block_rows * policy.columns * policy.depth / gpu.flop_per_clock
    return (read + written) / clocks


def _introduction(policy: Policy, gpu: Gpu) -> str:
    budget = json.loads((FOLDER / "budget.json").read_text())["sm_90a"]
    kernels = [used for name, used in budget.items() if "_hopper_" in name]
    (launched,) = {used["registers"] for used in kernels}
    assert not any(used["spill_bytes"] for used in kernels)
    kib = (policy.rows // policy.blocks + policy.columns) * policy.depth * 2 // 1024
    moved = f"{shared_bytes_per_clock(policy, gpu):.0f} bytes"
    return f"""# boltzmann on an H100: a prediction

No GPU has run these kernels yet. `python -m tests.cuda.boltzmann_roofline` writes this page from
the policy (`boltzmann_hopper.h`, `boltzmann_tiling.h`) and the budget; a test compares.

Assumed: {gpu.multiprocessors} multiprocessors at {gpu.clock_ghz} GHz, in a clock each
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
    PAGE.write_text(render(read_policy(), Gpu()))
