"""Draws: who shares an input, queries, shares of a blend, caption tokens; all by position."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from m3i_fast.config.objective.mixing import MixingConfig
from m3i_fast.objectives.mixing import Mix, draw_branch_priority, draw_mix, drop_tokens
from m3i_fast.ops import mask_mix
from m3i_fast.pipelines.sample_order.positions import StepLayout

MODES = ("own_image", "joint", "masked", "blend", "none")


def _draw(
    cfg: MixingConfig,
    *,
    batch_size: int = 12,
    grid: int = 8,
    seed: int = 3,
    step: int = 5,
    num_steps: int = 11,
    start: int = 0,
) -> Mix:
    return draw_mix(
        cfg,
        position=torch.arange(start, start + batch_size),
        first_position=start,
        grid=grid,
        context_length=6,
        seed=seed,
        step=step,
        num_steps=num_steps,
    )


def _config(mode: str, **fields: object) -> MixingConfig:
    return MixingConfig(mode=mode, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", ["blocks", "rectangle"])
@pytest.mark.parametrize(("grid", "num_images"), [(8, 2), (14, 2), (8, 3), (14, 3), (7, 4), (2, 4)])
def test_a_cell_shows_the_image_whose_own_it_is(pattern: str, grid: int, num_images: int) -> None:
    mix = _draw(_config("joint", pattern=pattern, num_images=num_images), grid=grid)
    cells, inputs = grid * grid, 12 // num_images
    assert mix.token_index.shape == (12, cells // num_images)
    for p in range(inputs):
        expected = [0] * cells  # what is left over shows the first image
        for k in range(num_images):
            own = mix.token_index[k * inputs + p].tolist()
            assert own == sorted(own)
            for cell in own:
                expected[cell] = k
        assert mix.choice[p].flatten().tolist() == expected
        together = mix.token_index[p::inputs].flatten().tolist()
        assert len(set(together)) == len(together) == num_images * (cells // num_images)


def test_patterns_are_made_of_blocks() -> None:
    for pattern in ("blocks", "rectangle"):
        mix = _draw(_config("own_image", pattern=pattern, mask_block=2), batch_size=64)
        blocks = (mix.choice == 0).unfold(1, 2, 2).unfold(2, 2, 2).flatten(3)  # [P, 4, 4, 4]
        assert (blocks.all(-1) | ~blocks.any(-1)).all()
        assert mix.choice.flatten(1).float().mean(0).std() > 0  # not the same blocks everywhere


@pytest.mark.parametrize(
    ("num_images", "expected"),
    [
        (2, [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]),
        (3, [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]),
        (4, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
    ],
)
def test_neighbours_share_an_input(num_images: int, expected: list[list[int]]) -> None:
    mix = _draw(MixingConfig(num_images=num_images))
    assert mix.members.tolist() == expected
    assert mix.sample.tolist() == [row[k] for k in range(num_images) for row in expected]


@pytest.mark.parametrize("mask_per_batch", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_no_two_elements_of_a_draw_share_memory(mode: str, mask_per_batch: bool) -> None:
    """`Tensor.pin_memory` copies into a tensor of the same strides, which may not overlap."""
    mix = _draw(_config(mode, mask_per_batch=mask_per_batch))
    for name in mix.__slots__:
        value = getattr(mix, name)
        if isinstance(value, Tensor):
            pinned = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
            assert torch.equal(pinned.copy_(value), value), name


@pytest.mark.parametrize("num_images", [2, 3, 4])
def test_each_image_is_asked_cells_it_does_not_show(num_images: int) -> None:
    mix = _draw(MixingConfig(num_images=num_images, num_queries=5))
    assert mix.own_query.shape == mix.other_query.shape == (12, 5)
    shown = [set(row) for row in mix.token_index.tolist()]
    asked = mix.asked("all").tolist()
    for image, own, other in zip(
        asked, mix.own_query.tolist(), mix.other_query.tolist(), strict=True
    ):
        assert not set(own) & shown[image]
        assert len(set(own)) == len(set(other)) == 5
    others = [set(row) for row in mix.other_query.tolist()]
    assert any(other & cells for other, cells in zip(others, shown, strict=True))  # these may be
    whole = _draw(MixingConfig(num_images=num_images))
    for image, own in enumerate(whole.own_query.tolist()):
        assert own == [c for c in range(64) if c not in whole.token_index[image].tolist()]
    assert (whole.other_query == torch.arange(64)).all()


def test_asked_are_images_of_the_first_inputs() -> None:
    mix = _draw(MixingConfig(num_images=3, dense_fraction=0.5, num_queries=4))
    assert mix.num_inputs == 4 and mix.num_asked == 2
    assert mix.asked("first").tolist() == [0, 1]
    assert mix.asked("last").tolist() == [8, 9]
    assert mix.asked("all").tolist() == [0, 1, 4, 5, 8, 9]
    assert mix.sample[mix.asked("all")].tolist() == [0, 3, 1, 4, 2, 5]
    for own, table in ((True, mix.own_query), (False, mix.other_query)):
        assert table.shape == (6, 4) and len(table.unique(dim=0)) == 6
        assert torch.equal(mix.queries("all", own=own), table)
        assert torch.equal(mix.queries("first", own=own), table[:2])
        assert torch.equal(mix.queries("last", own=own), table[4:])
    one = _draw(_config("masked", dense_fraction=0.25))
    for which in ("first", "last", "all"):
        assert one.asked(which).tolist() == [0, 1, 2]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="which: expected first, last or all, got second"):
        mix.asked("second")  # type: ignore[arg-type]


def test_without_mixing_every_input_is_one_whole_image() -> None:
    mix = _draw(MixingConfig(mode="none"), batch_size=5)
    assert mix.members.tolist() == [[0], [1], [2], [3], [4]]
    assert mix.sample.tolist() == [0, 1, 2, 3, 4]
    every = torch.arange(64).expand(5, -1)
    for cells in (mix.token_index, mix.own_query, mix.other_query):
        assert torch.equal(cells, every)
    assert torch.equal(mix.choice, torch.zeros(5, 1, 1, dtype=torch.uint8))
    assert mix.share is None


@pytest.mark.parametrize("pattern", ["blocks", "rectangle"])
def test_masked_shows_one_image_and_asks_what_it_hides(pattern: str) -> None:
    mix = _draw(_config("masked", pattern=pattern, mask_ratio=0.75, final_mask_ratio=0.75))
    assert mix.members.tolist() == [[p] for p in range(12)]
    assert torch.equal(mix.choice, torch.zeros(12, 1, 1, dtype=torch.uint8))
    assert mix.token_index.shape == (12, 16) and mix.own_query.shape == (12, 48)
    for seen, hidden in zip(mix.token_index.tolist(), mix.own_query.tolist(), strict=True):
        assert sorted([*seen, *hidden]) == list(range(64))
    assert len(mix.token_index.unique(dim=0)) > 6


def test_the_mask_ratio_is_linear_in_the_step() -> None:
    cfg = _config("masked", mask_ratio=0.5, final_mask_ratio=0.9)
    shown = [_draw(cfg, step=step).token_index.shape[1] for step in range(11)]
    assert shown == [64 - round((0.5 + 0.04 * step) * 64) for step in range(11)]
    assert shown[0] == 32 and shown[-1] == 6
    assert _draw(cfg, step=0, num_steps=1).token_index.shape[1] == 32


@pytest.mark.parametrize("mode", ["own_image", "masked"])
def test_one_drawing_may_serve_the_batch(mode: str) -> None:
    mix = _draw(_config(mode, mask_per_batch=True, num_queries=9))
    by_image = mix.token_index.unflatten(0, (-1, mix.num_inputs))
    assert (by_image == by_image[:, :1]).all()
    assert (mix.choice == mix.choice[:1]).all()
    assert len(mix.own_query.unique(dim=0)) == 12  # but not the queries
    if mode == "own_image":
        assert set(by_image[0, 0].tolist()).isdisjoint(by_image[1, 0].tolist())


def test_a_blend_shows_and_asks_every_cell() -> None:
    mix = _draw(_config("blend", dense_fraction=0.5))
    assert mix.members.tolist() == [[2 * p, 2 * p + 1] for p in range(6)]
    assert torch.equal(mix.token_index, torch.arange(64).expand(12, -1))
    assert torch.equal(mix.own_query, torch.arange(64).expand(6, -1))
    assert torch.equal(mix.choice, torch.zeros(6, 1, 1, dtype=torch.uint8))
    assert mix.share is not None and mix.share.dtype == torch.float32
    assert torch.equal(mix.share, mix.share[:1].expand(6))


@pytest.mark.parametrize("alpha", [0.3, 0.8, 4.0])
def test_shares_follow_beta(alpha: float) -> None:
    """Against the quantiles of torch's own Beta distribution."""
    cfg = _config("blend", blend_alpha=alpha)
    shares = [_draw(cfg, batch_size=4, grid=1, start=start).share for start in range(0, 32_000, 4)]
    assert all(share is not None and share[0] == share[1] for share in shares)
    share = torch.stack([share[0] for share in shares if share is not None])
    torch.manual_seed(0)
    expected = torch.distributions.Beta(alpha, alpha).sample((200_000,))
    at = torch.linspace(0.05, 0.95, 10)
    torch.testing.assert_close(share.quantile(at), expected.quantile(at), rtol=0, atol=0.03)


@pytest.mark.parametrize("mode", MODES)
def test_a_draw_fits_the_kernel(mode: str) -> None:
    """Contiguous, and each pixel of the picture is of the image whose cell it is in."""
    mix = _draw(_config(mode))
    views = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).repeat(1, 3, 16, 16)
    mixed = mask_mix(views, mix.choice, mix.members, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    assert mixed.shape == (mix.num_inputs, 3, 16, 16)
    if mode == "blend":
        return  # its pixels are blended instead
    cells = mixed[:, 0, ::2, ::2].flatten(1)
    for image, index in enumerate(mix.token_index):
        assert (cells[image % mix.num_inputs, index] == mix.sample[image]).all()


def test_a_copy_keeps_every_field() -> None:
    mix = _draw(_config("blend"))
    for name in Mix.__slots__:
        before, after = getattr(mix, name), getattr(mix.to(torch.device("cpu")), name)
        assert torch.equal(before, after) if isinstance(before, Tensor) else before == after, name
    there = mix.to(torch.device("meta"))
    assert there.share is not None and there.share.is_meta and there.num_asked == 6
    assert there.asked("last").is_meta


@pytest.mark.parametrize("pattern", ["blocks", "rectangle"])
@pytest.mark.parametrize("mode", ["own_image", "masked", "blend"])
def test_a_draw_depends_on_seed_and_positions_alone(mode: str, pattern: str) -> None:
    cfg = _config(mode, pattern=pattern, num_queries=5)
    torch.manual_seed(0)
    first = _draw(cfg)
    torch.manual_seed(1)
    _expect_equal(_draw(cfg), first)
    _expect_equal(_draw(cfg, step=6), first)  # the mask ratio, which it decides, is constant here
    for other in (_draw(cfg, start=12), _draw(cfg, seed=4)):
        differing = ["own_query", "other_query", "token_priority"]
        differing += ["share"] if mode == "blend" else ["token_index"]
        for name in differing:
            assert not torch.equal(getattr(first, name), getattr(other, name)), name


def _expect_equal(first: Mix, second: Mix) -> None:
    for name in Mix.__slots__:
        one, two = getattr(first, name), getattr(second, name)
        assert torch.equal(one, two) if isinstance(one, Tensor) else one == two, name


@pytest.mark.parametrize("mask_per_batch", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_every_split_of_a_step_has_the_same_draws(mode: str, mask_per_batch: bool) -> None:
    """Rows of images, cells and queries, put together from the ranks' and accumulated batches."""
    cfg = _config(mode, mask_per_batch=mask_per_batch, num_queries=4)
    images, start = cfg.images_per_input, 16
    whole = _draw(cfg, batch_size=16, start=start)
    for ranks, size, accumulate in ((2, 8, 1), (4, 4, 1), (1, 4, 4), (2, 4, 2)):
        layout = StepLayout(
            batch_size=size, num_ranks=ranks, accumulate=accumulate, images_per_input=images
        )
        for rank, batch in itertools.product(range(ranks), range(accumulate)):
            position = torch.from_numpy(layout.positions(start, rank, batch))
            own = draw_mix(
                cfg,
                position=position,
                first_position=start,
                grid=8,
                context_length=6,
                seed=3,
                step=5,
                num_steps=11,
            )
            rows = position - start
            assert torch.equal(rows[own.members], whole.members[rows[::images] // images])
            assert torch.equal(own.token_priority, whole.token_priority[rows])
            assert (own.share is None) == (whole.share is None)
            if own.share is not None and whole.share is not None:
                assert torch.equal(own.share, whole.share[: own.num_inputs])
            inputs = rows[::images] // images
            assert torch.equal(own.choice, whole.choice[inputs])
            for name in ("token_index", "own_query", "other_query"):
                by_image = [getattr(mix, name).unflatten(0, (images, -1)) for mix in (own, whole)]
                assert torch.equal(by_image[0], by_image[1][:, inputs]), name


@pytest.mark.parametrize("mode", MODES)
def test_every_split_of_a_step_drops_the_same_branches(mode: str) -> None:
    """By image where each is a row of its own, else by input; of local views by sample."""
    cfg = _config(mode)
    images = cfg.images_per_input
    columns = images if mode == "own_image" else 1

    def drawn(position: Tensor) -> tuple[Tensor, Tensor]:
        rows, local = draw_branch_priority(
            cfg, position=position, num_views=2, num_local=3, num_layers=5, seed=1
        )
        assert local is not None and rows.dtype == local.dtype == torch.int32
        assert rows.is_contiguous() and local.is_contiguous()
        return rows.view(columns, 2, -1, 10), local.view(3, -1, 10)

    whole, whole_local = drawn(torch.arange(24))
    assert len(whole.unique()) > 0.99 * whole.numel()  # no two rows, views or layers share a draw
    assert len(whole_local.unique()) > 0.99 * whole_local.numel()
    assert 0 <= whole.min() and whole.max() < 2**24
    layout = StepLayout(batch_size=12, num_ranks=2, images_per_input=images)
    for rank in range(2):
        position = torch.from_numpy(layout.positions(0, rank))
        own, own_local = drawn(position)
        assert torch.equal(own, whole[:, :, position[::images] // images])
        assert torch.equal(own_local, whole_local[:, position])
    none = draw_branch_priority(
        cfg, position=torch.arange(24), num_views=2, num_local=0, num_layers=5, seed=1
    )
    assert none[1] is None and torch.equal(none[0].view(columns, 2, -1, 10), whole)


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
        (lambda: _draw(MixingConfig(), batch_size=7), "batch_size: .* multiple of 2,.* got 7"),
        (lambda: _draw(MixingConfig(num_images=3), batch_size=8), "batch_size: .* of 3,.* got 8"),
        (lambda: _draw(MixingConfig(mode="none"), batch_size=0), "batch_size: .* got 0"),
        (lambda: _draw(MixingConfig(num_images=4), grid=1), "num_images: .* 1 x 1 .* got 0"),
        (
            lambda: _draw(_config("masked", mask_ratio=0.1), grid=2),
            r"mixing\.mask_ratio: expected to leave .* 1 to 3 cells of a 2 x 2 .* got 4",
        ),
        (
            lambda: _draw(_config("masked", final_mask_ratio=0.9), grid=2),
            r"mixing\.final_mask_ratio: .* 1 to 3 cells .* got 0",
        ),
        (lambda: _draw(MixingConfig(), step=11), "step: expected 0 <= step < num_steps = 11"),
        (lambda: _draw(MixingConfig(), step=-1), "step: .* got -1"),
        (lambda: MixingConfig(num_images=1), "num_images: expected 2 to 4, got 1"),
        (lambda: MixingConfig(num_images=5), "num_images: expected 2 to 4, got 5"),
        (lambda: _config("blend", num_images=3), "num_images: expected 2 in mode blend, got 3"),
        (lambda: MixingConfig(mask_block=0), "mask_block"),
        (lambda: MixingConfig(mask_ratio=0.0), "mixing.mask_ratio: .* got 0.0"),
        (lambda: MixingConfig(final_mask_ratio=1.0), "final_mask_ratio: .* got 1.0"),
        (lambda: MixingConfig(blend_alpha=0.0), "blend_alpha: expected > 0, got 0.0"),
        (lambda: MixingConfig(token_dropout=1.0), "token_dropout"),
        (lambda: MixingConfig(dense_fraction=0.0), "dense_fraction"),
        (lambda: MixingConfig(num_queries=-1), "num_queries"),
    ],
)
def test_wrong_requests_are_named(make, word: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=word):
        make()


@pytest.mark.parametrize("pattern", ["blocks", "rectangle"])
def test_an_encoder_that_does_not_fit_is_refused(pattern: str) -> None:
    for mode in MODES:
        cfg = _config(mode, pattern=pattern, mask_block=3)
        assert not list(cfg.cell_conflicts(alone=True, multiple=1))
        if mode in ("own_image", "masked"):
            [(name, told)] = cfg.cell_conflicts(alone=False, multiple=3)
            assert name == "objective.mixing.mode"
            assert told.startswith("expected joint, blend or none")
            assert told.endswith(f"got {mode}")
        elif mode == "joint":
            [(name, told)] = cfg.cell_conflicts(alone=False, multiple=2)
            assert name == "objective.mixing.mask_block"
            assert told.startswith("expected a multiple of 2 tokens") and told.endswith("got 3")
            whole = replace(cfg, mask_block=4)
            assert not list(whole.cell_conflicts(alone=False, multiple=2))
        else:
            assert not list(cfg.cell_conflicts(alone=False, multiple=2))
