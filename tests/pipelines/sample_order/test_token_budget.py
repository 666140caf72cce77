"""Batches of a budget of tokens: the same on any ranks, after any resume; grids keep aspects."""

from __future__ import annotations

import math

import numpy as np
import pytest

from m3i_fast.pipelines.sample_order.token_budget import TokenBudget, ViewSides, grid_of

VIEWS = ViewSides(4, 14), ViewSides(4, 14), ViewSides(2, 6)


def budget(**changed: object) -> TokenBudget:
    return TokenBudget(**{"tokens": 4096, "views": VIEWS, "seed": 3, **changed})  # type: ignore[arg-type]


def run(layout: TokenBudget, steps: int, start: int = 0) -> list[np.ndarray]:
    """The positions of each step, batch after batch as the ranks take them."""
    found = []
    for _ in range(steps):
        batches = [
            layout.positions(start, rank, batch)
            for batch in range(layout.accumulate)
            for rank in range(layout.num_ranks)
        ]
        found.append(np.concatenate(batches))
        start = int(layout.ends(start)[-1])
    return found


def test_a_run_takes_every_position_once_and_in_order() -> None:
    steps = run(budget(num_ranks=3, accumulate=2), steps=20)
    taken = np.concatenate(steps)
    assert np.array_equal(taken, np.arange(len(taken)))
    assert len({len(step) for step in steps}) > 5  # as many samples as fit


@pytest.mark.parametrize("ranks, accumulate", [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_batches_are_the_same_on_any_ranks(ranks: int, accumulate: int) -> None:
    """Also those of ranks one by one: number m of a step is rank m mod R's."""
    one = budget(accumulate=8)
    split = budget(num_ranks=ranks, accumulate=accumulate)
    for start in (0, 17, 10**12):
        assert np.array_equal(one.ends(start), split.ends(start))
    whole = [one.positions(5, 0, batch) for batch in range(8)]
    parts = [split.positions(5, m % ranks, m // ranks) for m in range(8)]
    assert all(np.array_equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert one.counts(5) == split.counts(5) == tuple(map(len, whole))


def test_a_run_resumes_where_a_step_ended() -> None:
    layout = budget(num_ranks=2)
    whole = run(layout, 12)
    middle = int(whole[6][-1]) + 1
    again = run(layout, 5, start=middle)
    assert all(np.array_equal(a, b) for a, b in zip(whole[7:], again, strict=True))


def test_a_batch_is_full_and_never_more_than_full() -> None:
    layout = budget(num_ranks=4, accumulate=2)
    held = []
    start = 0
    for _ in range(50):
        ends = layout.ends(start)
        for first, end in zip(ends, ends[1:], strict=False):
            assert 1 <= end - first <= layout.most_samples
            tokens = layout.most_tokens(np.arange(first, end + 1)).sum(1)
            held.append(int(tokens[:-1].sum()))
            assert held[-1] <= 4096 < held[-1] + tokens[-1]  # another one has no room
        start = int(ends[-1])
    assert np.mean(held) > 0.95 * 4096


def test_the_tightest_budget_and_the_smallest_views_fit() -> None:
    tight = budget(tokens=2 * 14**2 + 6**2)
    assert all(len(step) >= 1 for step in run(tight, 200))
    same = budget(tokens=100, views=(ViewSides(2, 2),), num_ranks=2)
    assert same.most_samples == 25 and np.array_equal(same.ends(7), [7, 32, 57])


def test_sides_are_drawn_uniformly_and_for_each_view_apart() -> None:
    tokens = budget().most_tokens(np.arange(20_000))
    sides = np.sqrt(tokens).astype(int)
    assert np.array_equal(sides**2, tokens)
    for v, of in enumerate(VIEWS):
        counts = np.bincount(sides[:, v], minlength=of.most + 1)[of.least :]
        assert len(counts) == of.most - of.least + 1
        assert np.abs(counts / counts.mean() - 1).max() < 0.1
    assert abs(np.corrcoef(sides[:, 0], sides[:, 1])[0, 1]) < 0.03
    assert not np.array_equal(tokens, budget(seed=4).most_tokens(np.arange(20_000)))


def test_draws_are_of_positions() -> None:
    some = np.array([9, 2, 10**12, 2])
    of_all = budget().most_tokens(np.arange(10))
    found = budget(num_ranks=7).most_tokens(some)
    assert np.array_equal(found[[0, 1, 3]], of_all[[9, 2, 2]])


# ---- Dealt one by one, as lanes of object storage are --------------------------------------------


def dealt(**changed: object) -> TokenBudget:
    return budget(dealt=True, **changed)


def test_dealt_batches_have_a_residue_each_and_no_position_is_left() -> None:
    layout, start = dealt(num_ranks=3, accumulate=2), 0
    for _ in range(20):
        end = layout.next_start(start)
        batches = [layout.positions(start, m % 3, m // 3) for m in range(6)]
        assert len({len(batch) for batch in batches}) == 1
        assert np.diff(layout.ends(start)).tolist() == [len(batch) for batch in batches]
        for m, batch in enumerate(batches):
            assert (batch % 6 == m).all() and (batch % 3 == m % 3).all()
        assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(start, end))
        start = end


def test_a_dealt_step_ends_with_the_first_batch_that_is_full() -> None:
    layout, start, held = dealt(num_ranks=4, accumulate=2), 0, []
    for _ in range(50):
        end = layout.next_start(start)
        positions = [layout.positions(start, m % 4, m // 4) for m in range(8)]
        tokens = [int(layout.most_tokens(batch).sum()) for batch in positions]
        following = layout.most_tokens(np.arange(end, end + 8)).sum(1)
        assert max(tokens) <= 4096
        more = [own + following[(m - end) % 8] for m, own in enumerate(tokens)]
        assert max(more) > 4096
        held += tokens
        start = end
    assert np.mean(held) > 0.8 * 4096


@pytest.mark.parametrize("ranks, accumulate", [(1, 8), (2, 4), (8, 1)])
def test_dealt_batches_are_the_same_on_any_ranks(ranks: int, accumulate: int) -> None:
    """After any start, though it is no multiple of the batches of a step."""
    one, split = dealt(accumulate=8), dealt(num_ranks=ranks, accumulate=accumulate)
    for start in (0, 17, 10**12):
        assert one.next_start(start) == split.next_start(start)
        for m in range(8):
            ours = split.positions(start, m % ranks, m // ranks)
            assert np.array_equal(ours, one.positions(start, 0, m))


@pytest.mark.parametrize("is_dealt", [False, True])
@pytest.mark.parametrize("images", [2, 3])
def test_batches_are_of_whole_inputs(images: int, is_dealt: bool) -> None:
    """Of neighbours, which in a bucket share a lane, and with room for no further input."""
    layout = budget(images_per_input=images, num_ranks=2, accumulate=2, dealt=is_dealt)
    start, sizes = 0, set()
    for _ in range(20):
        end = layout.next_start(start)
        batches = [layout.positions(start, m % 2, m // 2) for m in range(4)]
        assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(start, end))
        assert layout.counts(start) == tuple(map(len, batches))
        room = []
        for m, batch in enumerate(batches):
            inputs = batch.reshape(-1, images)
            assert len(batch) and (inputs[:, 0] % images == 0).all()
            assert (np.diff(inputs, axis=1) == 1).all()
            assert not is_dealt or (inputs[:, 0] // images % 4 == m).all()
            assert len(batch) <= layout.most_samples and layout.most_samples % images == 0
            tokens = int(layout.most_tokens(batch).sum())
            after = end if is_dealt else batch[-1] + 1
            following = layout.most_tokens(np.arange(after, after + 4 * images)).sum(1)
            if is_dealt:
                turn = (m - end // images) % 4 * images
                following = following[turn:]
            room.append(tokens + int(following[:images].sum()))
            assert tokens <= 4096
            sizes.add(len(batch))
        assert max(room) > 4096 if is_dealt else min(room) > 4096
        start = end
    assert len(sizes) > 1
    least = images * (2 * 14**2 + 6**2)
    assert budget(images_per_input=images, tokens=least).counts(0)
    with pytest.raises(ValueError, match=f"at least {least} tokens.*times the {images} that share"):
        budget(images_per_input=images, tokens=least - 1)


def test_one_dealt_batch_a_step_is_as_full_as_it_gets() -> None:
    for start in (0, 5, 10**9):
        assert np.array_equal(dealt().positions(start, 0), budget().positions(start, 0))


def test_the_mean_of_samples_is_that_of_batches() -> None:
    sizes = [len(step) for step in run(budget(), 300)]
    assert budget().mean_samples == pytest.approx(np.mean(sizes), rel=0.05)


# ---- Grids ---------------------------------------------------------------------------------------


def test_a_square_has_the_side_that_was_drawn() -> None:
    for side in range(1, 40):
        assert grid_of(3, 3, side**2) == (side, side)


def test_a_grid_keeps_the_aspect_and_fits() -> None:
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(5000):
        side = int(rng.integers(4, 15))
        aspect = math.exp(rng.uniform(-math.log(2), math.log(2)))
        rows, columns = grid_of(aspect, 1.0, side**2)
        assert rows * columns <= side**2
        shares.append(rows * columns / side**2)
        # one of the sides is rounded by half a patch at most, or cut at the budget
        other = 1 + 0.5 / (min(rows, columns) - 0.5)
        assert abs(math.log(rows / columns / aspect)) <= 1.2 * math.log(other)
        assert grid_of(1.0, aspect, side**2) == (columns, rows)
    assert min(shares) >= 0.5 and np.mean(shares) > 0.85


def test_a_strip_has_one_row() -> None:
    assert grid_of(1, 1000, 16) == (1, 16)
    assert grid_of(1000, 1, 16) == (16, 1)
    assert grid_of(1, 4, 16) == (2, 8)


def test_what_fits_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="token_budget: expected at least 428 tokens, .* got 427"):
        budget(tokens=427)
    with pytest.raises(ValueError, match="views: expected at least one, got none"):
        budget(views=())
    with pytest.raises(ValueError, match="accumulate: expected at least 1, got 0"):
        budget(accumulate=0)
    with pytest.raises(ValueError, match="sides: expected 1 <= least <= most, got 5, 4"):
        ViewSides(5, 4)
    with pytest.raises(ValueError, match="rank: expected 0 to 0, got 1"):
        budget().positions(0, 1)
    with pytest.raises(ValueError, match="start: expected 0 or more, got -1"):
        budget().ends(-1)
    with pytest.raises(ValueError, match="start: expected 0 or more, got -1"):
        dealt().positions(-1, 0)
    with pytest.raises(ValueError, match="expected a height and width above 0"):
        grid_of(0, 5, 16)
