"""A few samples of a rate in seven figures: how the middle lies, how wide they spread, how sure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

LEVEL = 0.95
NUM_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """The median of samples and its intervals, in their unit."""

    median: float
    p5: float
    p95: float
    mean: float
    ci_low: float
    """Of the 95 % interval of the median."""
    ci_high: float
    num_samples: int


def summarise_rates(samples: Sequence[float]) -> Rates:
    """Return percentiles by linear interpolation, and the median's percentile bootstrap interval.

    It cannot reach beyond the samples: of three it is their range, which holds the median of what
    they were drawn from three times out of four; from about ten on it holds what it says. The same
    samples give the same interval. Raises ValueError for no samples, or not finite ones.
    """
    if not samples or not all(map(math.isfinite, samples)):
        raise ValueError(f"samples: expected at least one, all finite, got {list(samples)}")
    values = torch.tensor(samples, dtype=torch.float64)  # [N]
    p5, median, p95 = _quantiles(values, 0.05, 0.5, 0.95)
    low, high = interval(resampled_medians(samples, torch.Generator().manual_seed(0)))
    return Rates(
        median=median,
        p5=p5,
        p95=p95,
        mean=values.mean().item(),
        ci_low=low,
        ci_high=high,
        num_samples=len(samples),
    )


def resampled_medians(
    samples: Sequence[float],
    rng: torch.Generator,
) -> torch.Tensor:  # [NUM_RESAMPLES] fp64
    """Draw the samples anew, as many with replacement, NUM_RESAMPLES times; the median of each."""
    values, size = torch.tensor(samples, dtype=torch.float64), len(samples)
    drawn = values[torch.randint(size, (NUM_RESAMPLES, size), generator=rng)].sort(dim=1).values
    return (drawn[:, (size - 1) // 2] + drawn[:, size // 2]) / 2


def interval(
    resampled: torch.Tensor,  # [NUM_RESAMPLES] fp64
) -> tuple[float, float]:
    """Return the ends of the percentile bootstrap's interval, of probability LEVEL."""
    low, high = _quantiles(resampled, (1 - LEVEL) / 2, (1 + LEVEL) / 2)
    return low, high


def _quantiles(
    values: torch.Tensor,  # [N] fp64
    *which: float,
) -> list[float]:
    quantiles: list[float] = values.quantile(torch.tensor(which, dtype=torch.float64)).tolist()
    return quantiles
