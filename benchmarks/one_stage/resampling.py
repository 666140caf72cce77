"""Draws of the arms' means as another experiment could have them, from one run a seed and arm.

The design. A seed's runs hold one fold of the data out, so clusters are nested in folds, and the
seeds of one fold share its clusters. All arms of a seed share data order, split, initialisation and
held-out clusters. A run's figure is a function of its counts summed over clusters; an arm's mean is
over seeds. Write y[a, f] for the mean figure of arm a over the seeds of fold f:

    y[a, f] = arm[a] + fold[f] + run[a, f] + clusters[a, f],

where fold[f] is the same for all arms and falls out of every difference, run[a, f] is what training
again would change (initialisation, order, and the arm's luck with that training split), and
clusters[a, f] is what other clusters than those drawn for the fold would change.

A draw is the arms' means + clusters + runs.

Clusters: those of each fold are drawn anew with replacement, once for all arms (paired) and all
seeds of that fold (crossed), and the figures are taken of the new sums; what they depart from their
mean over draws is added, so that the bias of a ratio's resampled mean does not move an interval.
C - 1 of C clusters are drawn, which makes the variance unbiased (Rao and Wu 1988). Seeds are not
drawn with replacement as the pigeonhole bootstrap (Owen 2007) does: it sees no spread beyond the
few that there are (`evaluation.statistics.variance_components` says what it covered with three).

Runs: R, the mean square of the residuals y[a, f] - y[a, .] - y[., f] + y[., .], has
df = (A - 1) (F - 1) degrees of freedom and the expectation V_run + V_clusters, pooled over arms.
V_clusters, what drawing clusters makes of the same mean square, is in the draws already. So a
draw takes one value of the whole, R df / chi2_df, less V_clusters, not below 0, and adds
normal noise of that variance, / F, to each arm. Where clusters make no variance, a difference of
two arms is then Student's t with df degrees of freedom, exactly; where they make all of it, the
bootstrap's variance is the least there is. Taking the estimate max(R - V_clusters, 0) first and
multiplying by df / chi2_df covered 94.1 % where this covers 95.3 % (the pilot's components, 3,000
simulated experiments), since then only a part of what R does not know is drawn.
Residuals are taken of the means over a fold's seeds, which are independent, not of each seed: with
three seeds a fold, two thirds of the seeds say nothing new on how folds differ.

What an interval is of. The mean difference of two arms, trained on four fifths of this data set,
over other seeds and other clusters like these. It is not that of another data set: the training
sets of two folds share three quarters of their clusters, so that what the data at hand do to an arm
in all folds is in no residual, and no estimate from one cross-validation is free of that (Bengio
and Grandvalet 2004; Bates, Hastie and Tibshirani 2023). Nadeau and Bengio (2003) would correct
1 / F to 1 / F + 1 / (F - 1), which makes intervals of five folds 1.5 times as wide; that is too
wide where most of what differs between folds is initialisation and order. Pooling assumes that arms
vary alike: if M3I alone varied 1.5 times as much, 95 % would be 93 %.
Legend: A arms, S seeds, F folds, C clusters of a fold, B draws, R rows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from m3i_fast.evaluation.dense.patch_probe import mean_iou
from m3i_fast.evaluation.student_t import student_quantile

Floats = npt.NDArray[np.float64]
Figure = Callable[[Floats], Floats]  # [R, ...] counts summed over clusters -> [R], in points

NUM_DRAWS = 10_000
CONFIDENCE, POWER = 0.95, 0.8
_DRAWS_A_PASS = 500


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClusterCounts:
    """What one run got on the clusters of its held-out fold."""

    cluster: npt.NDArray[np.int64]  # [C], each once
    counts: Floats  # [C, ...], which sum over clusters

    def __post_init__(self) -> None:
        num, counts = len(self.cluster), np.asarray(self.counts)
        if num < 2 or len(np.unique(self.cluster)) != num or len(counts) != num:
            raise ValueError(
                f"cluster: expected two or more, each once, and as many counts, got {num} of "
                f"{len(np.unique(self.cluster))} kinds and {len(counts)} counts"
            )
        if not bool(np.isfinite(counts).all()):
            raise ValueError("counts: expected finite values, got NaN or infinity")

    @classmethod
    def of_hits(
        cls,
        hits: Floats,  # [I] in 0..1
        cluster: npt.NDArray[np.int64],  # [I]
    ) -> ClusterCounts:
        """Count hits and items of each cluster, as `accuracy` takes them."""
        distinct, place = np.unique(cluster, return_inverse=True)
        sums = np.bincount(place, np.asarray(hits, np.float64))
        return cls(cluster=distinct, counts=np.stack([sums, np.bincount(place)], 1))


Runs = Mapping[str, Mapping[int, ClusterCounts]]  # arm -> seed -> counts


@dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """How much a fold's figure of one arm varies beside those of the other arms, in points^2."""

    residual: float
    """Mean square of the residuals over arms and folds: runs and clusters, as estimated."""
    clusters: float
    """The part that drawing clusters anew makes."""
    num_arms: int
    num_folds: int

    @classmethod
    def of_folds(cls, figures: Floats, *, clusters: float) -> Noise:  # [F, A]
        """Estimate it from the figures of folds, each a mean over the seeds of the fold."""
        num_folds, num_arms = figures.shape
        beside = figures - figures.mean(1, keepdims=True) - figures.mean(0) + figures.mean()
        residual = float((beside**2).sum()) / ((num_folds - 1) * (num_arms - 1))
        return cls(residual=residual, clusters=clusters, num_arms=num_arms, num_folds=num_folds)

    @property
    def df(self) -> int:
        """Return the residual's degrees of freedom."""
        return (self.num_arms - 1) * (self.num_folds - 1)

    @property
    def standard_error(self) -> float:
        """Return that of the difference of two arms' means, in points."""
        return math.sqrt(2 * max(self.residual, self.clusters) / self.num_folds)

    @property
    def detectable(self) -> float:
        """Return the difference of two arms that is found with POWER, two-sided, in points."""
        tails = ((1 - CONFIDENCE) / 2, 1 - POWER)
        return self.standard_error * sum(student_quantile(tail, self.df) for tail in tails)

    def draw_runs(self, num_draws: int, rng: np.random.Generator) -> Floats:  # [B, A]
        """Draw what other seeds would add to each arm's mean, beside other clusters."""
        whole = self.residual * self.df / rng.chisquare(self.df, num_draws)
        of_runs = np.maximum(whole - self.clusters, 0.0) / self.num_folds
        return rng.standard_normal((num_draws, self.num_arms)) * np.sqrt(of_runs)[:, None]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ArmDraws:
    """The arms' means over seeds, and draws of them."""

    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    num_clusters: int
    """Over all folds."""
    figures: Floats  # [S, A], of each run
    means: Floats  # [A]
    draws: Floats  # [B, A]
    noise: Noise


def accuracy(counts: Floats) -> Floats:  # [R, 2], hits and items -> [R]
    """Return hits / items in percent."""
    hits, items = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    return 100 * hits / items


def miou(counts: Floats) -> Floats:  # [R, 3, K] of `patch_probe.overlaps` -> [R]
    """Return the mean IoU over classes in percent."""
    return 100 * mean_iou(counts)


def balanced_seeds(runs: Runs) -> tuple[int, ...]:
    """Return the seeds that all arms have run, the first ones of each fold, as many of every fold.

    An experiment under way can be drawn with these.
    """
    shared = sorted(set.intersection(*(set(seeds) for seeds in runs.values())) if runs else ())
    folds = _folds(next(iter(runs.values())), shared) if shared else []
    fewest = min(map(len, folds), default=0)
    return tuple(sorted(seed for fold in folds for seed in fold[:fewest]))


def resample(
    runs: Runs, figure: Figure, *, num_draws: int = NUM_DRAWS, random_seed: int = 0
) -> ArmDraws:
    """Draw the arms' means `num_draws` times, as the module says.

    Raises ValueError unless all arms have the same seeds with the same clusters, as many seeds in
    every fold, two folds and two arms or more, and folds share no cluster.
    """
    arms, seeds, folds = tuple(runs), *_design(runs)
    figures = np.array([[_whole(figure, runs[arm][seed]) for arm in arms] for seed in seeds])
    place = {seed: index for index, seed in enumerate(seeds)}
    of_folds = np.array([figures[[place[seed] for seed in fold]].mean(0) for fold in folds])

    rng = np.random.default_rng(random_seed)
    by_fold = np.stack(  # [F, B, A]
        [_redrawn([[runs[a][s] for a in arms] for s in f], figure, num_draws, rng) for f in folds]
    )
    clusters = float(np.mean([_between_arms(drawn) for drawn in by_fold]))
    noise = Noise.of_folds(of_folds, clusters=clusters)
    moved = by_fold.mean(0)
    means = of_folds.mean(0)
    return ArmDraws(
        arms=arms,
        seeds=seeds,
        num_clusters=sum(len(runs[arms[0]][fold[0]].cluster) for fold in folds),
        figures=figures,
        means=means,
        draws=means + moved - moved.mean(0) + noise.draw_runs(num_draws, rng),
        noise=noise,
    )


# ---- Design --------------------------------------------------------------------------------------


def _design(runs: Runs) -> tuple[tuple[int, ...], list[list[int]]]:
    """Return seeds, and those of each fold."""
    if len(runs) < 2:
        raise ValueError(f"runs: expected two arms or more, got {list(runs)}")
    first, *others = runs.items()
    seeds = tuple(sorted(first[1]))
    for arm, of_seed in others:
        if set(of_seed) != set(seeds):
            raise ValueError(
                f"runs: expected seeds {list(seeds)} of {arm}, as of {first[0]}, got "
                f"{sorted(of_seed)}; `balanced_seeds` says which all arms have"
            )
        for seed in seeds:
            if not np.array_equal(of_seed[seed].cluster, first[1][seed].cluster):
                raise ValueError(
                    f"runs: seed {seed}: {arm} was measured on other clusters than {first[0]}, or "
                    "in another order"
                )
    folds = _folds(first[1], seeds)
    if len(folds) < 2 or len(set(map(len, folds))) > 1:
        raise ValueError(
            f"runs: expected two folds or more with as many seeds each, got seeds {folds} by fold; "
            "`balanced_seeds` says which to take"
        )
    return seeds, folds


def _folds(of_seed: Mapping[int, ClusterCounts], seeds: Sequence[int]) -> list[list[int]]:
    """Return the seeds of each fold; a fold is known by its clusters."""
    folds: dict[bytes, list[int]] = defaultdict(list)
    for seed in seeds:
        folds[np.asarray(of_seed[seed].cluster, np.int64).tobytes()].append(seed)
    ids = np.concatenate([of_seed[fold[0]].cluster for fold in folds.values()])
    if len(np.unique(ids)) < len(ids):
        raise ValueError(
            f"runs: {len(ids) - len(np.unique(ids))} clusters are in more than one fold: expected "
            "every cluster in one"
        )
    return list(folds.values())


# ---- Draws ---------------------------------------------------------------------------------------


def _whole(figure: Figure, run: ClusterCounts) -> float:
    value = float(figure(np.asarray(run.counts, np.float64).sum(0)[None])[0])
    if not math.isfinite(value):
        raise ValueError(f"counts: their figure is {value}: expected a finite one")
    return value


def _redrawn(
    runs: Sequence[Sequence[ClusterCounts]],  # n seeds of one fold, A arms
    figure: Figure,
    num_draws: int,
    rng: np.random.Generator,
) -> Floats:  # [B, A], means over the seeds
    """Return the figures of one fold with its clusters drawn anew."""
    counts = np.array([[run.counts for run in of_seed] for of_seed in runs], np.float64)
    num_seeds, num_arms, num, *rest = counts.shape
    flat = np.moveaxis(counts, 2, 0).reshape(num, -1)
    passes = []
    for start in range(0, num_draws, _DRAWS_A_PASS):
        size = min(_DRAWS_A_PASS, num_draws - start)
        chosen = rng.integers(num, size=(size, num - 1)) + num * np.arange(size)[:, None]
        times = np.bincount(chosen.reshape(-1), minlength=size * num).reshape(size, num)
        sums = (times.astype(np.float64) @ flat).reshape(size * num_seeds * num_arms, *rest)
        passes.append(figure(sums).reshape(size, num_seeds, num_arms).mean(1))
    drawn = np.concatenate(passes)
    if not bool(np.isfinite(drawn).all()):
        raise ValueError("figure: expected finite values of redrawn clusters, got NaN or infinity")
    return drawn


def _between_arms(drawn: Floats) -> float:  # [B, A]
    """Return the variance of what draws do to an arm beside the others, over A - 1."""
    apart = drawn - drawn.mean(1, keepdims=True)
    return float(apart.var(0, ddof=1).sum()) / (drawn.shape[1] - 1)
