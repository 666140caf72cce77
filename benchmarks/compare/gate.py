"""Whether one version is slower than another, from samples of both. Pure statistics.

A difference is an alarm where all of this holds:

- the interval of the ratio lies wholly beyond the smallest difference that counts, on either side:
  what became too fast wants its baseline refreshed;
- Mann-Whitney's test tells the samples apart.

The interval is a percentile bootstrap made for times on a busy machine. Samples come in groups, one
a pair of processes: groups are drawn with replacement, since a process may be a little faster than
another of the same code all its life, and within a group circular blocks of neighbouring samples,
since what slows down one sample mostly slows down the next. Where samples of both versions were
taken in turns, the ratio is the median over neighbours, one of each version: a machine that runs
now fast, now slow does so to both, while the medians of all samples jump between the two speeds.

How many samples a busy machine needs is not known before. So `judge_in_looks` goes on while the
interval neither clears nor keeps within the smallest difference that counts, a group-sequential
design; its looks share alpha (Bonferroni), so that looking often does not alarm often.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Samples = Sequence[float]
Floats = npt.NDArray[np.float64]
Alarm = Literal["slower", "faster"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on a candidate against its baseline, in time a call."""

    ratio: float
    """Of the candidate over the baseline, of medians or of neighbours: above one is slower."""
    low: float
    high: float
    """The interval of the ratio at 1 - alpha."""
    p_value: float
    """Mann-Whitney's, two-sided."""
    alarm: Alarm | None
    settled: bool
    """Whether the interval lies wholly on one side of each difference that counts; more samples
    would hardly change what is said."""
    num_groups: int
    """Of each version."""


def judge(
    baseline: Sequence[Samples],
    candidate: Sequence[Samples],
    *,
    alpha: float = 0.01,
    threshold: float = 0.05,
    in_turns: bool = True,
    num_resamples: int = 4000,
    seed: int = 0,
) -> Verdict:
    """Compare groups of samples, each in the order in which they were taken.

    in_turns: sample i of group g of both was taken at the same time; then both have as many groups
    and samples. All groups of a version are of one size. threshold: the smallest difference that
    counts, as a share. ValueError for anything else.
    """
    _check(baseline, candidate, alpha, threshold, in_turns)
    of_baseline = [np.asarray(group, np.float64) for group in baseline]
    of_candidate = [np.asarray(group, np.float64) for group in candidate]
    all_baseline, all_candidate = np.concatenate(of_baseline), np.concatenate(of_candidate)
    low, high = ratio_interval(
        of_baseline,
        of_candidate,
        alpha=alpha,
        in_turns=in_turns,
        num_resamples=num_resamples,
        seed=seed,
    )
    p_value = mann_whitney(all_baseline, all_candidate)
    too_slow, too_fast = 1 + threshold, 1 / (1 + threshold)
    alarm: Alarm | None = None
    if p_value < alpha and low > too_slow:
        alarm = "slower"
    elif p_value < alpha and high < too_fast:
        alarm = "faster"
    ratio = float(
        np.median(all_candidate / all_baseline)
        if in_turns
        else np.median(all_candidate) / np.median(all_baseline)
    )
    settled = alarm is not None or (too_fast < low and high < too_slow)
    return Verdict(ratio, low, high, p_value, alarm, settled, len(baseline))


def judge_in_looks(
    take: Callable[[], Sequence[Sequence[Samples]]],
    *,
    looks: int,
    alpha: float = 0.01,
    threshold: float = 0.05,
    num_resamples: int = 4000,
    seed: int = 0,
) -> Verdict:
    """Judge all groups that `take` has given so far, until settled or so many looks.

    take: new groups of the baseline and of the candidate, in turns. Each look has alpha / looks.
    """
    if looks < 1:
        raise ValueError(f"looks: expected at least 1, got {looks}")
    baseline: list[Samples] = []
    candidate: list[Samples] = []
    for _ in range(looks):
        for groups, new in zip((baseline, candidate), take(), strict=True):
            groups.extend(new)
        verdict = judge(
            baseline,
            candidate,
            alpha=alpha / looks,
            threshold=threshold,
            num_resamples=num_resamples,
            seed=seed,
        )
        if verdict.settled:
            break
    return verdict


def _check(
    baseline: Sequence[Samples],
    candidate: Sequence[Samples],
    alpha: float,
    threshold: float,
    in_turns: bool,
) -> None:
    if not 0 < alpha < 1:
        raise ValueError(f"alpha: expected a probability between 0 and 1, got {alpha}")
    if threshold < 0:
        raise ValueError(f"threshold: expected at least 0, got {threshold}")
    for name, groups in (("baseline", baseline), ("candidate", candidate)):
        if not groups or not all(len(group) for group in groups):
            raise ValueError(f"{name}: expected groups of at least one sample each")
        if not all(math.isfinite(x) and x > 0 for group in groups for x in group):
            raise ValueError(f"{name}: expected times above 0")
        if len({len(group) for group in groups}) > 1:
            raise ValueError(f"{name}: expected groups of one size")
    sizes = [[len(group) for group in groups] for groups in (baseline, candidate)]
    if in_turns and sizes[0] != sizes[1]:
        raise ValueError(f"candidate: expected groups of {sizes[0]} samples, got {sizes[1]}")


# ---- The interval --------------------------------------------------------------------------------


def ratio_interval(
    baseline: Sequence[Floats],
    candidate: Sequence[Floats],
    *,
    alpha: float,
    in_turns: bool,
    num_resamples: int,
    seed: int,
    block: int | None = None,
) -> tuple[float, float]:
    """Return the ratio's percentile interval at 1 - alpha; `block` as `block_length` gives it."""
    rng = np.random.default_rng(seed)
    before, after = np.stack(baseline), np.stack(candidate)
    ratios = []
    for count in _parts(num_resamples, 200):  # one matrix of all would be large
        if in_turns:
            ratios.append(_medians(after / before, rng, count, block))
        else:
            below = _medians(before, rng, count, block)
            ratios.append(_medians(after, rng, count, block) / below)
    low, high = np.quantile(np.concatenate(ratios), [alpha / 2, 1 - alpha / 2])
    return float(low), float(high)


def _parts(total: int, most: int) -> list[int]:
    return [min(most, total - begin) for begin in range(0, total, most)]


def _medians(groups: Floats, rng: np.random.Generator, count: int, block: int | None) -> Floats:
    """Of `count` resamples: as many groups with replacement, of each its samples in blocks.

    groups: (groups, samples).
    """
    num_groups, size = groups.shape
    length = block or block_length(size)
    chosen = rng.integers(num_groups, size=(count, num_groups))
    starts = rng.integers(size, size=(count, num_groups, -(-size // length)))
    places = (starts[..., None] + np.arange(length)).reshape(count, num_groups, -1)[..., :size]
    drawn = groups[chosen[..., None], places % size]
    return np.asarray(np.median(drawn.reshape(count, -1), axis=1, overwrite_input=True))


def block_length(num_samples: int) -> int:
    """Return the length of blocks of neighbours, of the order that is best for a variance.

    Twice that: single cube roots leave intervals too narrow where noise has a memory of a few
    samples, and longer blocks cost little.
    """
    return max(1, min(round(2 * num_samples ** (1 / 3)), num_samples // 4))


# ---- Mann and Whitney's test ---------------------------------------------------------------------


def mann_whitney(a: Floats, b: Floats) -> float:
    """Return the two-sided p-value by the normal approximation, ties and continuity corrected."""
    count_a, count_b = len(a), len(b)
    total = count_a + count_b
    _, place, ties = np.unique(np.concatenate([a, b]), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(ties) - (ties - 1) / 2)[place]
    u = ranks[:count_a].sum() - count_a * (count_a + 1) / 2
    mean = count_a * count_b / 2
    spread = (total + 1) - (ties.astype(np.float64) ** 3 - ties).sum() / (total * (total - 1))
    deviation = math.sqrt(count_a * count_b / 12 * spread)
    if not deviation:  # all samples are equal
        return 1.0
    z = max(abs(u - mean) - 0.5, 0.0) / deviation
    return math.erfc(z / math.sqrt(2))
