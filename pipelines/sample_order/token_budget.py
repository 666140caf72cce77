"""Batches of a budget of tokens: how large the views of a sample may be, and who fills a batch.

A view of any size and aspect is a grid of patches (NaViT, arXiv 2307.06304; NaFlex of SigLIP 2,
arXiv 2502.14786). How many patches it may have is drawn by its sample's position in the run, so
that the samples of every batch of every step are known without reading one: a function of the seed
and of the position at which the step begins, the same on any number of ranks and after any resume.

Legend: N positions, V views of a sample, M batches of a step, of all ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from m3i_fast.keyed_draws import Purpose, uniform
from m3i_fast.pipelines.sample_order.positions import Integers


def grid_of(height: float, width: float, most_tokens: int) -> tuple[int, int]:
    """Return the rows and columns of patches of a view, of the aspect of its region.

    height, width: of the region that it shows, in any unit, above 0. most_tokens: rows times
    columns is at most that; of the two numbers of the shorter side next to it, the one of which the
    aspect is nearer. Raises ValueError for a side or a number that is not above 0.
    """
    if most_tokens < 1 or not (0 < height < math.inf and 0 < width < math.inf):
        raise ValueError(
            "expected a height and width above 0 and at least 1 token, got "
            f"{height} x {width} and {most_tokens}"
        )
    if height > width:
        columns, rows = grid_of(width, height, most_tokens)
        return rows, columns
    aspect = width / height
    ideal = math.sqrt(most_tokens / aspect)

    def of(rows: int) -> tuple[int, int]:
        rows = min(max(rows, 1), math.isqrt(most_tokens))
        return rows, min(max(rows, round(rows * aspect)), most_tokens // rows)

    candidates = of(math.floor(ideal)), of(math.ceil(ideal))
    # the larger one where both are as near
    return min(candidates, key=lambda g: (abs(math.log(g[1] / g[0] / aspect)), -g[0] * g[1]))


@dataclass(frozen=True, slots=True)
class ViewSides:
    """How large the views of a sample are, drawn for each one by itself."""

    least: int
    """Patches along a side of the square of which the smallest view has the area."""
    most: int
    """Those of the largest view's; all whole numbers between are as likely."""

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ValueError(f"sides: expected 1 <= least <= most, got {self.least}, {self.most}")

    def most_tokens(self, drawn: np.ndarray) -> Integers:
        """Return how many patches each view may have, of numbers of [0, 1), of any shape."""
        sides = self.least + (drawn * np.float32(self.most - self.least + 1)).astype(np.int64)
        return np.minimum(sides, self.most) ** 2


@dataclass(frozen=True, kw_only=True)
class TokenBudget:
    """Say which positions of a run a step takes, and which of its batches each is in.

    A batch takes the next samples while all that their views may have fits into the budget. A step
    takes M = `num_ranks * accumulate` batches one after the other; number m is the rank's m mod
    num_ranks, so that one rank with four accumulated batches trains on the same batches as four
    ranks.

    Dealt, the inputs of a step go to its M batches in turn, as many to each as fit into all: number
    m has the inputs p, a sample each where none are mixed, of which p mod M is m. So those of a
    lane of object storage, which are dealt to ranks by p mod num_ranks, are all of one rank.
    Batches are less full, as the fullest of a step ends all.

    Raises ValueError for a count below 1, without views, and where a sample may not fit.
    """

    tokens: int
    """Most patches of a rank's batch, of all views of all of its samples."""
    views: tuple[ViewSides, ...]
    """Of each of a sample's V views."""
    seed: int
    num_ranks: int = 1
    accumulate: int = 1
    """Batches of a rank in one step."""
    dealt: bool = False
    """Whether samples are dealt to the batches of a step one by one."""
    images_per_input: int = 1
    """Samples that share an input: each batch has a multiple of them."""

    def __post_init__(self) -> None:
        for name in ("num_ranks", "accumulate", "images_per_input"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.views:
            raise ValueError("views: expected at least one, got none")
        if self.tokens < self._most_an_input:
            raise ValueError(
                f"token_budget: expected at least {self._most_an_input} tokens, which the views of "
                f"one sample may have{self._in_an_input}, got {self.tokens}"
            )

    @property
    def _in_an_input(self) -> str:
        several = self.images_per_input > 1
        return f", times the {self.images_per_input} that share an input" if several else ""

    @cached_property
    def _most_an_input(self) -> int:
        return self.images_per_input * sum(view.most**2 for view in self.views)

    @property
    def most_samples(self) -> int:
        """Return the samples that a batch has at most."""
        return self._whole_inputs(self.tokens // sum(view.least**2 for view in self.views))

    @property
    def mean_samples(self) -> int:
        """Return about how many samples a batch has, at least those of an input."""
        squares = [np.mean(np.arange(of.least, of.most + 1) ** 2) for of in self.views]
        return max(self._whole_inputs(round(self.tokens / sum(squares))), self.images_per_input)

    def _whole_inputs(self, samples: int) -> int:
        return samples - samples % self.images_per_input

    def most_tokens(self, positions: Integers) -> Integers:  # [N] -> [N, V]
        """Return how many patches each view of the sample at each position may have."""
        purpose = Purpose.VIEW_TOKENS
        drawn = uniform(positions, len(self.views), seed=self.seed, purpose=purpose)
        views = [of.most_tokens(drawn[:, v]) for v, of in enumerate(self.views)]
        return np.stack(views, 1)

    @property
    def _num_batches(self) -> int:  # M
        return self.num_ranks * self.accumulate

    def ends(self, start: int) -> Integers:  # [M + 1]
        """Return how many samples of the run precede each batch of the step that begins there.

        These are the first positions of batches that are not dealt. The last is the position at
        which the next step begins. Raises ValueError for a negative start.
        """
        if start < 0:
            raise ValueError(f"start: expected 0 or more, got {start}")
        num_batches = self._num_batches
        asked = np.arange(start, start + num_batches * self.most_samples + 1)
        tokens = self.most_tokens(asked).sum(1)
        if self.dealt:
            inputs = tokens[:-1].reshape(-1, num_batches, self.images_per_input).sum(2)
            fits = inputs.cumsum(0) <= self.tokens
            each = self.images_per_input * int(fits.all(1).sum())
            return start + each * np.arange(num_batches + 1)
        before = np.concatenate([[0], tokens.cumsum()])
        ends = [0]
        for _ in range(num_batches):
            full = before[ends[-1]] + self.tokens
            fitting = int(np.searchsorted(before, full, side="right")) - 1 - ends[-1]
            ends.append(ends[-1] + self._whole_inputs(fitting))
        return start + np.array(ends, np.int64)

    def next_start(self, start: int) -> int:
        """Return the position at which the step after the one that begins at a position begins.

        Raises ValueError for a negative start.
        """
        return int(self.ends(start)[-1])

    def counts(self, start: int) -> tuple[int, ...]:  # M
        """Return how many samples each batch of the step has that begins at a position.

        Raises ValueError for a negative start.
        """
        return tuple(np.diff(self.ends(start)).tolist())

    def positions(self, start: int, rank: int, batch: int = 0) -> Integers:
        """Return the positions of a rank's batch in the step that begins at a position, ascending.

        start: samples that all ranks took before: 0, or another step's `next_start`. batch:
        number of the accumulated batch. Raises ValueError for a rank or batch out of range.
        """
        for name, value, limit in (
            ("rank", rank, self.num_ranks),
            ("batch", batch, self.accumulate),
        ):
            if not 0 <= value < limit:
                raise ValueError(f"{name}: expected 0 to {limit - 1}, got {value}")
        ends, number = self.ends(start), batch * self.num_ranks + rank
        if self.dealt:
            images = self.images_per_input
            first = start // images
            first += (number - first) % self._num_batches
            inputs = np.arange(first, ends[-1] // images, self._num_batches)
            return (inputs[:, None] * images + np.arange(images)).reshape(-1)
        return np.arange(ends[number], ends[number + 1])
