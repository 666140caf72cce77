"""How long tiles take of a GPU, from its rates: a prediction, for candidates that no GPU has run.

The published rates are those of m3i_fast/costs/gpus.py. Beside them stands what a card consists of:
an A100 SXM of 108 multiprocessors that do 2048 flop a clock in bfloat16 on the tensor cores, an
H100 SXM of 132 that do 4096; the clock at which they reach the published rate follows, 1.41 and
1.83 GHz. Of both: 16 exponentials and 128 bytes of shared memory, or of the first-level cache, a
clock and multiprocessor; the second-level cache's rate and a latency of 600 clocks. Not counted:
how a launch begins and ends, what is reduced after it, misses of the cache, limits of power.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from m3i_fast.costs.gpus import CARDS, Card
from m3i_fast.ops.tiles import Policy as Fields
from m3i_fast.ops.tiles import read


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A card's published rates, and what they are made of; an H100 SXM unless said."""

    card: Card = CARDS["h100"]
    multiprocessors: int = 132
    flop_per_clock: int = 4096  # of a multiprocessor, dense, bfloat16
    exponentials_per_clock: int = 16  # of a multiprocessor
    shared_bytes_per_clock: int = 128
    cache_tb_s: float = 5.5
    lanes_per_clock: int = 128  # fused multiplications and additions in float32
    latency: int = 600  # clocks from the second-level cache
    cache_mib: int = 50
    block_kib: int = 227  # of shared memory, for a block
    shared_kib: int = 228  # of a multiprocessor

    @property
    def clock_ghz(self) -> float:
        """Return the clock at which the tensor cores reach the published rate."""
        return self.card.bf16_flop_s / self.multiprocessors / self.flop_per_clock / 1e9

    @property
    def cache_bytes_per_clock(self) -> float:
        """Return the bytes that a multiprocessor gets of the second-level cache in a clock."""
        return self.cache_tb_s * 1e3 / self.clock_ghz / self.multiprocessors


GPUS = {
    "h100": Gpu(),
    "a100": Gpu(
        card=CARDS["a100"],
        multiprocessors=108,
        flop_per_clock=2048,
        cache_tb_s=7.2,
        lanes_per_clock=64,
        cache_mib=40,
        block_kib=163,
        shared_kib=164,
    ),
}


def occupancy(gpu: Gpu, threads: int, registers: int, shared_bytes: int) -> int:
    """Return the blocks that a multiprocessor runs at once; 0 where one does not fit.

    Registers are given out to a warp in 256; the driver takes a KiB of shared memory a block.
    """
    if threads > 1024 or shared_bytes > gpu.block_kib << 10:
        return 0
    warps = ceil(threads / 32)
    a_warp = ceil(registers * 32 / 256) * 256
    by_registers = 65536 // (a_warp * warps)
    by_shared = (gpu.shared_kib << 10) // (shared_bytes + 1024)
    return min(32, 64 // warps, by_registers, by_shared)


# ---- boltzmann, by warpgroups --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Policy:
    """Tiles of a cluster, as cuda/boltzmann/sm90/tiling.h has them."""

    rows: int
    columns: int
    depth: int
    stages: int
    blocks: int  # of a cluster
    consumers: int  # warpgroups that multiply
    registers: tuple[int, int]  # of a thread that copies, and that multiplies
    grads_elements: int


def hopper_policy(wgmma: Fields | None = None, grads_mib: int | None = None) -> Policy:
    """Return the policy of the sources and of tiles.json, or of a candidate in its place."""
    table = read("boltzmann")["h100"]
    wgmma = wgmma or table["half"]
    mib = grads_mib or table["blocks"]["grads_mib"]
    registers = wgmma["producer_registers"], wgmma["consumer_registers"]
    return Policy(256, 256, 64, wgmma["stages"], 2, 2, registers, (mib << 20) // 2)


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
        """Return the clocks of the slower bound; exponentials overlap with products."""
        return max(self.tensor_clocks, self.cache_clocks)


def predict_product(
    policy: Policy, gpu: Gpu, tiles: int, terms: int, exponentials: bool
) -> Product:
    waves = ceil(tiles / (gpu.multiprocessors // policy.blocks))
    steps = waves * ceil(terms / policy.depth)
    block = policy.rows // policy.blocks * policy.columns  # elements of a thread block's tile
    own_boxes = (policy.rows + policy.columns) // policy.blocks * policy.depth * 2
    return Product(
        tiles,
        waves,
        steps * 2 * block * policy.depth / gpu.flop_per_clock,
        steps * own_boxes / gpu.cache_bytes_per_clock,
        waves * block / gpu.exponentials_per_clock if exponentials else 0,
    )


def predict(policy: Policy, gpu: Gpu, rows: int, width: int) -> dict[str, tuple[int, Product]]:
    """Return, by phase, how often it comes for N = M = `rows`, and its product each time."""
    made = {}
    for name, elements in (("sums", rows * rows), ("grads", policy.grads_elements)):
        side = min(rows, int(elements**0.5))
        launches = ceil(rows / side) ** 2
        tiles = ceil(side / policy.rows) * ceil(side / policy.columns)
        made[name] = launches, predict_product(policy, gpu, tiles, width, True)
        if name == "grads":
            tiles = 2 * ceil(side / policy.rows) * ceil(width / policy.columns)
            made["features"] = launches, predict_product(policy, gpu, tiles, side, False)
    return made


def shared_bytes_per_clock(policy: Policy, gpu: Gpu) -> float:
    """Return the bytes a clock that wgmma reads, B once a warpgroup, and that copies write."""
    block_rows = policy.rows // policy.blocks
    read_bytes = (block_rows + policy.consumers * policy.columns) * policy.depth * 2
    written = (block_rows + policy.columns) * policy.depth * 2
    clocks = 2 * block_rows * policy.columns * policy.depth / gpu.flop_per_clock
    return (read_bytes + written) / clocks


def hopper_ms(policy: Policy, gpu: Gpu, rows: int, width: int) -> float:
    """Predict forward and backward; a ring too short for its copies' latency makes steps wait."""
    clocks = 0.0
    for launches, product in predict(policy, gpu, rows, width).values():
        steps = product.tensor_clocks * gpu.flop_per_clock / (2 * 128 * 256 * policy.depth)
        waiting = steps * gpu.latency / (policy.stages - 1)
        clocks += launches * max(product.clocks, waiting)
    spilled = _uncached_bytes(policy.grads_elements * 2, gpu, rows)
    return clocks / gpu.clock_ghz / 1e6 + 1e3 * spilled / gpu.card.memory_byte_s


def _uncached_bytes(block_bytes: int, gpu: Gpu, rows: int) -> float:
    """Of G, written once and read twice, what does not fit three quarters of the cache."""
    kept = min(1.0, 0.75 * (gpu.cache_mib << 20) / block_bytes)
    return (1 - kept) * 3 * 2 * rows * rows


# ---- boltzmann, by mma.sync ----------------------------------------------------------------------


def mma_ms(
    policy: Fields, gpu: Gpu, rows: int, width: int, blocks: int, wide: bool, grads_mib: int
) -> float:
    """Predict forward and backward for N = M; `blocks` run at once on a multiprocessor.

    A step of 64 bytes of terms: its flop, its bytes from the second-level cache, what copies write
    to shared memory and warps read from there; and the latency, which the other stages cover.
    float32 (`wide`) multiplies three times in tf32, of a half of the rate.
    """
    size = 4 if wide else 2
    side, depth = policy["side"], 64 // size
    across = policy["warps_down"] + policy["warps_across"]
    a_step = max(
        2 * side * side * depth / gpu.flop_per_clock * (6 if wide else 1),
        2 * side * 64 / gpu.cache_bytes_per_clock,
        (2 + across) * side * 64 / gpu.shared_bytes_per_clock,
    )
    clocks = 0.0
    elements = (grads_mib << 20) // size
    for most, exponentials in ((rows * rows, True), (elements, True), (elements, False)):
        edge = min(rows, int(most**0.5))
        launches = ceil(rows / edge) ** 2
        tiles = ceil(edge / side) * (ceil(edge / side) if exponentials else 2 * ceil(width / side))
        steps = ceil((width if exponentials else edge) / depth)
        own = ceil(tiles / gpu.multiprocessors)  # tiles of the busiest multiprocessor
        waiting = ceil(own / blocks) * gpu.latency / (policy["stages"] - 1)
        busy = steps * max(own * a_step, waiting)
        if exponentials and blocks == 1:  # no other block multiplies meanwhile
            busy += own * side * side / gpu.exponentials_per_clock
        clocks += launches * busy
    spilled = _uncached_bytes(elements * size, gpu, rows) * size / 2
    return clocks / gpu.clock_ghz / 1e6 + 1e3 * spilled / gpu.card.memory_byte_s


# ---- dcnv3 ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Units:
    """A call of dcnv3, as its launcher cuts it up."""

    pixels: int  # of the batch
    channels: int
    groups: int
    points: int
    size: int  # bytes of an element
    thread_blocks: int  # of the batch
    chunk: int  # points of a unit that a warp holds at once


def dcnv3_ms(units: Units, gpu: Gpu, threads: int, blocks: int, *, backward: bool) -> float:
    """Return the milliseconds of a pass of the multiprocessor with the most blocks.

    Memory, first-level cache, arithmetic or latency, whichever is slowest. Each further chunk costs
    a block two barriers, 60 clocks.
    """
    elements = units.pixels * units.channels
    of_points = 3 * units.pixels * units.groups * units.points * units.size
    gathered = 4 * units.points * units.size * elements
    memory = 2 * elements * units.size + of_points
    operations = 4 * units.points * elements
    added = 0.0  # red.f32 to the second-level cache
    if backward:
        memory += elements * (units.size + 4) + of_points
        operations *= 2
        added = 4 * units.points * 4 * elements
    cards = gpu.multiprocessors * gpu.clock_ghz * 1e6  # clocks of all multiprocessors in a ms
    # Three points are under way, of four corners of 16 bytes each.
    in_flight = blocks * threads * 12 * 16
    rates = (
        gathered / gpu.shared_bytes_per_clock / cards,
        gathered * gpu.latency / in_flight / cards,
        operations / gpu.lanes_per_clock / cards,
        added / gpu.cache_bytes_per_clock / cards,
        memory / gpu.card.memory_byte_s * 1e3,
    )
    own = ceil(units.thread_blocks / gpu.multiprocessors)
    idle = own * gpu.multiprocessors / units.thread_blocks
    chunks = ceil(units.points / units.chunk)
    return max(rates) * idle + ceil(own / blocks) * (chunks - 1) * 60 / gpu.clock_ghz / 1e6
