"""The cost model: what a kernel asks of a card, by column, and the time that follows.

The overlap rule. Within a phase all columns overlap perfectly: it takes as long as its slowest
column. Phases of a launch that nothing overlaps follow each other, as do launches, and each launch
adds its start. What runs on multiprocessors also waits for the last of its blocks: where the blocks
do not fill the last round, columns of the multiprocessors (all but bytes and sectors) are as long
as if they did.

Not counted: latencies where too few warps are in flight, pipes narrower than the issue of their
instructions, misses of the instruction cache, limits of power.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from m3i_fast.costs.kernels.constants import CONSTANTS, Rates

SECTOR, LINE = 32, 128  # bytes
COLUMNS = ("bytes", "sectors", "wavefronts", "issue", "tensor", "exponentials")


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """Hold what a phase of a launch asks of a card, in all blocks together."""

    name: str
    memory_bytes: float = 0
    """Read from and written to HBM."""
    read_sectors: float = 0
    """That the L2 cache is asked for: those that miss the first-level cache."""
    write_sectors: float = 0
    atomic_sectors: float = 0
    """Of reductions and atomics, as often as a request touches them."""
    wavefronts: float = 0
    """Of shared memory, and `request_wavefronts` of global memory."""
    instructions: float = 0
    """Issued, of warps."""
    tensor_flop: float = 0
    """In bf16 or fp16; in tf32 a flop counts twice."""
    exponentials: float = 0
    """Of lanes, and all else that the special function units compute."""
    blocks: float = 0
    """Of the launch; 0: so many that the last round does not matter."""
    at_once: int = 1
    """Blocks that a multiprocessor runs at once."""
    starts: bool = True
    """Whether it begins a launch; False: it follows the phase before it in the same one."""
    times: int = 1
    """How often it follows itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """The predicted time of a phase, in milliseconds."""

    name: str
    columns: dict[str, float]
    """By COLUMNS, of all of its times."""
    start_ms: float

    @property
    def binds(self) -> str:
        """Return the slowest column, or `launch` where the start takes longer than all."""
        slowest = max(COLUMNS, key=lambda column: self.columns[column])
        return slowest if self.columns[slowest] > self.start_ms else "launch"

    @property
    def ms(self) -> float:
        """Return the slowest column and the start."""
        return max(self.columns.values()) + self.start_ms


def last_round(phase: Phase, rates: Rates) -> float:
    """Return how much longer multiprocessors take because the last round of blocks is not full."""
    if not phase.blocks:
        return 1.0
    at_once = rates.multiprocessors * phase.at_once
    return ceil(phase.blocks / at_once) * at_once / phase.blocks


def predict_phase(phase: Phase, rates: Rates) -> Prediction:
    """Predict one phase, as often as it runs."""
    own = 1e3 * phase.times
    shared = own * last_round(phase, rates)
    sectors = (phase.read_sectors + phase.write_sectors) * SECTOR / rates.l2_byte_s
    return Prediction(
        name=phase.name,
        columns={
            "bytes": own * phase.memory_bytes / rates.memory_byte_s,
            "sectors": own * (sectors + phase.atomic_sectors / rates.atomic_sector_s),
            "wavefronts": shared * phase.wavefronts / rates.wavefront_s,
            "issue": shared * phase.instructions / rates.issue_s,
            "tensor": shared * phase.tensor_flop / rates.tensor_flop_s,
            "exponentials": shared * phase.exponentials / rates.exponential_s,
        },
        start_ms=own * rates.launch_s * phase.starts,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class CallPrediction:
    """The predicted time of a call: its phases one after the other."""

    phases: tuple[Prediction, ...]

    @property
    def ms(self) -> float:
        """Return the sum of the phases."""
        return sum(phase.ms for phase in self.phases)

    @property
    def longest(self) -> Prediction:
        """Return the phase that takes longest, whose column the call is bound by."""
        return max(self.phases, key=lambda phase: phase.ms)

    @property
    def binds(self) -> str:
        """Return the column that binds the longest phase."""
        return self.longest.binds

    @property
    def columns(self) -> dict[str, float]:
        """Return the milliseconds of each column, over all phases."""
        return {c: sum(phase.columns[c] for phase in self.phases) for c in COLUMNS}


def predict(phases: Sequence[Phase], rates: Rates) -> CallPrediction:
    """Predict a call. Raises ValueError for one without phases."""
    if not phases:
        raise ValueError("phases: expected one or more, got none")
    return CallPrediction(phases=tuple(predict_phase(phase, rates) for phase in phases))


def request_wavefronts(lines: float, moved: float) -> float:
    """Return the wavefronts of a warp's request of global memory.

    Its lines of 128 bytes are looked up, and `moved` bytes moved 128 at a time; the slower counts.
    """
    further = CONSTANTS["lines"].values["a100"]  # of every card
    return max(1 + further * (lines - 1), moved / LINE)


def gemm(
    name: str,
    rows: int,
    columns: int,
    depth: int,
    *,
    bytes_moved: float,
    tile: tuple[int, int] = (128, 256),
    times: int = 1,
) -> Phase:
    """Return a product of a library, bf16: output tiles of 128 x 256, one at once a multiprocessor.

    bytes_moved: of HBM, of one product.
    """
    return Phase(
        name=name,
        memory_bytes=bytes_moved,
        tensor_flop=2.0 * rows * columns * depth,
        blocks=ceil(rows / tile[0]) * ceil(columns / tile[1]),
        times=times,
    )
