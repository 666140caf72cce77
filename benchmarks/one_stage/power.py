"""How often the rule says what, by simulation of experiments whose differences are known.

Legend: A arms, F folds, C clusters of a fold, B draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from m3i_fast.benchmarks.one_stage.resampling import CONFIDENCE, Floats, Noise
from m3i_fast.benchmarks.one_stage.verdict import MARGIN

POINTS = (0.0, 1.0, 2.0, 3.0, 5.0)  # that M3I is better than every other arm
_TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Design:
    """A data set's part of the experiment, and the standard deviations of a difference of two arms.

    As `bench methods --pilot` prints them, in points.
    """

    seed: float
    cluster: float
    rest: float
    clusters_a_fold: int
    seeds_a_fold: int = 1
    num_folds: int = 5
    num_arms: int = 5

    @property
    def of_runs(self) -> float:
        """Return the variance that seeds make of a fold's figure of one arm, in points^2."""
        return self.seed**2 / 2 / self.seeds_a_fold

    @property
    def of_clusters(self) -> float:
        """Return the variance that clusters make of a fold's figure of one arm, in points^2."""
        whole = self.cluster**2 + self.rest**2 / self.seeds_a_fold
        return whole / 2 / self.clusters_a_fold

    def longer(self, times: int) -> Design:
        """Return the same with so many times the seeds."""
        return replace(self, seeds_a_fold=self.seeds_a_fold * times)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Shares of simulated experiments."""

    covered: float
    """A single difference's interval contains it."""
    found: float
    """A single difference's interval is above 0."""
    holds: float
    """M3I minus the best other arm is above 0."""
    refuted: float
    """M3I minus the best other arm is below MARGIN."""


def simulate(
    design: Design,
    points: float,
    *,
    behind: float = 0.0,
    num_experiments: int = 1000,
    num_draws: int = 1000,
    random_seed: int = 0,
) -> Rates:
    """Simulate experiments where M3I is better by `points` than the best other arm.

    behind: points that the remaining arms are behind that one; 0: all are alike. Runs and clusters
    are normal, and the variance that clusters make is known to the rule, as it nearly is of
    hundreds.
    """
    rng = np.random.default_rng(random_seed)
    shape = (design.num_folds, design.num_arms)
    deviation = math.sqrt(design.of_runs + design.of_clusters)
    moved = math.sqrt(design.of_clusters / design.num_folds)
    true = np.array([points, 0.0] + [-behind] * (design.num_arms - 2))
    said = np.zeros(4)
    for _ in range(num_experiments):
        figures = true + deviation * rng.standard_normal(shape)
        noise = Noise.of_folds(figures, clusters=design.of_clusters)
        draws = figures.mean(0) + noise.draw_runs(num_draws, rng)
        draws += moved * rng.standard_normal(draws.shape)
        minus = draws[:, :1] - draws[:, 1:]
        (low, high), (least, most) = _ends(minus[:, 0]), _ends(minus.min(1))
        said += (low <= points <= high, low > 0, least > 0, most < MARGIN)
    covered, found, holds, refuted = (said / num_experiments).tolist()
    return Rates(covered=covered, found=found, holds=holds, refuted=refuted)


def power_table(
    designs: Mapping[str, Design],
    *,
    points: Sequence[float] = POINTS,
    longer: Sequence[int] = (1, 3),
    num_experiments: int = 1000,
) -> str:
    """Return Markdown: how often, in percent, the rule says what on each data set and on all.

    longer: times the seeds. M3I is better by the points of a column than every other arm, on every
    set.
    """
    head = ["data set", "seeds", "said", *(f"+{each:g}" for each in points)]
    rows = []
    for times in longer:
        every = np.ones((2, len(points)))  # holds, refuted
        for name, design in designs.items():
            each = design.longer(times)
            rates = [simulate(each, p, num_experiments=num_experiments) for p in points]
            told = {
                "one difference above 0": [rate.found for rate in rates],
                "holds": [rate.holds for rate in rates],
                "refuted": [rate.refuted for rate in rates],
            }
            every *= [told["holds"], told["refuted"]]
            seeds = str(each.seeds_a_fold * each.num_folds)
            rows += [[name, seeds, said, *map(_percent, row)] for said, row in told.items()]
        for said, row in zip(("holds", "refuted"), every.tolist(), strict=True):
            rows.append(["all sets", seeds, said, *map(_percent, row)])
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:], ""])


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _ends(draws: Floats) -> tuple[float, float]:
    low, high = np.quantile(draws, _TAILS)
    return float(low), float(high)
