"""What our boltzmann kernels ask of a card, in closed form of a call's sizes.

On Hopper tensor copies and products of one block a multiprocessor overlap, and the pass over a
tile's logits follows them: a phase of its own. Before Hopper two blocks a multiprocessor overlap
each other's. wgmma's reading of shared memory is part of the tensor cores' rate, as cuBLAS reaches
it; ldmatrix and cp.async are wavefronts. Sectors of copies, of G and of the gradients are those
that the emulator counts (tests/benchmarks/roofline/test_kernels.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from m3i_fast.costs.kernels.constants import Rates
from m3i_fast.costs.kernels.instructions import instructions_of
from m3i_fast.costs.kernels.model import LINE, SECTOR, Phase
from m3i_fast.ops.tiles import Table, read

SUMS_ELEMENTS = 1 << 26  # kSumsElements of cuda/boltzmann/tiling.h
KINDS = 4  # sums of a row or column
L2_SHARE = 0.75  # of the L2 cache that a block of G may fill and stay there
L2_MIB = {"a100": 40}  # 50 of the others
# Launches of a block of logits beside the products: maxima, reductions and exact sums that do
# nothing, and one that adds partial sums up; in the backward one that adds the scale's gradient up.
SMALL_OF_SUMS, SMALL_OF_GRADS = 5, 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A call: [rows, dim] against [columns, dim] in bf16."""

    rows: int
    columns: int
    dim: int
    symmetric: bool = True
    """Row i and column i are a pair, and there are sums over columns; else classes of rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """A thread block's tile and how many launches divide the logits."""

    rows: int
    columns: int
    depth: int
    warps: tuple[int, int]
    """That multiply and pass over the logits, down and across."""
    half_rows: int
    """Rows that one pass over the logits has."""
    multicast: int
    """Blocks that a copied operand serves."""
    at_once: int
    """Blocks that a multiprocessor runs at once."""
    grads_bytes: int
    size: int = 2
    """Bytes of an element: 2, or 4 of float32, which is multiplied three times in tf32."""

    @property
    def is_hopper(self) -> bool:
        """Return whether warpgroups multiply."""
        return self.multicast > 1

    @property
    def num_warps(self) -> int:
        """Return the warps of a block that multiply."""
        return self.warps[0] * self.warps[1]


def tiles_of(card: str, table: Table | None = None, *, wide: bool = False) -> Tiles:
    """Return the tiles of the sources and of a table, that of tiles.json unless given.

    wide: those of float32, which no warpgroups multiply.
    """
    own = (table or read("boltzmann"))["a100" if card == "a100" else "h100"]
    grads_bytes = own["blocks"]["grads_mib"] << 20
    if card != "a100" and not wide:
        return Tiles(
            rows=128, columns=256, depth=64, warps=(8, 1), half_rows=64, multicast=2, at_once=1,
            grads_bytes=grads_bytes,
        )  # fmt: skip
    policy = own["float" if wide else "half"]
    side, size = policy["side"], 4 if wide else 2
    warps = policy["warps_down"], policy["warps_across"]
    return Tiles(
        rows=side, columns=side, depth=64 // size, warps=warps, half_rows=side, multicast=1,
        at_once=2, grads_bytes=grads_bytes, size=size,
    )  # fmt: skip


def launches_of(call: Call, elements: int) -> tuple[int, int, int]:
    """Return the number of blocks of logits, and the rows and columns of one."""
    side = int(elements**0.5)
    down, across = ceil(call.rows / side), ceil(call.columns / side)
    return down * across, ceil(call.rows / down), ceil(call.columns / across)


def mixed_share(call: Call, tiles: Tiles) -> float:
    """Return the share of passes that meet a positive: those of the diagonal, or of any class."""
    if call.symmetric:
        passes = ceil(call.rows / tiles.half_rows) * ceil(call.columns / tiles.columns)
        return min(1.0, ceil(min(call.rows, call.columns) / tiles.half_rows) / passes)
    return 1 - (1 - min(1.0, tiles.columns / call.columns)) ** tiles.half_rows


def copy_sectors(tiles: Tiles, rows: int, columns: int, depth: int) -> float:
    """Return the sectors that copies ask for, for a product of whole tiles.

    Each block copies its operands; a cluster's share one of the two.
    """
    blocks = ceil(rows / tiles.rows) * ceil(columns / tiles.columns)
    own = tiles.rows + tiles.columns / tiles.multicast
    return blocks * own * depth * tiles.size / SECTOR


def step_wavefronts(tiles: Tiles) -> float:
    """Return the wavefronts of a block's step of 64 bytes of terms, before Hopper.

    Each warp reads the fragments of its rows and columns by ldmatrix, as many bytes as they have;
    copied rows, with padding between them, take two wavefronts for two rows.
    """
    down, across = tiles.warps
    fragments = (across * tiles.rows + down * tiles.columns) * 64 / LINE
    return fragments + 2 * (tiles.rows + tiles.columns) * 64 / LINE


def _step_instructions(tiles: Tiles, count: float) -> float:
    """Return a block's instructions of a step; count: of a warp with 64 x 64 of the tile.

    64 of them multiply that much in bf16, and go with the warp's part; in float32 three times.
    """
    if tiles.is_hopper:
        return tiles.num_warps * count
    part = tiles.rows * tiles.columns / tiles.num_warps / 64**2
    products = 64 * part * (3 if tiles.size == 4 else 1)
    return tiles.num_warps * (count - 64 + products)


def _product(
    name: str, tiles: Tiles, rows: int, columns: int, depth: int, times: int, count: float
) -> Phase:
    """Return the products of a launch; count: instructions of a warp and step."""
    blocks = ceil(rows / tiles.rows) * ceil(columns / tiles.columns)
    steps = blocks * ceil(depth / tiles.depth)
    flop = 2.0 * blocks * tiles.rows * tiles.columns * depth
    return Phase(
        name=name,
        read_sectors=copy_sectors(tiles, rows, columns, depth),
        wavefronts=0 if tiles.is_hopper else steps * step_wavefronts(tiles),
        instructions=steps * _step_instructions(tiles, count),
        tensor_flop=flop * (6 if tiles.size == 4 else 1),  # tf32 has half of the rate
        blocks=blocks,
        at_once=tiles.at_once,
        times=times,
    )


def _with_pass(product: Phase, tiles: Tiles, own: Phase) -> tuple[Phase, ...]:
    """Return a product and the pass over its tiles: after it on Hopper, else beside it."""
    if tiles.is_hopper:
        return product, replace(own, starts=False, times=product.times, blocks=product.blocks)
    both = {
        field: getattr(product, field) + getattr(own, field)
        for field in ("memory_bytes", "read_sectors", "write_sectors", "wavefronts",
                      "instructions", "exponentials")
    }  # fmt: skip
    return (replace(product, **both),)


def _kernel(name: str, tiles: Tiles) -> str:
    return f"boltzmann_{name}_hopper_kernel" if tiles.is_hopper else f"boltzmann_{name}_kernel"


def _pass_warps(tiles: Tiles) -> float:
    """Return a block's warps, each counted as the elements that it has of a warp's as built."""
    built = 64 * 64 if not tiles.is_hopper else 16 * 256
    return tiles.rows * tiles.columns / built


def _mean(count: dict[str, float], share: float) -> float:
    return (1 - share) * count["tile"] + share * count.get("mixed_tile", count["tile"])


def partial_sectors(call: Call, tiles: Tiles, rows: int, columns: int) -> float:
    """Return the sectors of partial sums that a launch writes."""
    across, passes = ceil(columns / tiles.columns), ceil(rows / tiles.half_rows)
    of_rows = across * rows * KINDS * 4 / SECTOR
    return of_rows + passes * columns * KINDS * 4 / SECTOR * call.symmetric


def sums(call: Call, rates: Rates, tiles: Tiles | None = None) -> tuple[Phase, ...]:
    """Return the forward: logits, and their sums over rows and columns."""
    tiles = tiles or tiles_of(rates.card)
    times, rows, columns = launches_of(call, SUMS_ELEMENTS)
    name = _kernel("sums", tiles)
    count = instructions_of("boltzmann", name)
    product = _product(name, tiles, rows, columns, call.dim, times, count["step"])
    product = replace(product, memory_bytes=float(tiles.size * (rows + columns) * call.dim))
    partials = partial_sectors(call, tiles, rows, columns)
    own = Phase(
        name=f"{name}, pass",
        write_sectors=partials,
        wavefronts=product.blocks * tiles.rows * tiles.columns * 4 / LINE,
        instructions=product.blocks * _pass_warps(tiles) * _mean(count, mixed_share(call, tiles)),
        exponentials=rows * columns,
    )
    small = Phase(
        name="small kernels of the sums",
        read_sectors=partials / SMALL_OF_SUMS,
        times=times * SMALL_OF_SUMS,
    )
    return (*_with_pass(product, tiles, own), small)


def logit_grads(call: Call, rates: Rates, tiles: Tiles | None = None) -> tuple[Phase, ...]:
    """Return the backward's first kernel: logits again, and G in their place."""
    tiles = tiles or tiles_of(rates.card)
    times, rows, columns = launches_of(call, tiles.grads_bytes // tiles.size)
    name = _kernel("logit_grads", tiles)
    count = instructions_of("boltzmann", name)
    product = _product(name, tiles, rows, columns, call.dim, times, count["step"])
    product = replace(product, memory_bytes=float(tiles.size * (rows + columns) * call.dim))
    own = Phase(
        name=f"{name}, pass",
        memory_bytes=_uncached(rates, tiles) * tiles.size * rows * columns,
        # mma's fragments write half a sector a row and store.
        write_sectors=(1 if tiles.is_hopper else 2) * tiles.size * rows * columns / SECTOR,
        wavefronts=product.blocks * tiles.rows * tiles.columns * 4 * 2 / LINE,
        instructions=product.blocks * _pass_warps(tiles) * _mean(count, mixed_share(call, tiles)),
        exponentials=rows * columns,
    )
    small = Phase(name="small kernels of the gradients", times=times * SMALL_OF_GRADS)
    return (*_with_pass(product, tiles, own), small)


def feature_grads(call: Call, rates: Rates, tiles: Tiles | None = None) -> tuple[Phase, ...]:
    """Return the backward's second kernel: G z and its transpose's product with z_hat, added up."""
    tiles = tiles or tiles_of(rates.card)
    times, rows, columns = launches_of(call, tiles.grads_bytes // tiles.size)
    name = _kernel("feature_grads", tiles)
    count = instructions_of("boltzmann", name)
    of_rows = _product(name, tiles, rows, call.dim, columns, times, count["step"])
    of_columns = _product(name, tiles, columns, call.dim, rows, times, count["step"])
    both = {
        field: getattr(of_rows, field) + getattr(of_columns, field)
        for field in ("read_sectors", "wavefronts", "instructions", "tensor_flop", "blocks")
    }
    grads = 4.0 * (rows + columns) * call.dim
    product = replace(
        of_rows,
        **both,
        memory_bytes=_uncached(rates, tiles) * 2 * tiles.size * rows * columns + 2 * grads,
    )
    own = Phase(
        name=f"{name}, pass",
        read_sectors=grads / SECTOR,
        write_sectors=grads / SECTOR,
        wavefronts=2 * grads / LINE,
        instructions=product.blocks * _pass_warps(tiles) * count["tile"],
    )
    return _with_pass(product, tiles, own)


def _uncached(rates: Rates, tiles: Tiles) -> float:
    """Return the share of a block of G that does not stay in the L2 cache."""
    kept = L2_SHARE * (L2_MIB.get(rates.card, 50) << 20) / tiles.grads_bytes
    return 1 - min(1.0, kept)
