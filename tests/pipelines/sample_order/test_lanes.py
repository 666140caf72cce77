"""The order for object storage: exact epochs, whatever the shards, ranks, batches and resumes."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3i_fast.pipelines.sample_order.lanes import CLUMP_SAMPLES, Clumps, LaneOrder, default_lanes
from m3i_fast.pipelines.sample_order.positions import StepLayout


def odd_shards(num_samples: int, seed: int) -> list[int]:
    """Cut a number of samples into shards of odd sizes, some longer than two clumps."""
    rng = np.random.default_rng(seed)
    sizes: list[int] = []
    while (left := num_samples - sum(sizes)) > 0:
        sizes.append(min(int(rng.choice([1, 3, 7, 50, 127, 128, 129, 300])), left))
    return sizes


def test_every_epoch_has_every_sample_once() -> None:
    for num_samples in range(1, 301):
        order = LaneOrder(
            odd_shards(num_samples, num_samples),
            seed=num_samples,
            lanes=(1, 2, 8, 24, 64)[num_samples % 5],
            window=1 + num_samples % 3,
            images_per_input=1 + num_samples % 4,
        )
        found = order.samples(np.arange(3 * num_samples)).reshape(3, num_samples)
        assert (np.sort(found, axis=1) == np.arange(num_samples)).all(), num_samples


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 700), min_size=1, max_size=20),
    lanes=st.sampled_from([1, 2, 3, 8, 64, 240]),
    window=st.integers(1, 5),
    images=st.integers(1, 4),
    epoch=st.integers(0, 10**6),
)
def test_any_epoch_of_any_shards_is_exact(
    sizes: list[int], lanes: int, window: int, images: int, epoch: int
) -> None:
    order = LaneOrder(sizes, seed=7, lanes=lanes, window=window, images_per_input=images)
    size = sum(sizes)
    found = order.samples(epoch * size + np.arange(size))
    assert (np.sort(found) == np.arange(size)).all()


@pytest.mark.parametrize("images", [1, 2])
def test_ranks_batches_and_resumes_have_one_stream(images: int) -> None:
    sizes = odd_shards(2_999, 1)
    make = lambda: LaneOrder(sizes, seed=3, lanes=64, window=2, images_per_input=images)  # noqa: E731
    whole = make().samples(np.arange(8_192))
    for num_ranks in (1, 2, 4, 8):
        order = make()
        order.check_ranks(num_ranks)
        for start in (0, 2 * 1_024 + images * 3):  # the second is a resume in the middle
            for batch, accumulate in ((32 // num_ranks, 1), (8, 2)):
                layout = StepLayout(
                    batch_size=batch * images,
                    num_ranks=num_ranks,
                    accumulate=accumulate,
                    images_per_input=images,
                )
                at = start
                for _ in range(20):
                    for rank in range(num_ranks):
                        for part in range(accumulate):
                            positions = layout.positions(at, rank, part)
                            assert (order.lane_of(positions) % num_ranks == rank).all()
                            assert (order.samples(positions) == whole[positions]).all()
                    at += layout.samples_a_step


def test_any_single_position_equals_the_stream() -> None:
    """A window is known whole from any of its samples: nothing depends on what came before."""
    sizes = odd_shards(1_500, 5)
    whole = LaneOrder(sizes, seed=1, lanes=24, window=3).samples(np.arange(4_000))
    rng = np.random.default_rng(0)
    for position in rng.integers(0, 4_000, 200):
        fresh = LaneOrder(sizes, seed=1, lanes=24, window=3)
        assert fresh.samples(np.array([position]))[0] == whole[position]
    order = LaneOrder(sizes, seed=1, lanes=24, window=3)
    some = rng.permutation(4_000).reshape(-1, 100)  # out of order: the cache of windows changes
    assert (order.samples(some) == whole[some]).all()


def test_a_lane_reads_one_window_after_the_other() -> None:
    sizes, lanes, window = [1_000] * 40, 24, 2
    order = LaneOrder(sizes, seed=0, lanes=lanes, window=window)
    positions = np.arange(sum(sizes))
    _, first, _ = order.clumps.around(order.samples(positions))
    for lane in range(lanes):
        own = first[order.lane_of(positions) == lane]
        turns = {clump: np.flatnonzero(own == clump) for clump in np.unique(own)}
        spans = sorted((int(turn[0]), int(turn[-1])) for turn in turns.values())
        open_at = [sum(begin <= at <= end for begin, end in spans) for at in range(len(own))]
        assert max(open_at) == window
        assert all(end - begin < window * CLUMP_SAMPLES for begin, end in spans)


def test_orders_differ_by_epoch_and_seed_and_mix_clumps_and_samples() -> None:
    sizes = [640] * 64
    size = sum(sizes)

    def of(epoch: int = 0, **other: int) -> np.ndarray:
        order = LaneOrder(sizes, lanes=8, **{"seed": 1, **other})
        return order.samples(epoch * size + np.arange(size))

    orders = [of(), of(1), of(seed=2), of(window=2)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).mean() < 0.01
    order = LaneOrder(sizes, seed=1, lanes=8)
    first = order.samples(size * np.arange(400))  # which sample stands first, by epoch
    clumps, within = np.divmod(first, CLUMP_SAMPLES)
    for values, most in ((clumps, len(Clumps(sizes))), (within, CLUMP_SAMPLES)):
        counts = np.histogram(values, bins=8, range=(0, most))[0]  # 50 each; chi2 of 7: 29 at 1e-4
        assert ((counts - 50) ** 2 / 50).sum() < 29


def test_short_clumps_are_spread_over_the_epoch() -> None:
    sizes = [130] * 200
    order = LaneOrder(sizes, seed=0, lanes=1)
    _, first, end = order.clumps.around(order.samples(np.arange(sum(sizes))))
    short = np.flatnonzero(end - first == 2)
    assert len(short) == 400
    assert np.abs(short[::2] - np.linspace(130, sum(sizes), 200)).max() < 3 * CLUMP_SAMPLES


def test_clumps_do_not_leave_their_shard() -> None:
    sizes = [300, 128, 5]
    shards, first, end = Clumps(sizes).around(np.arange(433))
    assert sorted(set(zip(shards.tolist(), first.tolist(), end.tolist(), strict=True))) == [
        (0, 0, 128),
        (0, 128, 256),
        (0, 256, 300),
        (1, 300, 428),
        (2, 428, 433),
    ]


def test_a_billion_samples_take_constant_memory() -> None:
    """Peak memory of an order of 10^9 samples is that of its list of shards, not of its samples."""
    peaks = []
    for shard_size in (100_000, 1_000_000):  # 10,000 shards each
        tracemalloc.start()
        order = LaneOrder([shard_size + 1] * 10_000, seed=0)
        assert order.lanes == 1_920
        for start in (0, 10**9 - 4_096, 7 * 10**9 + 12_345):
            found = order.samples(start + np.arange(4_096))
            assert len(np.unique(found // 2)) > 2_000
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] < 64 << 20


def test_ranks_that_do_not_divide_the_lanes_are_refused() -> None:
    order = LaneOrder([1_000] * 2_000, seed=0)
    assert order.lanes == default_lanes(2_000 * 8) == 1_920
    for num_ranks in (1, 2, 8, 24, 640, 1_920):
        order.check_ranks(num_ranks)
    with pytest.raises(ValueError, match=r"7, got 1920; use 6 ranks, or --data.lanes 1918"):
        order.check_ranks(7)
    with pytest.raises(ValueError, match=r"use 1920 ranks, or --data.lanes 2000"):
        order.check_ranks(2_000)
    assert [default_lanes(n) for n in (1, 15, 16, 100, 10**7)] == [1, 1, 2, 12, 1_920]


def test_wrong_arguments_are_named() -> None:
    for name in ("lanes", "window"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            LaneOrder([4], seed=0, **{name: 0})
    with pytest.raises(ValueError, match="shard_sizes: expected one or more"):
        LaneOrder([4, 0], seed=0)
    with pytest.raises(ValueError, match="positions: expected 0 or more, got -1"):
        LaneOrder([4], seed=0).samples(np.array([-1]))
