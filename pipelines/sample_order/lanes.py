"""The order of samples for object storage, where a read is a range of a shard and not a sample.

Neighbouring samples of a shard make a clump, which is fetched by one ranged read. The groups of a
run are dealt to lanes in turn, and so are the ranks, so that each lane is of one rank. A lane goes
through the clumps of its share of the epoch one window after the other, each of which is shuffled,
and so a rank holds one window of each of its lanes at a time.

An epoch is exact on any number of ranks. Its clumps, shuffled, stand one behind the other as one
row of all N samples. Lane l has n(l) positions of the epoch, which follow from the lane's number
alone, and takes the n(l) samples of the row that come after those of lanes 0 to l - 1. A clump in
which two lanes meet is shared by them, and nothing is left over at the end.

Legend: N samples, C clumps, L lanes, S shards, P positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from m3i_fast.config.data import DEFAULT_LANES
from m3i_fast.keyed_draws import finalise
from m3i_fast.pipelines.sample_order.lane_turns import EveryTurn, LaneTurns, MixedTurns
from m3i_fast.pipelines.sample_order.positions import Mixture, shuffled

Integers = NDArray[np.int64]

CLUMP_SAMPLES = 128
"""Samples of a clump; the last one of a shard has what is left."""
_CLUMPS_A_LANE = 8  # fewest that a lane has by default: one in so many is read by two lanes
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FULL, _SHORT = 2**32, 2**32 + 1  # data sets of `shuffled` that no mixture has


class Clumps:
    """Say which samples make a clump, in the order of the table.

    shard_sizes: samples of each shard, 1 or more.
    """

    def __init__(self, shard_sizes: Sequence[int]) -> None:
        sizes = np.asarray(shard_sizes, np.int64)
        if not sizes.size or sizes.min() < 1:
            raise ValueError("shard_sizes: expected one or more, of at least 1 sample each")
        self.shard_starts: Integers = np.concatenate([[0], np.cumsum(sizes)])  # [S + 1]
        whole, rest = np.divmod(sizes, CLUMP_SAMPLES)
        self._full_before: Integers = np.concatenate([[0], np.cumsum(whole)])  # [S + 1]
        shards = np.flatnonzero(rest)
        self.short_sizes: Integers = rest[shards]
        self._short_starts: Integers = self.shard_starts[shards + 1] - rest[shards]

    @property
    def num_samples(self) -> int:
        """Return N."""
        return int(self.shard_starts[-1])

    @property
    def num_full(self) -> int:
        """Return how many clumps have CLUMP_SAMPLES samples."""
        return int(self._full_before[-1])

    @property
    def num_short(self) -> int:
        """Return how many clumps are the shorter end of a shard."""
        return len(self.short_sizes)

    def __len__(self) -> int:
        return self.num_full + self.num_short

    def first_of_full(self, numbers: Integers) -> Integers:
        """Return the first sample of each of the full clumps, by their number among these."""
        shards = np.searchsorted(self._full_before, numbers, "right") - 1
        within = (numbers - self._full_before[shards]) * CLUMP_SAMPLES
        return self.shard_starts[shards] + within

    def first_of_short(self, numbers: Integers) -> Integers:
        """Return the first sample of each of the short clumps, by their number among these."""
        return self._short_starts[numbers]

    def around(self, samples: Integers) -> tuple[Integers, Integers, Integers]:
        """Return the shard of each sample, and the first and one past the last of its clump."""
        shards = np.searchsorted(self.shard_starts, samples, "right") - 1
        begin = self.shard_starts[shards]
        first = begin + (samples - begin) // CLUMP_SAMPLES * CLUMP_SAMPLES
        return shards, first, np.minimum(first + CLUMP_SAMPLES, self.shard_starts[shards + 1])


@dataclass(frozen=True, slots=True)
class _Row:
    """The clumps of an epoch one behind the other, in its order; short ones are spread evenly."""

    short: Integers  # number of the short clump, by its turn
    slots: Integers  # place of it among all clumps
    starts: Integers  # samples before it
    ends: Integers

    def slot_of(self, offsets: Integers) -> tuple[Integers, Integers]:
        """Return the place of the clump that holds each offset in the row, and its begin."""
        turn = np.searchsorted(self.starts, offsets, "right") - 1
        slots, starts = offsets // CLUMP_SAMPLES, offsets - offsets % CLUMP_SAMPLES
        if not len(self.starts):
            return slots, starts
        behind = turn >= 0
        last = np.maximum(turn, 0)
        within = behind & (offsets < self.ends[last])
        past = (offsets - self.ends[last]) // CLUMP_SAMPLES
        slots = np.where(behind, self.slots[last] + 1 + past, slots)
        starts = np.where(behind, self.ends[last] + past * CLUMP_SAMPLES, starts)
        return np.where(within, self.slots[last], slots), np.where(
            within, self.starts[last], starts
        )

    def starts_of(self, slots: Integers) -> Integers:
        """Return how many samples are before the clump at each place; past the last, all."""
        turn = np.searchsorted(self.slots, slots, "left") - 1  # short clumps before it, less 1
        if not len(self.slots):
            return slots * CLUMP_SAMPLES
        last = np.maximum(turn, 0)
        past = (slots - self.slots[last] - 1) * CLUMP_SAMPLES
        return np.where(turn >= 0, self.ends[last] + past, slots * CLUMP_SAMPLES)


class LaneOrder:
    """Say which sample stands at which position of a run that reads from object storage.

    It depends on the shards' sizes, the seed, `lanes`, `window` and `images_per_input`, and not on
    ranks or batches. Memory and the start of an epoch are O(S + L), whatever N is.

    shard_sizes: samples of each shard. lanes: None for the most that divide DEFAULT_LANES and
    leave every lane some clumps. window: clumps that a lane shuffles together. images_per_input:
    neighbours that are mixed with each other, which share a lane. mixture, dataset: what deals the
    groups of the run, and the number of this data set in it, so that two of the same sizes have
    different orders; positions are then those of this data set alone (`Mixture.own_positions`).
    Raises ValueError for what is out of range.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        *,
        seed: int,
        lanes: int | None = None,
        window: int = 1,
        images_per_input: int = 1,
        mixture: Mixture | None = None,
        dataset: int = 0,
    ) -> None:
        for name, value in (("lanes", lanes), ("window", window), ("images", images_per_input)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.clumps = Clumps(shard_sizes)
        self.seed = seed if mixture is None else _seed_of(seed, dataset)
        self.lanes = lanes or default_lanes(len(self.clumps))
        self.window = window
        self.images_per_input = images_per_input
        self.turns: LaneTurns = (
            EveryTurn(self.lanes, images_per_input)
            if mixture is None
            else MixedTurns(mixture, dataset, self.lanes, images_per_input)
        )
        self._row: tuple[int, _Row] | None = None
        # The last window of each lane, as a cache: an order that sorts needs it whole.
        self._width = min(window * CLUMP_SAMPLES, self.clumps.num_samples)
        self._cached = np.full((3, self.lanes), -1, np.int64)  # epoch, begin and end in the row
        self._orders = np.zeros((self.lanes, self._width), np.int32)

    @property
    def identity(self) -> str:
        """Return what makes this order another than that of the same data with other settings."""
        return f"lanes {self.lanes}, window {self.window}, images {self.images_per_input}"

    def check_ranks(self, num_ranks: int, *, mixed: Sequence[int] = ()) -> None:
        """Raise ValueError, with what to set, where a lane would be of several ranks.

        mixed: lanes of all data sets of a mixture; data.lanes sets those of each, and is not to be
        fewer than the largest one needs for its shuffle.
        """
        if self.lanes % num_ranks == 0:
            return
        common, most = math.gcd(self.lanes, *mixed), max(mixed, default=0)
        fitting = [r for r in range(1, common + 1) if common % r == 0]
        below = max(r for r in fitting if r < max(num_ranks, 2))
        above = min((r for r in fitting if r > num_ranks), default=below)
        near = below if num_ranks - below <= above - num_ranks else above
        least = max(round(self.lanes / num_ranks), 1) * num_ranks
        if len(mixed) > 1:
            least = -(-most // num_ranks) * num_ranks
        raise ValueError(
            f"data.lanes: expected a multiple of the number of ranks, {num_ranks}, got "
            f"{self.lanes}; use {near} ranks, or --data.lanes {least}, which is another order of "
            "the samples"
        )

    def lane_of(self, positions: Integers) -> Integers:
        """Return the lane of each position; rank r of R has those with lane mod R = r."""
        return self.turns.lane_of(positions)

    def samples(self, positions: Integers) -> Integers:
        """Return the sample, a row of the table, at each position.

        positions: int64, of any shape, 0 or more. Returns int64 of the same shape, 0 to N - 1.
        """
        positions = np.asarray(positions, np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError(f"positions: expected 0 or more, got {positions.min()}")
        flat = positions.reshape(-1)
        epochs = flat // self.clumps.num_samples
        found = np.empty(flat.shape, np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            found[here] = self._of_epoch(epoch, flat[here])
        return found.reshape(positions.shape)

    def _of_epoch(self, epoch: int, positions: Integers) -> Integers:
        row = self._row_of(epoch)
        lanes = self.lane_of(positions)
        first = epoch * self.clumps.num_samples
        turns, last = self.turns, first + self.clumps.num_samples
        share = turns.before_lanes(last) - turns.before_lanes(first)  # [L + 1], begins of parts
        begin, end = share[lanes], share[lanes + 1]
        offsets = begin + turns.of_lane(positions, lanes) - turns.of_lane(first, lanes)
        # The window: `window` places, counted from that of the lane's first clump.
        place, start = row.slot_of(begin)
        own, _ = row.slot_of(offsets)
        opens = place + (own - place) // self.window * self.window
        low = np.maximum(begin, row.starts_of(opens))
        closes = np.minimum(opens + self.window, len(self.clumps))
        high = np.minimum(end, row.starts_of(closes))
        offsets = low + self._shuffled_windows(epoch, lanes, low, high, offsets - low)
        place, start = row.slot_of(offsets)
        return self._first_sample(epoch, row, place) + offsets - start

    def _row_of(self, epoch: int) -> _Row:
        """Lay out the clumps of an epoch; the last one is kept, since steps stay in an epoch."""
        if self._row is not None and self._row[0] == epoch:
            return self._row[1]
        count, total = self.clumps.num_short, len(self.clumps)
        turns = np.arange(count, dtype=np.int64)
        short = turns
        if count:
            short = shuffled(epoch * count + turns, size=count, seed=self.seed, dataset=_SHORT)
        sizes = self.clumps.short_sizes[short]
        slots = -(-(turns + 1) * total // max(count, 1)) - 1
        ends = (slots - turns) * CLUMP_SAMPLES + np.cumsum(sizes)
        row = _Row(short=short, slots=slots, starts=ends - sizes, ends=ends)
        self._row = (epoch, row)
        return row

    def _first_sample(self, epoch: int, row: _Row, places: Integers) -> Integers:
        """Return the first sample of the clump at each place of an epoch's row."""
        turn = np.searchsorted(row.slots, places, "left")
        first = np.empty(places.shape, np.int64)
        is_short = np.zeros(places.shape, bool)
        if len(row.slots):
            is_short = row.slots[np.minimum(turn, len(row.slots) - 1)] == places
            first[is_short] = self.clumps.first_of_short(row.short[turn[is_short]])
        if not is_short.all():
            full = ~is_short
            numbers = shuffled(
                epoch * self.clumps.num_full + places[full] - turn[full],
                size=self.clumps.num_full,
                seed=self.seed,
                dataset=_FULL,
            )
            first[full] = self.clumps.first_of_full(numbers)
        return first

    def _shuffled_windows(
        self, epoch: int, lanes: Integers, low: Integers, high: Integers, within: Integers
    ) -> Integers:
        """Permute offsets inside of their windows, by sorting a hash of every offset of each."""
        lows, firsts, which = np.unique(low, return_index=True, return_inverse=True)
        lane, highs = lanes[firsts], high[firsts]
        wanted = np.stack([np.full(len(lows), epoch), lows, highs])
        orders = self._orders[lane]
        stale = np.flatnonzero((self._cached[:, lane] != wanted).any(0))
        if len(stale):
            made = self._orders_of(wanted[:, stale])
            orders[stale, : made.shape[1]] = made
            self._orders[lane[stale]] = orders[stale]
            self._cached[:, lane[stale]] = wanted[:, stale]
        return orders[which, within].astype(np.int64)

    def _orders_of(self, windows: Integers) -> NDArray[np.int64]:
        """Make the order of each window [3, n], as [n, most samples of one] int64."""
        epochs, lows, highs = windows
        sizes = highs - lows
        with np.errstate(over="ignore"):
            key = np.full(len(lows), self.seed, np.uint64)
            for part in (epochs, lows):
                key = finalise(key + _GAMMA * (part.astype(np.uint64) + np.uint64(1)))
            steps = np.arange(int(sizes.max()), dtype=np.int64)
            hashes = finalise(key[:, None] + _GAMMA * (steps.astype(np.uint64) + np.uint64(1)))
        hashes[steps >= sizes[:, None]] = np.iinfo(np.uint64).max  # stable: they sort behind
        return hashes.argsort(axis=1, kind="stable")


def _seed_of(seed: int, dataset: int) -> int:
    """Return the seed of a data set of a mixture."""
    key = np.array([seed], np.uint64) + _GAMMA * np.array([dataset + 1], np.uint64)
    return int(finalise(key)[0])


def default_lanes(num_clumps: int) -> int:
    """Return the most lanes that divide DEFAULT_LANES and have some clumps each."""
    most = max(num_clumps // _CLUMPS_A_LANE, 1)
    return max(n for n in range(1, DEFAULT_LANES + 1) if DEFAULT_LANES % n == 0 and n <= most)
