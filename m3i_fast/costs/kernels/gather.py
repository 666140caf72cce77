"""How many points of a deformable sampling lie inside, and what of their sectors misses the L1.

Closed forms for offsets that are spread evenly over [-reach, reach] pixels. For those of a normal
distribution the even one of the same variance stands, reach = sqrt(3) of its deviation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """A 2-D sampling with stride 1: sizes, groups and the reach of its offsets."""

    batch: int
    height: int
    width: int
    channels: int
    groups: int
    size: int
    """Bytes of an element."""
    reach: float
    """In pixels, with the scale of the offsets."""
    spread: float = 1.0
    """Pixels from a point of the undeformed 3 x 3 grid to the next one."""
    kernel: int = 3

    @property
    def pixels(self) -> int:
        """Return the pixels of the batch."""
        return self.batch * self.height * self.width

    @property
    def units(self) -> int:
        """Return the pairs of an output pixel and a group."""
        return self.pixels * self.groups

    @property
    def points(self) -> int:
        """Return the samples, of all units."""
        return self.units * self.kernel**2

    @property
    def group_size(self) -> int:
        """Return the channels of a group."""
        return self.channels // self.groups

    def valid_share(self) -> float:
        """Return the share of points with -1 < place < extent in both directions."""
        return self._mean(self.height, _valid) * self._mean(self.width, _valid)

    def corners(self) -> float:
        """Return the corners inside the image, of all points."""
        share = self._mean(self.height, _inside) * self._mean(self.width, _inside)
        return self.points * share

    def _mean(self, extent: int, of: Callable[[float, float, int], float]) -> float:
        half = self.kernel // 2
        steps = [self.spread * (k - half) for k in range(self.kernel)]
        total = sum(of(at + s, self.reach, extent) for at in range(extent) for s in steps)
        return total / (extent * len(steps))

    def missing_share(self, pixels_at_once: float, l1_bytes: float) -> float:
        """Return what share of the gathered sectors the L2 cache is asked for.

        A multiprocessor works on `pixels_at_once` neighbouring pixels; their points fall into a
        window, of which its L1 keeps as much as fits. What is kept is asked for once.
        """
        span = 2 * self.reach + self.spread * (self.kernel - 1) + 1
        rows = min(self.height, ceil(pixels_at_once / self.width) - 1 + span)
        columns = min(self.width, min(self.width, pixels_at_once) - 1 + span)
        window = rows * columns * self.channels * self.size
        asked = self.corners() / self.pixels * self.group_size * self.size * pixels_at_once
        kept = min(1.0, l1_bytes / window)
        return 1 - kept + kept * min(1.0, window / asked)


def _overlap(low: float, high: float, begin: float, end: float) -> float:
    return max(0.0, min(high, end) - max(low, begin))


def _valid(place: float, reach: float, extent: int) -> float:
    """Return the probability of -1 < place + offset < extent."""
    if reach == 0:
        return float(-1 < place < extent)
    return _overlap(place - reach, place + reach, -1, extent) / (2 * reach)


def _inside(place: float, reach: float, extent: int) -> float:
    """Return the mean number of the two neighbours that lie in [0, extent) at a valid place."""
    if reach == 0:
        return float((0 <= place < extent) + (-1 <= place < extent - 1)) * (-1 < place < extent)
    low, high = place - reach, place + reach
    near = _overlap(low, high, 0, extent) + _overlap(low, high, -1, extent - 1)
    return near / (2 * reach)
