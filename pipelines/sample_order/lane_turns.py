"""Which lane takes each position of a data set in object storage, alone in a run or mixed.

The groups of a run are dealt to lanes in turn: lane(g) = g mod L. A data set that is alone has
every group. One of a mixture has those that `Mixture` deals to it, and its j-th group goes to the
lane of where it stands in the run. So a lane is of one rank in either case, and what it takes is
known in closed form: the groups of a lane, L apart, pass through the mixture's period P in steps of
L, a walk that comes round after P / gcd(L, P) of them.

Legend: L lanes, K images of a group, P groups of a period, C = gcd(L, P) walks of W groups each.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from m3i_fast.pipelines.sample_order.positions import Integers, Mixture


class LaneTurns(Protocol):
    """Says which lane takes each position of a data set, counted over that data set alone."""

    @property
    def density(self) -> NDArray[np.float64]:
        """Return which part of each lane's groups is of this data set: [L], 0 to 1."""

    def lane_of(self, positions: Integers) -> Integers:
        """Return the lane of each position: [N] -> [N]."""

    def of_lane(self, below: Integers | int, lanes: Integers) -> Integers:
        """Count the positions below one that each of the lanes has: [N], [N] -> [N]."""

    def before_lanes(self, below: int) -> Integers:
        """Count the positions below one of all lanes before each, and of all: [L + 1]."""


class EveryTurn:
    """The lanes of a data set that is alone: they take its groups in turn."""

    def __init__(self, lanes: int, images_per_input: int) -> None:
        self._lanes, self._images = lanes, images_per_input

    @property
    def density(self) -> NDArray[np.float64]:
        """Return 1 for each lane."""
        return np.ones(self._lanes)

    def lane_of(self, positions: Integers) -> Integers:
        """Return the lane of each position."""
        return positions // self._images % self._lanes

    def of_lane(self, below: Integers | int, lanes: Integers) -> Integers:
        """Count the positions below one that each of the lanes has."""
        rounds, rest = np.divmod(below, self._images * self._lanes)
        return rounds * self._images + np.clip(rest - lanes * self._images, 0, self._images)

    def before_lanes(self, below: int) -> Integers:
        """Count the positions below one of all lanes before each, and of all."""
        rounds, rest = divmod(below, self._images * self._lanes)
        firsts = np.arange(self._lanes + 1) * self._images
        return rounds * firsts + np.minimum(rest, firsts)


class MixedTurns:
    """The lanes of one data set of a mixture. Memory and the start are O(P + L)."""

    def __init__(self, mixture: Mixture, dataset: int, lanes: int, images_per_input: int) -> None:
        """dataset: its number in the mixture."""
        self._lanes, self._images = lanes, images_per_input
        self._period = period = sum(mixture.shares)
        dealt, _ = mixture.at(np.arange(period))
        self._turns: Integers = np.flatnonzero(dealt == dataset)
        self._num_walks = math.gcd(lanes, period)
        self._length = period // self._num_walks  # W
        steps = np.arange(self._length, dtype=np.int64) * lanes % period
        walks = (np.arange(self._num_walks)[:, None] + steps) % period  # [C, W], each group once
        self._place = np.empty(period, np.int64)  # of each group in its walk
        self._place[walks] = np.arange(self._length)
        self._counts = np.zeros((self._num_walks, self._length + 1), np.int64)
        self._counts[:, 1:] = np.cumsum(dealt[walks] == dataset, axis=1)

    @property
    def density(self) -> NDArray[np.float64]:
        """Return which part of each lane's groups is of this data set."""
        walks: Integers = np.arange(self._lanes) % self._num_walks
        return self._counts[walks, -1] / self._length

    def lane_of(self, positions: Integers) -> Integers:
        """Return the lane of each position."""
        return self._groups(positions // self._images) % self._lanes

    def of_lane(self, below: Integers | int, lanes: Integers) -> Integers:
        """Count the positions below one that each of the lanes has."""
        turns, images = np.divmod(np.asarray(below, np.int64), self._images)
        groups = self._groups(turns)
        # Groups of the run below these that each lane has, whatever their data set.
        passed = np.maximum(-((lanes - groups) // self._lanes), 0)
        walks, begin = lanes % self._num_walks, self._place[lanes % self._period]
        rounds, place = np.divmod(begin + passed, self._length)
        counts = self._counts
        own = rounds * counts[walks, -1] + counts[walks, place] - counts[walks, begin]
        return own * self._images + np.where(groups % self._lanes == lanes, images, 0)

    def before_lanes(self, below: int) -> Integers:
        """Count the positions below one of all lanes before each, and of all."""
        counts = self.of_lane(below, np.arange(self._lanes))
        return np.concatenate([[0], np.cumsum(counts)])

    def _groups(self, turns: Integers) -> Integers:
        """Return the group of the run that each turn of the data set is."""
        rounds, within = np.divmod(turns, len(self._turns))
        return rounds * self._period + self._turns[within]
