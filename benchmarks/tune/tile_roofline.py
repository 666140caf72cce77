"""How long tiles take of a GPU: a prediction, for candidates that no GPU has run.

The cost model of `m3i-fast bench roofline` (m3i_fast/costs/kernels) with a candidate's tiles in the
place of those of tiles.json, and beside it what tiles change and the model leaves out: blocks that
a multiprocessor holds, and latency from the second-level cache, taken as 600 clocks, where too few
copies or loads are under way.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from m3i_fast.costs.kernels import boltzmann, dcnv3
from m3i_fast.costs.kernels.constants import Rates, rates_of
from m3i_fast.costs.kernels.model import Phase, last_round, predict_phase

LATENCY = 600  # clocks, from the second-level cache
BARRIERS = 60  # clocks of the two that a further chunk of dcnv3's points costs a block


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """Hold what a multiprocessor has for blocks, and the card's rates."""

    rates: Rates
    block_kib: int
    """Shared memory of a block at most."""
    shared_kib: int
    """Shared memory of a multiprocessor."""


GPUS = {
    "h100": Gpu(rates=rates_of("h100"), block_kib=227, shared_kib=228),
    "a100": Gpu(rates=rates_of("a100"), block_kib=163, shared_kib=164),
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


# ---- boltzmann -----------------------------------------------------------------------------------


def waiting_ms(phase: Phase, tiles: boltzmann.Tiles, stages: int, rates: Rates) -> float:
    """Return the milliseconds of a product whose steps wait for copies, `stages` less one ahead."""
    flop = 2 * tiles.rows * tiles.columns * tiles.depth * (6 if tiles.size == 4 else 1)
    steps = phase.tensor_flop / phase.blocks / flop
    rounds = phase.blocks * last_round(phase, rates) / rates.multiprocessors / phase.at_once
    return 1e3 * phase.times * rounds * steps * LATENCY / (stages - 1) / rates.clock_hz


def boltzmann_ms(
    rates: Rates, tiles: boltzmann.Tiles, stages: int, rows: int, columns: int, width: int
) -> float:
    """Predict forward and backward of a symmetric call, in milliseconds."""
    call = boltzmann.Call(rows=rows, columns=columns, dim=width)
    ms = 0.0
    for of in (boltzmann.sums, boltzmann.logit_grads, boltzmann.feature_grads):
        for phase in of(call, rates, tiles):
            waiting = waiting_ms(phase, tiles, stages, rates) if phase.tensor_flop else 0.0
            ms += max(predict_phase(phase, rates).ms, waiting)
    return ms


# ---- dcnv3 ---------------------------------------------------------------------------------------


def dcnv3_ms(
    layout: dcnv3.Layout, rates: Rates, blocks: int, chunk: int, *, backward: bool
) -> float:
    """Predict a pass in milliseconds; `blocks` run at once, and a warp holds `chunk` points.

    A lane has three points under way, of four corners of 16 bytes.
    """
    s = layout.sampling
    of = dcnv3.backward if backward else dcnv3.forward
    phases = of(s, rates, layout, blocks)
    kernel = phases[backward]
    ms = sum(predict_phase(phase, rates).ms for phase in phases if phase is not kernel)
    in_flight = blocks * layout.warps_of_block * 32 * 12 * 16 * rates.multiprocessors
    gathered = s.corners() * s.group_size * s.size
    waiting = 1e3 * gathered / in_flight * LATENCY / rates.clock_hz * last_round(kernel, rates)
    of_pass = layout.window_blocks if backward else layout.blocks_of_image * s.batch
    rounds = ceil(of_pass / rates.multiprocessors / blocks)
    barriers = 1e3 * rounds * (ceil(s.kernel**2 / chunk) - 1) * BARRIERS / rates.clock_hz
    return ms + max(predict_phase(kernel, rates).ms, waiting) + barriers
