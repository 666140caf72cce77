"""What our boltzmann kernels ask of a card, in closed form of a call's sizes.

On Hopper tensor copies and products of one block a multiprocessor overlap, and the pass over a
tile's logits follows them: a phase of its own. Before Hopper two blocks a multiprocessor overlap
each other's. wgmma's reading of shared memory is part of the tensor cores' rate, as cuBLAS reaches
it; ldmatrix and cp.async are wavefronts. Sums are one launch over patches, whose tiles one block or
cluster adds up; on Hopper gradients are one launch, whose blocks of G follow one another as phases.
Sectors of copies, of sums, of G and of the gradients are those that the emulator counts
(tests/benchmarks/roofline/test_kernels.py).

A softmax over columns alone is GEMMs of the library, and a pass over rows between them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, isqrt

from m3i_fast.costs.kernels.constants import Rates
from m3i_fast.costs.kernels.instructions import instructions_of
from m3i_fast.costs.kernels.model import LINE, SECTOR, Phase, gemm
from m3i_fast.ops.tiles import Table, read

PATCHES, MANY_PATCHES = 1024, 4096  # cuda/boltzmann/tiling.h; many: without clusters
KINDS = 4  # sums of a row or column
L2_SHARE = 0.75  # of the L2 cache that a block of G may fill and stay there
L2_MIB = {"a100": 40}  # 50 of the others
# Launches of a call beside the products: maxima, exact sums and reductions, of which all but one
# return at once, and of vectors prepare, shift, exact, exact_shift, totals, loss; in the backward
# scale, and one that adds the scale's gradient up, which before Hopper follows every block of G.
SMALL_OF_SUMS, SMALL_OF_GRADS = 5 + 6, 2
SMALL_OF_ROWS, SMALL_OF_ROWS_GRADS = 11, 1
ROWS_BLOCK_BYTES, ROWS_PADDING = 256 << 20, 16  # m3i_fast/ops/boltzmann_rows.py
ROW_THREADS = 256  # of a row, 4 logits each at once; cuda/boltzmann/sm80/rows.cuh


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A call: [rows, dim] against [columns, dim] in bf16."""

    rows: int
    columns: int
    dim: int
    symmetric: bool = True
    """Row i and column i are a pair, and there are sums over columns; else rows_alone."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """A division of the logits: rows and columns of a part, and their numbers."""

    rows: int
    columns: int
    down: int
    across: int

    @property
    def count(self) -> int:
        """Return the number of parts."""
        return self.down * self.across


def _part(size: int, most: int, unit: int) -> int:
    parts = ceil(size / max(most // unit * unit, unit))
    return ceil(ceil(size / parts) / unit) * unit


def make_blocks(call: Call, tiles: Tiles, elements: int) -> Blocks:
    """Return blocks of at most `elements`, as make_blocks of cuda/boltzmann/tiling.h."""
    height = tiles.rows * tiles.multicast
    narrow = _part(call.columns, isqrt(elements), tiles.columns)
    rows = _part(call.rows, elements // narrow, height)
    columns = _part(call.columns, elements // rows, tiles.columns)
    return Blocks(
        rows=rows,
        columns=columns,
        down=ceil(call.rows / rows),
        across=ceil(call.columns / columns),
    )


def make_patches(call: Call, tiles: Tiles) -> Blocks:
    """Return the patches of the sums, each of as many tiles as leave few of them."""
    height = tiles.rows * tiles.multicast
    all_tiles = ceil(call.rows / height) * ceil(call.columns / tiles.columns)
    of_patch = ceil(all_tiles / (PATCHES if tiles.is_hopper else MANY_PATCHES))
    return make_blocks(call, tiles, of_patch * height * tiles.columns)


def mixed_share(call: Call, tiles: Tiles) -> float:
    """Return the share of passes that meet a positive: those of the diagonal.

    A pass is a warp's on Hopper, else a tile's.
    """
    height = 16 if tiles.is_hopper else tiles.half_rows
    passes = ceil(call.rows / height) * ceil(call.columns / tiles.columns)
    return min(1.0, ceil(min(call.rows, call.columns) / height) / passes)


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


def sum_sectors(call: Call, tiles: Tiles) -> tuple[float, float]:
    """Return the sectors of partial sums that the tiles of all patches read and write.

    A tile adds its negatives to those of its patch, and begins with the other kinds; those of
    positives in later tiles are few, and not counted.
    """
    patches = make_patches(call, tiles)
    height, width = patches.down * patches.rows, patches.across * patches.columns
    halves, across = height // tiles.half_rows, width // tiles.columns
    a_row, a_column = height * 4 / SECTOR, width * 4 / SECTOR  # of a kind
    row_writes, row_begins = across * a_row, patches.across * a_row
    # On Hopper each half of a tile has a line of its own in a patch.
    lines = patches.down * (4 if tiles.is_hopper else 1)
    column_writes, column_begins = halves * a_column, lines * a_column
    begins, writes = row_begins + column_begins, row_writes + column_writes
    return writes - begins, writes + (KINDS - 1) * begins


def sums(call: Call, rates: Rates, tiles: Tiles | None = None) -> tuple[Phase, ...]:
    """Return the forward: logits, and their sums over rows and columns. Of a symmetric call."""
    tiles = tiles or tiles_of(rates.card)
    patches = make_patches(call, tiles)
    name = _kernel("sums", tiles)
    count = instructions_of("boltzmann", name)
    product = _product(name, tiles, call.rows, call.columns, call.dim, 1, count["step"])
    tile_blocks = product.blocks
    product = replace(
        product,
        memory_bytes=float(tiles.size * (call.rows + call.columns) * call.dim),
        blocks=patches.count * tiles.multicast,
    )
    added, written = sum_sectors(call, tiles)
    own = Phase(
        name=f"{name}, pass",
        read_sectors=added,
        write_sectors=written,
        wavefronts=tile_blocks * tiles.rows * tiles.columns * 4 / LINE,
        instructions=tile_blocks * _pass_warps(tiles) * _mean(count, mixed_share(call, tiles)),
        exponentials=call.rows * call.columns,
    )
    lines = patches.across * call.rows + patches.down * call.columns * (4 if tiles.is_hopper else 1)
    small = Phase(
        name="small kernels of the sums",
        read_sectors=KINDS * lines * 4 / SECTOR / SMALL_OF_SUMS,
        times=SMALL_OF_SUMS,
    )
    return (*_with_pass(product, tiles, own), small)


def _grads_count(stem: str, tiles: Tiles) -> dict[str, float]:
    """Return the instructions of one of the two phases of a block of G."""
    if not tiles.is_hopper:
        return instructions_of("boltzmann", _kernel(f"{stem}_grads", tiles))
    count = instructions_of("boltzmann", _kernel("grads", tiles))
    return {
        unit.removeprefix(f"{stem}_"): value for unit, value in count.items()
        if unit.startswith(f"{stem}_")
    }  # fmt: skip


def _grads_name(stem: str, tiles: Tiles) -> str:
    return (
        f"{_kernel('grads', tiles)}, {stem}" if tiles.is_hopper else _kernel(f"{stem}_grads", tiles)
    )


def logit_grads(call: Call, rates: Rates, tiles: Tiles | None = None) -> tuple[Phase, ...]:
    """Return the backward's first phase: logits again, and G in their place."""
    tiles = tiles or tiles_of(rates.card)
    blocks = make_blocks(call, tiles, tiles.grads_bytes // tiles.size)
    times, rows, columns = blocks.count, call.rows / blocks.down, call.columns / blocks.across
    name, count = _grads_name("logit", tiles), _grads_count("logit", tiles)
    product = _product(name, tiles, ceil(rows), ceil(columns), call.dim, times, count["step"])
    product = replace(
        product,
        memory_bytes=tiles.size * (rows + columns) * call.dim,
        starts=not tiles.is_hopper,
    )
    own = Phase(
        name=f"{name}, pass",
        memory_bytes=_uncached(rates, tiles) * tiles.size * rows * columns,
        # mma's fragments write half a sector a row and store.
        write_sectors=(1 if tiles.is_hopper else 2) * tiles.size * rows * columns / SECTOR,
        wavefronts=product.blocks * tiles.rows * tiles.columns * 4 * 2 / LINE,
        instructions=product.blocks * _pass_warps(tiles) * _mean(count, mixed_share(call, tiles)),
        exponentials=rows * columns,
    )
    launches = SMALL_OF_GRADS if tiles.is_hopper else SMALL_OF_GRADS - 1 + times
    small = Phase(name="small kernels of the gradients", times=launches)
    phases = (*_with_pass(product, tiles, own), small)
    return (Phase(name=_kernel("grads", tiles)), *phases) if tiles.is_hopper else phases


def feature_grads(call: Call, rates: Rates, tiles: Tiles | None = None) -> tuple[Phase, ...]:
    """Return the backward's second phase: G z and its transpose's product with z_hat, added up."""
    tiles = tiles or tiles_of(rates.card)
    blocks = make_blocks(call, tiles, tiles.grads_bytes // tiles.size)
    times = blocks.count
    rows, columns = ceil(call.rows / blocks.down), ceil(call.columns / blocks.across)
    name, count = _grads_name("feature", tiles), _grads_count("feature", tiles)
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
        starts=not tiles.is_hopper,
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


def rows_alone(call: Call, rates: Rates, *, backward: bool) -> tuple[Phase, ...]:
    """Return the phases of a softmax over columns alone, whose gradient its forward makes.

    A block of rows has all of its columns: a GEMM writes its logits in float32, a pass turns them
    into G, and two GEMMs multiply that by the features.
    """
    stride = ceil(call.columns / ROWS_PADDING) * ROWS_PADDING
    rows = min(call.rows, ROWS_BLOCK_BYTES // (4 * stride) // 64 * 64 or 64)
    times = ceil(call.rows / rows)
    mean = call.rows / times
    logits = mean * stride
    own, others = 2.0 * mean * call.dim, 2.0 * call.columns * call.dim  # bytes of features
    count = instructions_of("boltzmann", "boltzmann_rows_kernel")
    vectors = call.columns / 4 / ROW_THREADS
    passes = count["sums"] + count["grads"] * backward
    # A row's second read comes from the L2 cache where the rows at work fit it.
    at_once = 2048 // ROW_THREADS
    in_flight = rates.multiprocessors * at_once * stride * 4
    kept = min(1.0, L2_SHARE * (L2_MIB.get(rates.card, 50) << 20) / in_flight)
    read = 4 * logits
    phases = [
        gemm("logits", ceil(mean), call.columns, call.dim, times=times,
             bytes_moved=own + others + 4 * logits),
        Phase(
            name="boltzmann_rows_kernel",
            memory_bytes=read + ((1 - kept) * read + 2 * logits) * backward,
            read_sectors=read * (1 + backward) / SECTOR,
            write_sectors=2 * logits * backward / SECTOR,
            wavefronts=(read * (1 + backward) + 2 * logits * backward) / LINE,
            instructions=mean * ROW_THREADS / 32 * (count["row"] + vectors * passes),
            exponentials=mean * call.columns * (1 + backward),
            blocks=ceil(mean),
            at_once=at_once,
            times=times,
        ),
        Phase(name="small kernels of rows", times=SMALL_OF_ROWS),
    ]  # fmt: skip
    if not backward:
        return tuple(phases)
    grads = 4.0 * call.columns * call.dim
    return (
        *phases,
        gemm("G z", ceil(mean), call.dim, call.columns, times=times,
             bytes_moved=2 * logits + others + 2 * own),
        gemm("z_hat by G", call.columns, call.dim, ceil(mean), times=times,
             bytes_moved=2 * logits + own + 2 * grads),
        Phase(
            name="boltzmann_scale_kernel",
            memory_bytes=(call.rows + call.columns) * call.dim * 6.0,
            times=SMALL_OF_ROWS_GRADS,
        ),
    )  # fmt: skip
