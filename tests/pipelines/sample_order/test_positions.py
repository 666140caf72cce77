"""The order of samples in closed form: permutations, mixtures, and steps of several ranks."""

from __future__ import annotations

import itertools
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from m3i_fast.pipelines.sample_order.positions import Mixture, StepLayout, shuffled

BIG = 10**7


def epoch(size: int, *, number: int = 0, seed: int = 1, dataset: int = 0) -> np.ndarray:
    start = number * size
    return shuffled(np.arange(start, start + size), size=size, seed=seed, dataset=dataset)


# ---- Permutations --------------------------------------------------------------------------------


# Of sets that are sorted, and of those on a rectangle: whole ones, and by one sample more and less.
SIZES = [*range(1, 301), 1023, 1024, 1025, 1026, 1056, 1089, 1090, 4095, 4096, 4097, 10_007]


def test_every_epoch_is_a_permutation() -> None:
    for size in SIZES:
        for number in (0, 1, 10**9):
            assert (np.sort(epoch(size, number=number)) == np.arange(size)).all(), (size, number)


def test_a_sample_of_a_large_set_stands_at_one_position() -> None:
    """200,000 positions of ten million, and all that lead to a sample: none is met twice."""
    positions = np.random.default_rng(0).choice(BIG, 200_000, replace=False)
    found = shuffled(positions, size=BIG, seed=5)
    assert len(np.unique(found)) == len(found)
    assert found.min() >= 0 and found.max() < BIG
    assert stats.kstest(found / BIG, "uniform").pvalue > 1e-3


def test_a_large_sets_places_are_as_likely() -> None:
    """Over 40,000 epochs: the first two samples of each, in 8 x 8 parts of the set."""
    size, count = 1030, 40_000
    starts = size * np.arange(count)
    first, second = (shuffled(starts + i, size=size, seed=3) * 8 // size for i in (0, 1))
    assert stats.chisquare(np.bincount(first * 8 + second, minlength=64)).pvalue > 1e-3


@pytest.mark.nightly
def test_ten_million_samples_are_permuted() -> None:
    seen = np.zeros(BIG, bool)
    for start in range(0, BIG, 10**6):
        seen[shuffled(np.arange(start, start + 10**6), size=BIG, seed=5)] = True
    assert seen.all()


def test_a_billion_samples_need_no_memory() -> None:
    positions = np.arange(3 * 10**9 - 128, 3 * 10**9 + 128)
    tracemalloc.start()
    found = shuffled(positions, size=10**9, seed=2)
    mixture = Mixture((10**9, 7), (0.9, 0.1))
    mixture.samples(positions, seed=2, images_per_input=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert found.max() < 10**9 and len(np.unique(found[:128])) == 128


def test_epochs_seeds_and_data_sets_differ() -> None:
    """As often equal as two drawn orders are: a sample in `size` on average."""
    size = 5000
    orders = [
        epoch(size),
        epoch(size, number=1),
        epoch(size, number=2**31),
        epoch(size, seed=2),
        epoch(size, seed=1 + 2**63),
        epoch(size, dataset=1),
        np.arange(size),
    ]
    for first, second in itertools.combinations(orders, 2):
        assert (first == second).sum() < 12
    # Neighbours of an order are no neighbours in the data set.
    assert (np.abs(np.diff(orders[0])) == 1).sum() < 12


@pytest.mark.parametrize("size", [3, 4, 5])
def test_all_orders_of_a_few_samples_are_as_likely(size: int) -> None:
    """Over 12,000 epochs and over 12,000 seeds, by chi-square beside NumPy's permutations."""
    count = 12_000
    by_epoch = shuffled(np.arange(size * count), size=size, seed=11).reshape(count, size)
    by_seed = np.stack([epoch(size, seed=seed) for seed in range(count)])
    rng = np.random.default_rng(0)
    numpys = np.stack([rng.permutation(size) for _ in range(count)])
    orders = {order: i for i, order in enumerate(itertools.permutations(range(size)))}
    for sample in (by_epoch, by_seed, numpys):
        found = np.bincount([orders[tuple(row)] for row in sample.tolist()], minlength=len(orders))
        assert stats.chisquare(found).pvalue > 1e-3


def test_the_order_does_not_change() -> None:
    """A change of these is another run from the same seed: raise ORDER_VERSION with it."""
    assert epoch(10, seed=7).tolist() == GOLDEN
    assert shuffled(np.array([3 * 10**9]), size=10**9, seed=7, dataset=2).tolist() == GOLDEN_LARGE


GOLDEN = [3, 7, 1, 6, 4, 0, 9, 5, 8, 2]
GOLDEN_LARGE = [261561586]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="size: expected at least 1 sample, got 0"):
        shuffled(np.arange(3), size=0, seed=0)
    with pytest.raises(ValueError, match="positions: expected 0 or more, got -2"):
        shuffled(np.array([1, -2]), size=3, seed=0)
    with pytest.raises(ValueError, match="seed: expected 0 to"):
        shuffled(np.arange(3), size=3, seed=2**64)


# ---- Mixtures ------------------------------------------------------------------------------------

WEIGHTS = [
    (1.0,),
    (0.5, 0.5),
    (0.9, 0.1),
    (3.0, 1.0, 1.0),
    (0.123, 0.234, 0.005, 0.31, 0.1, 0.2, 0.028),
    (0.7071, 0.31831, 0.1234567, 0.000321, 2.718281828, 0.0577, 0.6931),
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_counts_stay_within_one_of_the_weights(weights: tuple[float, ...]) -> None:
    """At every group of a period and into the next, in whole numbers."""
    mixture = Mixture((100,) * len(weights), weights)
    length = sum(mixture.shares)
    datasets, before = mixture.at(np.arange(length + length // 3 + 5))
    counts = np.cumsum(datasets[:, None] == np.arange(len(weights)), axis=0)
    due = np.arange(1, len(datasets) + 1)[:, None] * np.array(mixture.shares)
    assert np.abs(counts * length - due).max() <= length
    assert (before == counts[np.arange(len(datasets)), datasets] - 1).all()


def test_weights_are_exact_where_they_are_fractions_of_65536() -> None:
    assert Mixture((9, 9, 9), (3, 1, 1)).shares == (3, 1, 1)
    assert Mixture((9, 9), (0.1, 0.2)).shares == (1, 2)
    mixture = Mixture((9,) * 7, WEIGHTS[-1])
    exact = [Fraction(str(weight)) for weight in WEIGHTS[-1]]
    for share, weight in zip(mixture.shares, exact, strict=True):
        assert abs(Fraction(share, sum(mixture.shares)) - weight / sum(exact)) < 2**-16


def test_each_data_set_is_passed_over_in_its_own_order() -> None:
    """Group by group, of one data set each; the next turn takes its next samples."""
    sizes, images = (50, 7), 2
    mixture = Mixture(sizes, (0.8, 0.2))
    datasets, samples = mixture.samples(np.arange(2000), seed=3, images_per_input=images)
    assert (datasets[::2] == datasets[1::2]).all()
    for d, size in enumerate(sizes):
        own = samples[datasets == d]
        assert (own == shuffled(np.arange(len(own)), size=size, seed=3, dataset=d)).all()
    again = mixture.samples(np.arange(777, 900), seed=3, images_per_input=images)
    assert (again[0] == datasets[777:900]).all() and (again[1] == samples[777:900]).all()


def test_mixtures_that_cannot_be_are_refused() -> None:
    for sizes, weights in (((3,), (1.0, 1.0)), ((), ())):
        with pytest.raises(ValueError, match="weights: expected one for each of"):
            Mixture(sizes, weights)
    with pytest.raises(ValueError, match="weights: expected finite numbers above 0"):
        Mixture((3, 3), (1.0, 0.0))
    with pytest.raises(ValueError, match="sizes: expected finite numbers above 0"):
        Mixture((3, 0), (1.0, 1.0))


# ---- Steps ---------------------------------------------------------------------------------------

SPLITS = [(1, 32, 1), (2, 16, 1), (4, 8, 1), (8, 4, 1), (2, 8, 2), (1, 8, 4)]


@pytest.mark.parametrize("images", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 32, 12, 4 * 10**9 + 4])
def test_every_split_of_a_step_has_the_same_whole_groups(images: int, start: int) -> None:
    """Also from a start that is no multiple of the step, as after another whole batch."""
    for ranks, size, accumulate in SPLITS:
        layout = StepLayout(
            batch_size=size, num_ranks=ranks, accumulate=accumulate, images_per_input=images
        )
        assert layout.samples_a_step == 32
        taken = []
        for rank in range(ranks):
            own = [layout.positions(start, rank, batch) for batch in range(accumulate)]
            assert (np.diff(np.concatenate(own)) > 0).all()
            taken += own
        for batch in taken:
            groups = batch.reshape(-1, images)
            assert (groups == groups[:, :1] + np.arange(images)).all()
            assert (groups[:, 0] % images == 0).all()
        for rank, own in enumerate(np.split(np.concatenate(taken), ranks)):
            assert (own // images % ranks == rank).all()
        assert sorted(np.concatenate(taken).tolist()) == list(range(start, start + 32))


def test_layouts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size: expected a multiple of images_per_input = 2"):
        StepLayout(batch_size=3, images_per_input=2)
    with pytest.raises(ValueError, match="num_ranks: expected at least 1, got 0"):
        StepLayout(batch_size=3, num_ranks=0)
    layout = StepLayout(batch_size=4, num_ranks=2, images_per_input=2)
    with pytest.raises(ValueError, match="start: expected a multiple of 2, got 3"):
        layout.positions(3, 0)
    with pytest.raises(ValueError, match="rank: expected 0 to 1, got 2"):
        layout.positions(0, 2)
    with pytest.raises(ValueError, match="batch: expected 0 to 0, got 1"):
        layout.positions(0, 0, 1)
