"""Which sample stands at which position of a run, as closed forms: nothing is shuffled or stored.

A run is a sequence of positions 0, 1, 2, ... of samples, the same on any number of ranks. Each
pass over a data set is a permutation of its samples that is computed position by position, so that
a run starts and resumes anywhere in constant time and memory, and one number says where it stands:
the samples that all ranks have taken.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from m3i_fast.keyed_draws import finalise

Integers = NDArray[np.int64]
Order = Callable[[Integers], Integers]
"""Positions -> rows of a table, [N] each."""
_Words = NDArray[np.uint64]

ORDER_VERSION = 1
"""Raised by a change after which the same seed gives another order or other draws."""
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 8  # of the Feistel network; three make a random-looking order of a large set
# Smaller sets are sorted by hashes: a Feistel network of few elements prefers some of their orders,
# visibly for 6 samples even with 16 rounds.
_MAX_SORTED = 1024
_MAX_PERIOD = 2**16


def shuffled(positions: Integers, *, size: int, seed: int, dataset: int = 0) -> Integers:
    """Return the sample at each position of a data set that is passed over again and again.

    Position p is in epoch p // size, each of which is a permutation of all samples.

    positions: int64, of any shape, not negative. size: samples of the data set. dataset: its
    number, so that two of the same size have different orders. Returns int64 of the same shape,
    0 to size - 1. Raises ValueError for a size below 1, a negative position, or a seed outside
    [0, 2**64).
    """
    if size < 1:
        raise ValueError(f"size: expected at least 1 sample, got {size}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected 0 to 2**64 - 1, got {seed}")
    positions = np.asarray(positions, np.int64)
    if not positions.size:
        return positions.copy()
    if positions.min() < 0:
        raise ValueError(f"positions: expected 0 or more, got {positions.min()}")
    epochs, within = np.divmod(positions.reshape(-1), size)
    if epochs[0] == epochs[-1] and (epochs == epochs[0]).all():
        epochs = epochs[:1]
    permute = _sorted if size <= _MAX_SORTED else _ciphered
    samples = permute(within, _epoch_keys(seed, epochs, dataset), size)
    return samples.astype(np.int64).reshape(positions.shape)


def _epoch_keys(seed: int, epochs: Integers, dataset: int) -> _Words:
    """Return the key of each epoch, [N] or [1]."""
    key = np.array([seed], np.uint64)
    for part in (np.array([dataset], np.uint64), epochs.astype(np.uint64)):
        key = finalise(key + _GAMMA * (part + np.uint64(1)))
    return key


def _sorted(within: Integers, keys: _Words, size: int) -> Integers:
    """Permute by sorting hashes of all samples; keys: [N], or [1] for all."""
    samples = np.empty(within.shape, np.int64)
    distinct, which = np.unique(keys, return_inverse=True)
    which = np.broadcast_to(which, within.shape)
    steps = _GAMMA * np.arange(1, size + 1, dtype=np.uint64)
    for first in range(0, len(distinct), _MAX_SORTED):  # bounds the memory of many epochs
        some = distinct[first : first + _MAX_SORTED]
        order = finalise(some[:, None] + steps).argsort(axis=1, kind="stable")
        here = (which >= first) & (which < first + len(some))
        samples[here] = order[which[here] - first, within[here]]
    return samples


def _ciphered(within: Integers, keys: _Words, size: int) -> _Words:
    """Permute by a Feistel network on the smallest rectangle that holds all samples.

    Its sums are modulo the rectangle's sides, and it is applied again where it leads outside (Black
    and Rogaway, Ciphers with arbitrary finite domains, 2002). keys: [N], or [1] for all.
    """
    steps = _GAMMA * np.arange(1, _ROUNDS + 1, dtype=np.uint64)
    round_keys = finalise(keys + steps[:, None])
    height = math.isqrt(size - 1) + 1
    sides = np.uint64(height), np.uint64(-(-size // height))
    samples = _feistel(within.astype(np.uint64), round_keys, sides)
    while len(outside := np.nonzero(samples >= np.uint64(size))[0]):
        own = round_keys[:, outside] if len(keys) > 1 else round_keys
        samples[outside] = _feistel(samples[outside], own, sides)
    return samples


def _feistel(words: _Words, keys: _Words, sides: tuple[np.uint64, np.uint64]) -> _Words:
    """Permute the words below sides[0] * sides[1], each by its own keys or all by the same."""
    high, low = np.divmod(words, sides[1])
    one = np.uint64(1)
    for round_, key in enumerate(keys):  # hashes of 63 bits, so that the sums do not wrap
        if round_ % 2:
            low = (low + (finalise(high + key) >> one)) % sides[1]
        else:
            high = (high + (finalise(low + key) >> one)) % sides[0]
    return high * sides[1] + low


# ---- Mixtures of data sets -----------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """Deal groups of neighbouring positions to several data sets, in proportion to weights.

    The sequence is periodic: weights are taken as fractions of at most 65,536, the nearest where
    theirs are finer (`shares`), and after every group the count of each data set is within
    1 of its share (Tijdeman, The chairman assignment problem, 1980).

    Raises ValueError where sizes and weights differ in number, are none, or are not above 0.
    """

    sizes: tuple[int, ...]
    """Samples of each data set."""
    weights: tuple[float, ...]
    """In any unit; above 0."""

    def __post_init__(self) -> None:
        if not self.sizes or len(self.sizes) != len(self.weights):
            raise ValueError(
                f"weights: expected one for each of {len(self.sizes)} data sets, at least 1, got "
                f"{len(self.weights)}"
            )
        for name, values in (("sizes", self.sizes), ("weights", self.weights)):
            if not all(value > 0 and math.isfinite(value) for value in values):
                raise ValueError(f"{name}: expected finite numbers above 0, got {list(values)}")

    @cached_property
    def shares(self) -> tuple[int, ...]:
        """Return the groups of each data set in one period."""
        exact = [Fraction(str(weight)) for weight in self.weights]
        exact = [weight / sum(exact) for weight in exact]
        period = math.lcm(*(share.denominator for share in exact))
        if period <= _MAX_PERIOD:
            return tuple(int(share * period) for share in exact)
        floors = [max(math.floor(share * _MAX_PERIOD), 1) for share in exact]
        by_rest = sorted(range(len(exact)), key=lambda d: floors[d] - exact[d] * _MAX_PERIOD)
        for d in by_rest[: max(_MAX_PERIOD - sum(floors), 0)]:
            floors[d] += 1
        return tuple(floors)

    @cached_property
    def _period(self) -> tuple[Integers, Integers]:
        """Return the data set of each group of a period, and the groups that it had before."""
        length = sum(self.shares)
        # The j-th turn of a data set may be taken once its share of j - 1 turns, and a slack, is
        # due, and must be before its share of j turns, less the slack, is. Of those that may, the
        # one that must first is taken: Tijdeman proves that no turn is ever late.
        scale = max(2 * len(self.shares) - 2, 1)
        slack = 1 if len(self.shares) > 1 else 0
        turns: list[list[tuple[int, int, int]]] = [[] for _ in range(length + 1)]
        for d, share in enumerate(self.shares):
            before = np.arange(share, dtype=np.int64)
            ready = -(-(before * scale + slack) * length // (scale * share))
            until = ((before + 1) * scale - slack) * length // (scale * share)
            for turn in zip(ready.tolist(), until.tolist(), before.tolist(), strict=True):
                turns[max(turn[0], 1)].append((turn[1], d, turn[2]))
        waiting: list[tuple[int, int, int]] = []
        dealt, before = np.zeros((2, length), np.int64)
        for n in range(1, length + 1):
            for turn in turns[n]:
                heapq.heappush(waiting, turn)
            _, dealt[n - 1], before[n - 1] = heapq.heappop(waiting)
        return dealt, before

    def at(self, groups: Integers) -> tuple[Integers, Integers]:
        """Return the data set of each group, and how many groups it had before.

        groups: int64, of any shape, not negative. Returns two int64 arrays of the same shape.
        """
        dealt, before = self._period
        rounds, within = np.divmod(np.asarray(groups, np.int64), len(dealt))
        datasets = dealt[within]
        return datasets, rounds * np.array(self.shares, np.int64)[datasets] + before[within]

    def own_positions(
        self, positions: Integers, *, images_per_input: int = 1
    ) -> tuple[Integers, Integers]:
        """Return the data set at each position of a run, and how many positions it had before.

        positions: int64, of any shape, not negative. images_per_input: neighbours that are mixed
        with each other, which come of one data set. Returns two int64 arrays of the same shape.
        """
        groups, image = np.divmod(np.asarray(positions, np.int64), images_per_input)
        datasets, before = self.at(groups)
        return datasets, before * images_per_input + image

    def samples(
        self,
        positions: Integers,
        *,
        seed: int,
        images_per_input: int = 1,
        orders: Mapping[int, Order] | None = None,
    ) -> tuple[Integers, Integers]:
        """Return the data set and the sample in it at each position of a run.

        Each data set is passed over in an order of its own: that of `orders`, by its number, or
        `shuffled`. Other arguments as `own_positions`. Returns two int64 arrays of the same shape.
        Raises ValueError as `shuffled`.
        """
        datasets, own = self.own_positions(positions, images_per_input=images_per_input)
        samples = np.empty_like(own)
        for d, size in enumerate(self.sizes):
            where = datasets == d
            order = (orders or {}).get(d) or partial(shuffled, size=size, seed=seed, dataset=d)
            samples[where] = order(own[where])
        return datasets, samples


# ---- Steps of several ranks ----------------------------------------------------------------------


class Layout(Protocol):
    """Says which positions of a step go to which rank and batch."""

    @property
    def accumulate(self) -> int:
        """Return the batches of a rank in one step."""

    @property
    def images_per_input(self) -> int:
        """Return the neighbours that make an input."""

    @property
    def most_samples(self) -> int:
        """Return the samples that a batch has at most."""

    def positions(self, start: int, rank: int, batch: int = 0) -> Integers:
        """Return the positions of a rank's batch in the step that begins at a position."""

    def next_start(self, start: int) -> int:
        """Return the position at which the step after one begins."""


@dataclass(frozen=True, kw_only=True)
class StepLayout:
    """Say which positions of a step go to which rank and batch.

    A step takes neighbouring positions, `images_per_input` of which make a mixed input. Its groups
    go to the ranks in turn, so that one rank with a batch of 32 trains on the same inputs as two
    with 16, or as one with two accumulated batches of 16.

    Raises ValueError for a count below 1, and where a batch is not a whole number of inputs.
    """

    batch_size: int
    """Images of a rank's batch."""
    num_ranks: int = 1
    accumulate: int = 1
    """Batches of a rank in one step."""
    images_per_input: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_ranks", "accumulate", "images_per_input"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.batch_size % self.images_per_input:
            raise ValueError(
                f"batch_size: expected a multiple of images_per_input = {self.images_per_input}, "
                f"got {self.batch_size}"
            )

    @property
    def samples_a_step(self) -> int:
        """Return the samples that all ranks take together in one step."""
        return self.batch_size * self.num_ranks * self.accumulate

    @property
    def most_samples(self) -> int:
        """Return the samples of a batch."""
        return self.batch_size

    def next_start(self, start: int) -> int:
        """Return the position at which the step after one begins."""
        return start + self.samples_a_step

    def positions(self, start: int, rank: int, batch: int = 0) -> Integers:
        """Return the positions of a rank's batch in the step that begins at a position.

        start: samples taken before, a multiple of images_per_input. batch: number of the
        accumulated batch. Returns [batch_size] int64, ascending, inputs one after the other.
        Raises ValueError for a start, rank or batch out of range.
        """
        images = self.images_per_input
        if start < 0 or start % images:
            raise ValueError(f"start: expected a multiple of {images}, got {start}")
        for name, value, limit in (
            ("rank", rank, self.num_ranks),
            ("batch", batch, self.accumulate),
        ):
            if not 0 <= value < limit:
                raise ValueError(f"{name}: expected 0 to {limit - 1}, got {value}")
        first = start // images
        first += (rank - first) % self.num_ranks
        inputs = self.batch_size // images
        groups = first + self.num_ranks * (batch * inputs + np.arange(inputs, dtype=np.int64))
        return (groups[:, None] * images + np.arange(images)).reshape(-1)
