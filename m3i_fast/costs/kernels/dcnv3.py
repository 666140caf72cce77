"""What our dcnv3 kernels ask of a card, in closed form of a call's sizes.

A unit is one output pixel in one group; 16 bytes of its channels are a lane's, 32 / lanes units a
warp's. The forward is that of nine points; the backward sums the gradient by x in windows of
shared memory, a warp's strip of 8 columns each, and adds their rows to global memory.

For points whose four corners lie inside the image and the window, requests are those that the
emulator counts, to the last one (tests/benchmarks/roofline/test_kernels.py). How many points leave
their window depends on the offsets: their share is that of even offsets, within a bound that the
tests state. Of offsets and masks in a slice of the groups, the emulator counts up to a tenth more
sectors. Not counted: the loops over points beside the image's edge, which a forward makes again,
and a backward's requests that part where some lanes' points are not valid.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from m3i_fast.costs.kernels.constants import Rates
from m3i_fast.costs.kernels.gather import Sampling
from m3i_fast.costs.kernels.instructions import instructions_of
from m3i_fast.costs.kernels.model import LINE, SECTOR, Phase, request_wavefronts
from m3i_fast.ops.tiles import read

# cuda/dcnv3/tiling.h, in pixels: a strip and what its window has on either side and above.
STRIP, HALO_COLUMNS, HALO_ROWS, WINDOW_ROWS = 8, 2, 3, 8
WINDOW_COLUMNS = STRIP + 2 * HALO_COLUMNS
MOST_ROWS, LEAST_ROWS, WINDOW_WARPS = 16, 4, 2048
CHANNELS = 32  # of a window
WINDOW_BYTES = WINDOW_ROWS * WINDOW_COLUMNS * CHANNELS * 4

# Wavefronts of shared memory as the emulator counts them, bank conflicts with them. By the lanes of
# a unit a forward's warp in an image; by lanes and bytes of an element a backward's set of units,
# without its window.
SHARED_FORWARD = {2: 224, 4: 120}
SHARED_OF_UNITS = {(2, 2): 207, (4, 2): 134, (4, 4): 134.5}
SHARED_OF_PIXEL = 45  # a backward's pixel in a window: its points and cells
SHARED_OF_POINT = 8  # read and written in a window
SHARED_OF_ROW = WINDOW_COLUMNS  # zeros in the place of a row that leaves a window
SHARED_OF_STRIP = WINDOW_BYTES // LINE
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
        if (lanes, self.sampling.size) not in SHARED_OF_UNITS or self.sampling.kernel != 3:
            known = (self.vector * each for each, size in SHARED_OF_UNITS
                     if size == self.sampling.size)  # fmt: skip
            raise ValueError(
                f"dcnv3: expected 3 x 3 points and groups of {' or '.join(map(str, known))} "
                f"channels, got {self.sampling.kernel} x {self.sampling.kernel} and "
                f"{self.sampling.group_size}"
            )
        return lanes

    @property
    def units_of_warp(self) -> int:
        """Return the units of a warp."""
        return 32 // self.lanes

    @property
    def blocks_of_image(self) -> int:
        """Return the forward's thread blocks of an image."""
        s = self.sampling
        return ceil(s.height * s.width * s.groups / (self.units_of_warp * self.warps_of_block))

    @property
    def warps(self) -> float:
        """Return the forward's warps that have units, of all images."""
        return self.sampling.units / self.units_of_warp

    # The backward's strips, as make_window_tiling has them.

    @property
    def groups_of_slice(self) -> int:
        """Return the groups of a window's channels."""
        return CHANNELS // self.sampling.group_size

    @property
    def slices(self) -> int:
        """Return the windows that divide the channels."""
        return ceil(self.sampling.groups / self.groups_of_slice)

    @property
    def strips(self) -> int:
        """Return the strips across an image."""
        return ceil(self.sampling.width / STRIP)

    @property
    def segments(self) -> int:
        """Return the parts of a strip, one below the other."""
        s, rows = self.sampling, MOST_ROWS
        across = s.batch * self.slices * self.strips
        while rows > LEAST_ROWS and across * ceil(s.height / rows) < WINDOW_WARPS:
            rows //= 2
        return ceil(s.height / rows)

    @property
    def rows(self) -> int:
        """Return the output rows of a warp's strip."""
        return ceil(self.sampling.height / self.segments)

    @property
    def window_warps(self) -> int:
        """Return the backward's warps, of all images."""
        return self.sampling.batch * self.slices * self.strips * self.segments

    @property
    def window_blocks(self) -> int:
        """Return the backward's thread blocks."""
        of_image = ceil(self.slices * self.strips * self.segments / self.warps_of_block)
        return self.sampling.batch * of_image

    @property
    def pixels_of_set(self) -> int:
        """Return the pixels of a strip's row that a warp works on at once."""
        return self.units_of_warp // self.groups_of_slice

    @property
    def sets(self) -> int:
        """Return the sets of units that the backward's warps work on one after the other."""
        return self.window_warps * self.rows * (STRIP // self.pixels_of_set)

    def flushed_sectors(self) -> int:
        """Return the sectors of all windows' rows, which are added to global memory once each."""
        s = self.sampling
        rows = sum(
            _length(first - HALO_ROWS, first + self.rows + WINDOW_ROWS - HALO_ROWS, s.height)
            for first in range(0, self.segments * self.rows, self.rows)
        )
        columns = sum(
            _length(first - HALO_COLUMNS, first - HALO_COLUMNS + WINDOW_COLUMNS, s.width)
            for first in range(0, self.strips * STRIP, STRIP)
        )
        return s.batch * rows * columns * s.channels * 4 // SECTOR

    def corners_in_windows(self) -> float:
        """Return the corners inside the image of the points that are summed in their window."""
        s = self.sampling
        rows = [(float(at), -HALO_ROWS, WINDOW_ROWS - HALO_ROWS - 1) for at in range(s.height)]
        columns = [
            (float(at), -HALO_COLUMNS - at % STRIP, WINDOW_COLUMNS - 1 - HALO_COLUMNS - at % STRIP)
            for at in range(s.width)
        ]
        return s.points * _mean_inside(s, rows, s.height) * _mean_inside(s, columns, s.width)

    def point_sectors(self) -> float:
        """Return the sectors of offsets and masks that the forward reads, each once.

        A lane reads every `lanes`-th point of its unit, both offsets at once.
        """
        lanes, units = self.lanes, self.units_of_warp
        trips = range(0, 9, lanes)
        bases = [warp * units for warp in range(32 // min(32, units))]
        total = 0
        for base in bases:
            for first in trips:
                at = [9 * (base + unit) + first + lane for unit in range(units)
                      for lane in range(lanes) if first + lane < 9]  # fmt: skip
                total += _sectors(at, self.sampling.size) + _sectors(at, 2 * self.sampling.size)
        return total / len(bases) * self.warps

    def set_sectors(self) -> int:
        """Return the sectors of offsets and masks that the backward reads, and those it writes.

        Offsets in two requests, for x and for y.
        """
        s, groups = self.sampling, self.groups_of_slice
        total = 0
        for pixel in range(0, s.height * s.width):
            column = pixel % s.width
            if column % self.pixels_of_set:
                continue
            pixels = min(self.pixels_of_set, s.width - column)
            for group in range(0, s.groups, groups):
                base = (pixel * s.groups + group) % SECTOR
                total += _set_sectors(base, pixels, min(groups, s.groups - group), s.groups, s.size)
        return s.batch * total

    def requests(self, *, backward: bool, corners: float | None = None) -> Requests:
        """Return the requests of a pass.

        corners: of the points that are read; all of them, inside and in their windows, unless
        given.
        """
        s = self.sampling
        inside = 4 * s.points if corners is None else corners
        image = s.units * s.group_size * s.size / SECTOR
        gathered = inside * s.group_size * s.size / SECTOR
        if not backward:
            shared = SHARED_FORWARD[self.lanes] * self.warps
            return Requests(
                gathered=gathered, read=self.point_sectors(), written=image, added=0, shared=shared
            )
        kept = inside if corners is None else self.corners_in_windows()
        points = self.set_sectors()
        pixels = s.pixels * self.slices
        return Requests(
            gathered=gathered,
            read=points + 2 * image,  # grad_out once more for the window
            written=points,
            added=self.flushed_sectors() + (inside - kept) * s.group_size * 4 / SECTOR,
            shared=SHARED_OF_UNITS[self.lanes, s.size] * self.sets
            + pixels * (SHARED_OF_PIXEL + 9 * SHARED_OF_POINT * kept / (4 * s.points))
            + self.window_warps * (SHARED_OF_STRIP + SHARED_OF_ROW * (self.rows + WINDOW_ROWS))
            + SHARED_OF_BLOCK * self.window_blocks,
        )


def _length(begin: int, end: int, extent: int) -> int:
    return max(0, min(end, extent) - max(begin, 0))


def _sectors(elements: list[int], size: int) -> int:
    """Return the sectors that one request touches."""
    return len({element * size // SECTOR for element in elements})


@lru_cache(maxsize=1024)
def _set_sectors(base: int, pixels: int, groups: int, groups_of_all: int, size: int) -> int:
    """Return the sectors of the offsets and masks of a set of units whose first one is `base`."""
    at = [9 * (base + pixel * groups_of_all + group) + k for pixel in range(pixels)
          for group in range(groups) for k in range(9)]  # fmt: skip
    steps = [at[first : first + 32] for first in range(0, len(at), 32)]
    return sum(_sectors(step, size) + 2 * _sectors(step, 2 * size) for step in steps)


def _mean_inside(s: Sampling, places: list[tuple[float, int, int]], extent: int) -> float:
    """Return the mean number of neighbours in [0, extent), of points that stay in their window.

    places: of output pixels, and from where to where the window reaches from there.
    """
    half = s.kernel // 2
    steps = [s.spread * (k - half) for k in range(s.kernel)]
    total = 0.0
    for at, low, high in places:
        for step in steps:
            for shift in (0, 1):  # the neighbour below and that above
                begin, end = max(-shift, at + low), min(extent - shift, at + high)
                place = at + step
                if s.reach == 0:
                    total += begin <= place < end
                else:
                    reached = min(place + s.reach, end) - max(place - s.reach, begin)
                    total += max(0.0, reached) / (2 * s.reach)
    return total / (len(places) * len(steps))


def layout_of(sampling: Sampling, card: str) -> Layout:
    """Return the layout with the card's tiles."""
    kind = "small" if sampling.height * sampling.width < 400 else "large"
    policy = read("dcnv3")["a100" if card == "a100" else "h100"][kind]
    return Layout(sampling=sampling, warps_of_block=policy["warps"])


def _resident_pixels(layout: Layout, blocks: int) -> float:
    """Return the pixels that a multiprocessor works on at once, as those of whole units."""
    units = blocks * layout.warps_of_block * layout.units_of_warp
    return units / layout.sampling.groups


def _l1_left(rates: Rates, layout: Layout, blocks: int, *, backward: bool) -> float:
    """Return what the blocks' shared memory leaves of the first-level cache."""
    slot = 33 if backward else 32  # of a point: place, weight, corners, sums and cells; or corners
    points = 9 * layout.units_of_warp * slot
    used = blocks * layout.warps_of_block * (points + WINDOW_BYTES * backward)
    return max(0.0, rates.l1_bytes - used)


def forward(
    sampling: Sampling, rates: Rates, layout: Layout | None = None, at_once: int = 6
) -> tuple[Phase, ...]:
    """Return the forward's phase: dcnv3_nine_kernel, whose blocks go through images.

    layout: the card's unless given; at_once: blocks that a multiprocessor runs at once.
    """
    layout, s = layout or layout_of(sampling, rates.card), sampling
    valid = 4 * s.points * s.valid_share()  # a corner outside is read beside it
    asked = layout.requests(backward=False, corners=valid)
    missing = s.missing_share(
        _resident_pixels(layout, at_once),
        _l1_left(rates, layout, at_once, backward=False),
    )
    count = instructions_of("dcnv3", "dcnv3_nine_kernel")
    units = layout.units_of_warp
    corner = request_wavefronts(units * max(1, s.group_size * s.size / LINE), 512)
    least = min(s.batch, max(1, rates.multiprocessors * at_once // layout.blocks_of_image))
    images = ceil(s.batch / ceil(s.batch / least))  # at work at once
    starts = images * layout.blocks_of_image * layout.warps_of_block
    image = s.pixels * s.channels * s.size
    return (
        Phase(
            name="dcnv3_nine_kernel",
            memory_bytes=2 * image + 3 * s.points * s.size,
            read_sectors=asked.gathered * missing + asked.read,
            write_sectors=asked.written,
            wavefronts=asked.shared
            + valid / units * corner
            + (asked.read + asked.written) * SECTOR / LINE,
            instructions=layout.warps * count["image"] + starts * count["warp"],
            blocks=images * layout.blocks_of_image,
            at_once=at_once,
        ),
    )


def backward(
    sampling: Sampling, rates: Rates, layout: Layout | None = None, at_once: int | None = None
) -> tuple[Phase, ...]:
    """Return the phases of the backward: zeros, the kernel, and in 16 bits the rounding.

    at_once: as many blocks as have room for their windows unless given.
    """
    layout = layout or layout_of(sampling, rates.card)
    elements = sampling.pixels * sampling.channels
    wide = elements * 4
    zeros = Phase(name="zeros", memory_bytes=wide, write_sectors=wide / SECTOR)
    kernel = _windows(layout, rates, at_once or _window_blocks_at_once(layout, rates))
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


def _window_blocks_at_once(layout: Layout, rates: Rates) -> int:
    """Return the blocks whose shared memory fits a multiprocessor's, at most the policy's 5."""
    used = layout.warps_of_block * (WINDOW_BYTES + 9 * layout.units_of_warp * 33) + 1024
    return max(1, min(5, int(rates.l1_bytes / used)))


def _windows(layout: Layout, rates: Rates, at_once: int) -> Phase:
    s = layout.sampling
    corners = s.corners()
    asked = layout.requests(backward=True, corners=corners)
    image = s.pixels * s.channels * s.size
    missing = s.missing_share(
        _resident_pixels(layout, at_once),
        _l1_left(rates, layout, at_once, backward=True),
    )
    count = instructions_of("dcnv3", "dcnv3_bwd_window_kernel")
    pixels = s.pixels * layout.slices
    steps = ceil(9 * layout.pixels_of_set * layout.groups_of_slice / 32)
    instructions = (
        layout.window_warps * (count["warp"] + layout.rows * count["row"])
        + layout.sets * (count["set"] + steps * count["step"] + 9 * count["point"])
        + pixels * (count["pixel"] + 9 * count["added"])
    )
    units = layout.units_of_warp
    corner = request_wavefronts(units * max(1, s.group_size * s.size / LINE), 512)
    return Phase(
        name="dcnv3_bwd_window_kernel",
        memory_bytes=2 * image + 6 * s.points * s.size + 4 * s.pixels * s.channels,
        # grad_out is read a second time from the first-level cache.
        read_sectors=asked.gathered * missing + asked.read - image / SECTOR,
        write_sectors=asked.written,
        atomic_sectors=asked.added,
        wavefronts=asked.shared
        + corners / units * corner
        + (asked.read + asked.written + asked.added) * SECTOR / LINE,
        instructions=instructions,
        blocks=layout.window_blocks,
        at_once=at_once,
    )
