"""The order of a mixture of which data sets lie in object storage: shares, epochs, lanes, ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3i_fast.pipelines.sample_order.lane_turns import EveryTurn, LaneTurns, MixedTurns
from m3i_fast.pipelines.sample_order.lanes import CLUMP_SAMPLES, LaneOrder
from m3i_fast.pipelines.sample_order.positions import Mixture, shuffled
from m3i_fast.pipelines.storage.clumps import needed_bytes

WEIGHTS = [
    (1.0,),
    (0.5, 0.5),
    (0.7, 0.3),
    (3.0, 1.0, 1.0),
    (0.6, 0.39, 0.01),
    (0.123, 0.234, 0.643),
]
SHARDS = ([300, 300, 50], [129] * 5, [7])


def order_of(
    shards: Sequence[Sequence[int]],
    weights: tuple[float, ...],
    dataset: int,
    *,
    images: int = 1,
    lanes: int = 8,
    window: int = 1,
    seed: int = 3,
) -> tuple[Mixture, LaneOrder]:
    mixture = Mixture(tuple(map(sum, shards)), weights)
    order = LaneOrder(
        shards[dataset],
        seed=seed,
        lanes=lanes,
        window=window,
        images_per_input=images,
        mixture=mixture,
        dataset=dataset,
    )
    return mixture, order


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("lanes", [1, 6, 8, 24])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_what_a_lane_has_is_what_counting_finds(
    weights: tuple[float, ...], lanes: int, images: int
) -> None:
    """Positions of every data set one by one, over periods of the weights that lanes do not fit."""
    mixture = Mixture((100,) * len(weights), weights)
    run = np.arange(images * 3_000)
    datasets, own = mixture.own_positions(run, images_per_input=images)
    for d in range(len(weights)):
        turns = MixedTurns(mixture, d, lanes, images)
        here = datasets == d
        assert (own[here] == np.arange(here.sum())).all()
        expected = run[here] // images % lanes  # lane(g) = g mod L, whatever the data set
        assert (turns.lane_of(own[here]) == expected).all()
        counts = np.zeros((here.sum() + 1, lanes), np.int64)
        np.cumsum(expected[:, None] == np.arange(lanes), axis=0, out=counts[1:])
        for lane in range(lanes):
            below = np.arange(here.sum())
            found = turns.of_lane(below, np.full(len(below), lane))
            assert (found == counts[:-1, lane]).all()
        for below in (0, 1, 5, int(here.sum()) - 1):
            assert turns.before_lanes(below).tolist() == [0, *np.cumsum(counts[below]).tolist()]


def test_one_data_set_has_the_lanes_that_it_has_alone() -> None:
    alone: LaneTurns = EveryTurn(24, 2)
    mixed = MixedTurns(Mixture((9,), (1.0,)), 0, 24, 2)
    positions = np.arange(5_000)
    lanes = alone.lane_of(positions)
    assert (mixed.lane_of(positions) == lanes).all()
    assert (mixed.of_lane(positions, lanes) == alone.of_lane(positions, lanes)).all()
    for below in (0, 1, 47, 48, 4_999):
        assert (mixed.before_lanes(below) == alone.before_lanes(below)).all()
    assert (mixed.density == 1).all() and (alone.density == 1).all()


@settings(max_examples=60, deadline=None)
@given(
    shards=st.lists(st.lists(st.integers(1, 400), min_size=1, max_size=6), min_size=1, max_size=4),
    weights=st.lists(st.integers(1, 300), min_size=4, max_size=4),
    lanes=st.sampled_from([1, 2, 3, 8, 64, 240]),
    window=st.integers(1, 3),
    images=st.integers(1, 4),
    start=st.integers(0, 10**9),
)
def test_shares_and_epochs_are_exact(
    shards: list[list[int]], weights: list[int], lanes: int, window: int, images: int, start: int
) -> None:
    """After every group each data set is within 1 of its share of all, and none repeats a sample
    before it has passed over all of them."""
    shares = tuple(map(float, weights[: len(shards)]))
    mixture = Mixture(tuple(map(sum, shards)), shares)
    orders = {}
    for d, sizes in enumerate(shards):
        order = LaneOrder(
            sizes,
            seed=7,
            lanes=lanes,
            window=window,
            images_per_input=images,
            mixture=mixture,
            dataset=d,
        )
        orders[d] = order.samples
        epoch = start % 10**6 * order.clumps.num_samples
        found = order.samples(epoch + np.arange(order.clumps.num_samples))
        assert (np.sort(found) == np.arange(order.clumps.num_samples)).all()
    positions = np.arange(400 * images)
    datasets, samples = mixture.samples(positions, seed=7, images_per_input=images, orders=orders)
    groups = datasets.reshape(-1, images)
    assert (groups == groups[:, :1]).all()
    counts = np.cumsum(groups[:, :1] == np.arange(len(shards)), axis=0)
    due = np.arange(1, 401)[:, None] * np.array(mixture.shares)
    assert np.abs(counts * sum(mixture.shares) - due).max() <= sum(mixture.shares)
    for d, order in orders.items():
        own = samples[datasets == d]
        assert (own == order(np.arange(len(own)))).all()


def test_folders_and_buckets_have_their_own_order_in_one_mixture() -> None:
    """A data set in a folder is shuffled as a whole, as where all of them are."""
    weights, images = (0.6, 0.3, 0.1), 2
    mixture, order = order_of(SHARDS, weights, 1, images=images)
    positions = np.arange(6_000)
    datasets, samples = mixture.samples(
        positions, seed=3, images_per_input=images, orders={1: order.samples}
    )
    plain, local = mixture.samples(positions, seed=3, images_per_input=images)
    assert (datasets == plain).all()
    for d in (0, 2):
        assert (samples[datasets == d] == local[datasets == d]).all()
    _, own = mixture.own_positions(positions, images_per_input=images)
    here = datasets == 1
    assert (samples[here] == order.samples(own[here])).all()
    assert (samples[here] != shuffled(own[here], size=645, seed=3, dataset=1)).any()


def test_any_single_position_equals_the_stream() -> None:
    """Where a run goes on nothing depends on what came before."""
    weights = (0.6, 0.39, 0.01)
    _, order = order_of(SHARDS, weights, 1, images=2, lanes=24, window=2)
    whole = order.samples(np.arange(4_000))
    rng = np.random.default_rng(0)
    for position in rng.integers(0, 4_000, 100):
        _, fresh = order_of(SHARDS, weights, 1, images=2, lanes=24, window=2)
        assert fresh.samples(np.array([position]))[0] == whole[position]


@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.123, 0.877)])
def test_a_lane_reads_one_window_after_the_other(weights: tuple[float, float]) -> None:
    """So that what a rank holds open is bounded, of every data set."""
    sizes, lanes, window = [1_000] * 20, 24, 2
    for d in (0, 1):
        mixture, order = order_of((sizes, sizes), weights, d, lanes=lanes, window=window)
        positions = np.arange(sum(sizes))
        _, first, _ = order.clumps.around(order.samples(positions))
        lane_of = order.lane_of(positions)
        density = order.turns.density
        assert (np.unique(lane_of) == np.flatnonzero(density)).all()
        for lane in np.unique(lane_of):
            own = first[lane_of == lane]
            turns = {clump: np.flatnonzero(own == clump) for clump in np.unique(own)}
            spans = [(int(turn[0]), int(turn[-1])) for turn in turns.values()]
            open_at = [sum(begin <= at <= end for begin, end in spans) for at in range(len(own))]
            assert max(open_at) == window
            assert all(end - begin < window * CLUMP_SAMPLES for begin, end in spans)
        share = mixture.shares[d] / sum(mixture.shares)
        assert density.mean() == pytest.approx(share, abs=1e-12)


def test_data_sets_of_the_same_sizes_have_different_orders() -> None:
    sizes = [640] * 8
    positions = np.arange(sum(sizes))
    alone = LaneOrder(sizes, seed=3, lanes=8).samples(positions)
    orders = [alone]
    for d in (0, 1):
        _, order = order_of((sizes, sizes), (0.5, 0.5), d)
        orders.append(order.samples(positions))
    _, other = order_of((sizes, sizes), (0.5, 0.5), 0, seed=4)
    orders.append(other.samples(positions))
    for i, one in enumerate(orders):
        for before in orders[:i]:
            assert (one == before).mean() < 0.01


def test_room_is_counted_for_the_lanes_that_a_data_set_has() -> None:
    """Two halves need together what one data set alone does: each lane has one of them."""
    counts, num_bytes = [1_280] * 1_000, [1_280 * 110_000] * 1_000  # 14 MB a clump

    def needed(density: np.ndarray, num_ranks: int) -> np.ndarray:
        return needed_bytes(
            counts, num_bytes, density=density, window=1, num_ranks=num_ranks, passing=1_280
        )

    halves = [order_of((counts, counts), (0.5, 0.5), d, lanes=240)[1].turns.density for d in (0, 1)]
    for num_ranks in (1, 3, 8):
        both = sum(needed(density, num_ranks) for density in halves)
        assert (both == needed(np.ones(240), num_ranks)).all()
    # Of a weight that no lane is all of, each lane holds a window for either.
    mixed = [
        order_of((counts, counts), (0.123, 0.877), d, lanes=240)[1].turns.density for d in (0, 1)
    ]
    assert all((density > 0).all() for density in mixed)
    clump = 128 * 110_000
    assert (sum(needed(density, 8) for density in mixed) == (2 * 30 + 2 + 9) * clump).all()
