"""What our dcnv3 kernels ask of a card, in closed form of a call's sizes.

A unit is one output pixel in one group; 16 bytes of its channels are a lane's, 32 / lanes units a
warp's. For points whose four corners lie inside, requests are those that the emulator counts, to
the last one (tests/benchmarks/roofline/test_kernels.py). Of points outside the corners are fewer,
and all else is taken to be as much.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from m3i_fast.costs.kernels.constants import Rates
from m3i_fast.costs.kernels.gather import Sampling
from m3i_fast.costs.kernels.instructions import instructions_of
from m3i_fast.costs.kernels.model import LINE, SECTOR, Phase, request_wavefronts
from m3i_fast.ops.tiles import read

# Wavefronts of shared memory that a warp reads and writes with 9 points a unit, by the lanes of a
# unit: origins, points and corners, in the backward also sums of gradients. As the emulator counts
# them, bank conflicts with them; 2 more a block for the steps of the grid.
SHARED = {2: (145 + 27, 147 + 55), 4: (74 + 16, 95 + 35)}
SHARED_OF_BLOCK = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Requests:
    """Sectors of global memory that warps ask for, and wavefronts of shared memory."""

    gathered: float
    """Of x."""
    read: float
    """All others."""
    written: float
    added: float
    """By reductions."""
    shared: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The division of a call into lanes and warps, as cuda/dcnv3/tiling.h has it."""

    sampling: Sampling
    warps_of_block: int = 4

    @property
    def vector(self) -> int:
        """Return the channels of a lane's access."""
        return 16 // self.sampling.size

    @property
    def lanes(self) -> int:
        """Return the lanes of a unit. Raises ValueError where no coefficients are known."""
        lanes = self.sampling.group_size // self.vector
        if lanes not in SHARED or self.sampling.kernel != 3:
            sizes = " or ".join(str(self.vector * each) for each in SHARED)
            raise ValueError(
                f"dcnv3: expected 3 x 3 points and groups of {sizes} channels, got "
                f"{self.sampling.kernel} x {self.sampling.kernel} and {self.sampling.group_size}"
            )
        return lanes

    @property
    def units_of_warp(self) -> int:
        """Return the units of a warp."""
        return 32 // self.lanes

    @property
    def blocks(self) -> int:
        """Return the thread blocks of the batch."""
        s = self.sampling
        of_image = ceil(s.height * s.width * s.groups / (self.units_of_warp * self.warps_of_block))
        return s.batch * of_image

    @property
    def warps(self) -> float:
        """Return the warps that have units."""
        return self.sampling.units / self.units_of_warp

    def point_sectors(self) -> float:
        """Return the sectors of offsets and masks, each read or written once.

        Exact for an even number of warps.
        """
        size, points = self.sampling.size, 9 * self.units_of_warp
        pair = sum(
            2 * _touched(2 * size, points, warp) + _touched(size, points, warp) for warp in (0, 1)
        )
        return pair / 2 * self.warps

    def requests(self, *, backward: bool, corners: float | None = None) -> Requests:
        """Return the requests of a pass; corners: those inside, all of them unless given."""
        s = self.sampling
        inside = 4 * s.points if corners is None else corners
        image = s.units * s.group_size * s.size / SECTOR
        # Four floats a reduction: of eight channels a lane's two fill half a sector each.
        added = inside * (s.group_size / 4 if self.vector == 8 else s.group_size * 4 / SECTOR)
        return Requests(
            gathered=inside * s.group_size * s.size / SECTOR,
            read=self.point_sectors() + (image if backward else 0),
            written=self.point_sectors() if backward else image,
            added=added if backward else 0,
            shared=SHARED[self.lanes][backward] * self.warps + SHARED_OF_BLOCK * self.blocks,
        )


def _touched(size: int, points: int, warp: int) -> int:
    """Return the sectors that a warp's steps of 32 points touch, of `size` bytes a point."""
    begin, total = warp * points * size, 0
    for first in range(0, points, 32):
        low = begin + first * size
        high = begin + min(points, first + 32) * size
        total += (high + SECTOR - 1) // SECTOR - low // SECTOR
    return total


def layout_of(sampling: Sampling, card: str) -> Layout:
    """Return the layout with the card's tiles."""
    kind = "small" if sampling.height * sampling.width < 400 else "large"
    policy = read("dcnv3")["a100" if card == "a100" else "h100"][kind]
    return Layout(sampling=sampling, warps_of_block=policy["warps"])


def _resident_pixels(layout: Layout, blocks: int) -> float:
    """Return the pixels that a multiprocessor works on at once."""
    units = blocks * layout.warps_of_block * layout.units_of_warp
    return units / layout.sampling.groups


def _l1_left(rates: Rates, layout: Layout, blocks: int, backward: bool) -> float:
    """Return what the blocks' shared memory leaves of the first-level cache."""
    slot = 17 + 12 * backward  # of a point: place and weight, corners, sums
    used = blocks * layout.warps_of_block * 9 * layout.units_of_warp * slot
    return max(0.0, rates.l1_bytes - used)


def forward(
    sampling: Sampling, rates: Rates, layout: Layout | None = None, at_once: int = 6
) -> tuple[Phase, ...]:
    """Return the forward's phase.

    layout: the card's unless given; at_once: blocks that a multiprocessor runs at once.
    """
    layout = layout or layout_of(sampling, rates.card)
    return (_pass(layout, rates, at_once, backward=False),)


def backward(
    sampling: Sampling, rates: Rates, layout: Layout | None = None, at_once: int = 5
) -> tuple[Phase, ...]:
    """Return the phases of the backward: zeros, the kernel, and in 16 bits the rounding.

    As forward.
    """
    layout = layout or layout_of(sampling, rates.card)
    elements = sampling.pixels * sampling.channels
    wide = elements * 4
    zeros = Phase(name="zeros", memory_bytes=wide, write_sectors=wide / SECTOR)
    kernel = _pass(layout, rates, at_once, backward=True)
    if sampling.size == 4:
        return zeros, kernel
    rounding = Phase(
        name="dcnv3_round_kernel",
        memory_bytes=wide + 2 * elements,
        read_sectors=elements / 4,
        write_sectors=2 * elements / SECTOR,
        wavefronts=(wide + 2 * elements) / LINE,
        instructions=instructions_of("dcnv3", "dcnv3_round_kernel")["access"] * elements / 8 / 32,
    )
    return zeros, kernel, rounding


def _pass(layout: Layout, rates: Rates, at_once: int, *, backward: bool) -> Phase:
    s = layout.sampling
    asked = layout.requests(backward=backward, corners=s.corners())
    missing = s.missing_share(
        _resident_pixels(layout, at_once), _l1_left(rates, layout, at_once, backward)
    )
    name = "dcnv3_bwd_kernel" if backward else "dcnv3_kernel"
    count = instructions_of("dcnv3", name)
    added, reductions = asked.added, layout.vector // 4
    if backward and rates.card == "a100":  # one float an instruction before sm_90
        added = s.corners() * s.group_size * (1 if layout.vector == 8 else 0.5)
        reductions = layout.vector
    image = s.pixels * s.channels * s.size
    points = 3 * s.points * s.size
    # A request of a corner, by all units of a warp at other places; reductions add to floats.
    units = layout.units_of_warp
    corner = request_wavefronts(units * max(1, s.group_size * s.size / LINE), 512)
    reduction = request_wavefronts(
        units * max(1, s.group_size * 4 / LINE), 128 * layout.vector / reductions
    )
    return Phase(
        name=name,
        memory_bytes=2 * image + points + (points + 4 * s.pixels * s.channels) * backward,
        read_sectors=asked.gathered * missing + asked.read,
        write_sectors=asked.written,
        atomic_sectors=added,
        wavefronts=asked.shared
        + s.corners() / units * (corner + reduction * reductions * backward)
        + (asked.read + asked.written) * SECTOR / LINE,
        instructions=layout.warps * (count["warp"] + 9 * count["point"]),
        blocks=layout.blocks,
        at_once=at_once,
    )
