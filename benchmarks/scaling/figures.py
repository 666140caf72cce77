"""What follows from rates of several numbers of ranks: efficiency, shares, serial fraction."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from m3i_fast.benchmarks.core.rate_statistics import interval, resampled_medians


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """A ratio of two medians, with the 95 % interval of a percentile bootstrap of both."""

    value: float
    ci_low: float
    ci_high: float


def ratio(above: Sequence[float], below: Sequence[float], *, seed: int = 0) -> Ratio:
    """Return median(above) / median(below). Raises ValueError where either has no sample."""
    if not above or not below:
        raise ValueError(f"samples: expected some of each, got {len(above)} and {len(below)}")
    rng = torch.Generator().manual_seed(seed)
    low, high = interval(resampled_medians(above, rng) / resampled_medians(below, rng))
    value = statistics.median(above) / statistics.median(below)
    return Ratio(value=value, ci_low=low, ci_high=high)


def efficiency(
    images_s: Sequence[float], one_images_s: Sequence[float], *, num_ranks: int
) -> Ratio:
    """Return E(n) = T(n) / (n T(1)), T the rate of all ranks; of one rank it is 1."""
    if num_ranks == 1:
        return Ratio(value=1.0, ci_low=1.0, ci_high=1.0)
    share = ratio(images_s, one_images_s)
    return Ratio(
        value=share.value / num_ranks,
        ci_low=share.ci_low / num_ranks,
        ci_high=share.ci_high / num_ranks,
    )


def serial_fraction(of_efficiency: float, num_ranks: int) -> float | None:
    """Karp and Flatt's: (1/S - 1/n) / (1 - 1/n) of the speed-up S = n E; None of one rank.

    The share of the work that would have to be serial for such a speed-up. Where it grows with n it
    is not serial work but communication or contention that costs; below 0, n ranks are more than n
    times as fast.
    """
    if num_ranks == 1:
        return None
    return (1 / of_efficiency - 1) / (num_ranks - 1)


def share_lost(with_it: Sequence[float], without: Sequence[float]) -> Ratio:
    """Return 1 - without / with: the share of a step that a part takes, of seconds of both."""
    factor = ratio(without, with_it)
    return Ratio(value=1 - factor.value, ci_low=1 - factor.ci_high, ci_high=1 - factor.ci_low)
