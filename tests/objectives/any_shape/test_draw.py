"""Cells of pictures of any shape: alike grids are dealt as squares, others by where centres lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from m3i_fast.config.objective.mixing import MixingConfig
from m3i_fast.models.transformer.ragged import Ragged
from m3i_fast.objectives.any_shape.draw import PackedMix, draw_packed_mix
from m3i_fast.objectives.mixing import draw_mix

BATCH, STEPS = 12, 3
GRIDS = torch.tensor(
    [(2, 5), (4, 4), (1, 3), (6, 2), (3, 3), (7, 1), (2, 2), (5, 4), (1, 2), (4, 6), (3, 5), (6, 6)]
)
MODES: list[dict[str, Any]] = [
    {"mode": "masked", "mask_ratio": 0.75, "final_mask_ratio": 0.5},
    {"mode": "masked", "pattern": "rectangle", "hidden": "mask_token", "num_queries": 4},
    {"mode": "joint"},
    {"mode": "joint", "num_images": 3, "pattern": "rectangle", "num_queries": 5},
    {"mode": "own_image", "num_images": 4, "mask_block": 1, "mask_per_batch": True},
    {"mode": "own_image", "min_contrast": 3, "dense_fraction": 0.5},
    {"mode": "none"},
]
every_mode = pytest.mark.parametrize("options", MODES)


def draw(options: dict[str, Any], grids: Tensor, *, first: int = 0, step: int = 1) -> PackedMix:
    return draw_packed_mix(
        MixingConfig(**options),
        grids=grids,
        position=torch.arange(first, first + len(grids)),
        first_position=0,
        context_length=7,
        seed=5,
        step=step,
        num_steps=STEPS,
    )


def two_views(grids: Tensor) -> Tensor:  # [B, 2, 2]
    return torch.stack([grids, grids.flip(1)], 1)


def rows(cells: Ragged) -> list[list[int]]:
    return [part.tolist() for part in cells.values.split(list(cells.lengths))]


@every_mode
@pytest.mark.parametrize("side", [4, 5])
def test_squares_are_drawn_as_squares(options: dict[str, Any], side: int) -> None:
    cfg = MixingConfig(**options)
    squares = draw_mix(
        cfg,
        position=torch.arange(BATCH),
        first_position=0,
        grid=side,
        context_length=7,
        seed=5,
        step=1,
        num_steps=STEPS,
    )
    packed = draw(options, torch.full((BATCH, 2, 2), side))
    for view in packed.cells:
        assert rows(view.own) == squares.token_index.tolist()
        assert rows(view.own_query) == squares.own_query.tolist()
        assert rows(view.other_query) == squares.other_query.tolist()
    assert torch.equal(packed.token_priority, squares.token_priority)
    assert torch.equal(packed.sample, squares.sample)
    assert packed.num_asked == squares.num_asked
    for which in ("first", "last", "all"):
        own = packed.own_cells(which)
        assert isinstance(own, Ragged)
        assert rows(own) == squares.take(squares.token_index, which).tolist()
        assert torch.equal(packed.samples(which), squares.take(squares.sample, which))
        for is_own in (True, False):
            asked = packed.queries_of(1, which, own=is_own)
            assert isinstance(asked, Ragged)
            assert rows(asked) == squares.queries(which, own=is_own).tolist()


def centres(grid: Tensor) -> Tensor:  # [rows * columns, 2] fp64
    sides = [(torch.arange(int(n), dtype=torch.float64) + 0.5) / int(n) for n in grid]
    return torch.cartesian_prod(*sides)


@pytest.mark.parametrize("mode", ["joint", "own_image"])
@pytest.mark.parametrize("num_images, pattern", [(2, "blocks"), (2, "rectangle"), (3, "blocks")])
def test_a_partner_shows_the_cells_whose_centres_lie_in_its_part(
    mode: str, num_images: int, pattern: str
) -> None:
    options = {"mode": mode, "num_images": num_images, "pattern": pattern}
    cfg = MixingConfig(**options)  # type: ignore[arg-type]
    packed, count = draw(options, two_views(GRIDS)), cfg.images_per_input
    num_inputs = BATCH // count
    for view in packed.cells:
        own, hidden = rows(view.own), rows(view.own_query)
        for p in range(num_inputs):
            grid = view.grids[p]
            first = set(own[p])
            size = int(grid.prod())
            assert len(first) == max(size // count, 1)
            for k in range(count):
                image = k * num_inputs + p
                cells = int(view.grids[image].prod())
                assert own[image] and hidden[image]
                assert sorted(own[image] + hidden[image]) == list(range(cells))
                if k == 0 or 1 < len(own[image]) < cells - 1:
                    place = (centres(view.grids[image]) * grid).floor().long()
                    seen = (place[:, 0] * grid[1] + place[:, 1]).tolist()
                    inside = {cell for cell in range(cells) if seen[cell] in first}
                    if k == 0:
                        assert set(own[image]) == inside
                    else:
                        assert not inside & set(own[image])
                    if count == 2 and k == 1 and size % 2 == 0:
                        assert set(own[image]) == set(range(cells)) - inside


def test_what_the_encoder_gets_are_the_patches_of_the_cells_shown() -> None:
    """Side by side where images share a sequence; what comes back are each image's own tokens."""
    grids = two_views(GRIDS)
    for options in MODES[:6]:
        packed = draw(options, grids)
        for number, view in enumerate(packed.cells):
            lengths = grids[:, number].prod(1)
            sample = torch.arange(BATCH).repeat_interleave(lengths)
            cell = torch.cat([torch.arange(int(n)) for n in lengths])
            patches = view.patches if view.patches is not None else torch.arange(len(sample))
            columns = grids[sample[patches], number, 1]
            assert torch.equal(view.inputs.extent, grids[sample[patches], number])
            place = torch.stack([cell[patches] // columns, cell[patches] % columns], 1)
            assert torch.equal(view.inputs.place, place)
            assert sum(view.inputs.lengths) == len(patches)
            taken = patches if view.back is None else patches[view.back]
            of_images = [part.tolist() for part in cell[taken].split(list(view.lengths))]
            if options.get("hidden") == "mask_token":
                assert of_images == [list(range(int(n))) for n in lengths]
                assert view.inputs.hidden is not None
                shown = cell[~view.inputs.hidden]
                assert shown.tolist() == view.own.values.tolist()
            else:
                assert of_images == rows(view.own)
            owner = [sample[part].unique().tolist() for part in taken.split(list(view.lengths))]
            assert owner == [[s] for s in packed.sample.tolist()]


@every_mode
def test_a_draw_is_a_function_of_the_positions_of_its_input(options: dict[str, Any]) -> None:
    grids, cfg = two_views(GRIDS), MixingConfig(**{**options, "dense_fraction": 1.0})
    options = {**options, "dense_fraction": 1.0}
    whole = draw(options, grids)
    images = cfg.images_per_input
    for first in range(0, BATCH, images):
        alone = draw(options, grids[first : first + images], first=first)
        for view, own in zip(whole.cells, alone.cells, strict=True):
            for name in ("own", "own_query", "other_query"):
                of_all, of_one = rows(getattr(view, name)), rows(getattr(own, name))
                p, num_inputs = first // images, BATCH // images
                # In an order that follows from those with more cells, unless contrast decides.
                for ours, theirs in zip(of_one, of_all[p::num_inputs], strict=True):
                    assert sorted(ours) == sorted(theirs), name
                    assert not cfg.min_contrast or ours == theirs


def test_masks_hide_their_share_and_follow_the_schedule() -> None:
    for step, ratio in enumerate((0.75, 0.625, 0.5)):
        packed = draw(MODES[0], two_views(GRIDS), step=step)
        for view in packed.cells:
            for grid, own in zip(view.grids, view.own.lengths, strict=True):
                cells = int(grid.prod())
                assert own == min(max(cells - round(ratio * cells), 1), cells - 1)


def test_what_cannot_be_drawn_is_refused() -> None:
    grids = two_views(GRIDS)
    with pytest.raises(ValueError, match="mode: expected joint, own_image, masked or none"):
        draw({"mode": "blend"}, grids)
    with pytest.raises(ValueError, match="grids: expected 2 cells or more"):
        draw({"mode": "masked"}, torch.ones(BATCH, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected a multiple of 2"):
        draw({"mode": "joint"}, grids[:3])
    with pytest.raises(ValueError, match="step: expected 0 <= step < num_steps = 3, got 3"):
        draw({"mode": "none"}, grids, step=3)
    draw({"mode": "none"}, torch.ones(BATCH, 2, 2, dtype=torch.int64))
