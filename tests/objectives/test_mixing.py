"""Draws: halves, pairs, queries, caption tokens; all from (seed, step)."""

import pytest
import torch

from m3i_fast.objectives.mixing import Mix, MixingConfig, draw_mix, drop_tokens


def _draw(
    cfg: MixingConfig, *, batch_size: int = 8, grid: int = 8, seed: int = 3, step: int = 5
) -> Mix:
    return draw_mix(cfg, batch_size=batch_size, grid=grid, context_length=6, seed=seed, step=step)


@pytest.mark.parametrize(("grid", "block"), [(8, 2), (14, 2), (14, 4), (6, 1), (16, 3), (2, 2)])
def test_every_image_gets_half_of_the_cells(grid: int, block: int) -> None:
    mix = _draw(MixingConfig(mask_block=block), grid=grid)
    cells = grid * grid
    assert mix.token_index.shape == (8, cells // 2)
    mask = mix.mask.flatten(1)
    assert (mask.sum(1) == cells // 2).all()
    for p in range(4):
        first, second = mix.token_index[p], mix.token_index[4 + p]
        assert sorted([*first.tolist(), *second.tolist()]) == list(range(cells))
        assert mask[p, first].all() and not mask[p, second].any()


def test_masks_are_made_of_blocks() -> None:
    mix = _draw(MixingConfig(mask_block=2), batch_size=64)
    blocks = mix.mask.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3)  # [P, 4, 4, 4]
    assert (blocks.all(-1) | ~blocks.any(-1)).all()
    assert mix.mask.flatten(1).float().mean(0).std() > 0  # not the same blocks everywhere


def test_pairs_cover_the_batch_once() -> None:
    mix = _draw(MixingConfig())
    assert mix.pairs.tolist() == [[0, 7], [1, 6], [2, 5], [3, 4]]
    assert mix.sample.tolist() == [0, 1, 2, 3, 7, 6, 5, 4]


def test_queries_of_the_same_view_are_hidden_cells() -> None:
    mix = _draw(MixingConfig(num_queries=5))
    assert mix.same_view_query.shape == mix.other_view_query.shape == (4, 5)
    for p in range(4):
        assert not set(mix.same_view_query[p].tolist()) & set(mix.token_index[p].tolist())
        assert len(set(mix.other_view_query[p].tolist())) == 5
    assert _draw(MixingConfig()).other_view_query.shape == (4, 64)


def test_a_fraction_is_asked_pair_by_pair() -> None:
    mix = _draw(MixingConfig(dense_fraction=0.5))
    assert mix.same_view_query.shape == (2, 32) and mix.other_view_query.shape == (2, 64)
    first, second = mix.sample[mix.same_view_rows], mix.sample[mix.other_view_rows]
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == [(0, 7), (1, 6)]
    whole = _draw(MixingConfig(mode="none"))
    assert whole.same_view_rows == whole.other_view_rows == slice(0, 8)


def test_without_mixing_every_input_is_one_whole_image() -> None:
    mix = _draw(MixingConfig(mode="none"), batch_size=5)
    assert mix.num_inputs == 5 and mix.sample.tolist() == [0, 1, 2, 3, 4]
    assert (mix.token_index == torch.arange(64)).all() and mix.mask.all()


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    torch.manual_seed(0)
    first = _draw(MixingConfig(num_queries=5))
    torch.manual_seed(1)
    again = _draw(MixingConfig(num_queries=5))
    for name in Mix.__slots__:
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    for other in (_draw(MixingConfig(), step=6), _draw(MixingConfig(), seed=4)):
        assert not torch.equal(first.mask, other.mask)


def test_dropping_caption_tokens_equals_a_loop() -> None:
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 99, (50, 9), generator=rng, dtype=torch.int32)
    count = torch.randint(0, 10, (50,), generator=rng)
    ids[torch.arange(9) >= count[:, None]] = 0
    priority = torch.rand(50, 9, generator=rng)
    kept, num_kept = drop_tokens(ids, count, priority, 0.5)
    for row in range(50):
        n = int(count[row])
        expected = [
            int(ids[row, t]) for t in range(n) if t in (0, n - 1) or float(priority[row, t]) >= 0.5
        ]
        assert kept[row].tolist() == expected + [0] * (9 - len(expected))
        assert int(num_kept[row]) == len(expected)
    assert kept.dtype == torch.int32
    assert torch.equal(drop_tokens(ids, count, priority, 0.0)[0], ids)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: _draw(MixingConfig(), batch_size=7), "batch_size.*7"),
        (lambda: _draw(MixingConfig(), grid=7), "7 x 7"),
        (lambda: MixingConfig(mask_block=0), "mask_block"),
        (lambda: MixingConfig(token_dropout=1.0), "token_dropout"),
        (lambda: MixingConfig(dense_fraction=0.0), "dense_fraction"),
        (lambda: MixingConfig(num_queries=-1), "num_queries"),
    ],
)
def test_wrong_requests_are_named(make, word: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=word):
        make()
