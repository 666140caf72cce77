"""Batches of views of any size: samples, sizes and pixels on any ranks, and after any resume."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.ops.views import cut_patches
from m3i_fast.pipelines.any_shape.batch import PackedBatch
from m3i_fast.pipelines.any_shape.loader import PackedLoader
from m3i_fast.pipelines.dataset.annotations.columns import ColumnInfo
from m3i_fast.pipelines.dataset.pack import write_dataset
from m3i_fast.pipelines.loader import Loader
from m3i_fast.pipelines.sample_order.token_budget import grid_of
from tests.shared.pipelines.data import encode_image, info, pack, sample, smooth_picture, take
from tests.shared.pipelines.packed_batches import by_position, same

PATCH = 4
SIDES: dict[str, Any] = {"patch_size": PATCH, "global_sides": (2, 6), "local_sides": (1, 3)}


def loader(cfg: LoaderConfig, **changed: Any) -> PackedLoader:
    return PackedLoader(cfg, **{"token_budget": 400, **SIDES, **changed})


def test_a_batch_is_what_its_shapes_say(cfg: LoaderConfig) -> None:
    num_views = cfg.global_views.count + 3
    sizes = set()
    for batch in take(loader(cfg), 8):
        assert batch.grids.shape == (batch.batch_size, num_views, 2)
        assert batch.num_global == cfg.global_views.count and len(batch.patches) == num_views
        assert int(batch.grids.prod(2).sum()) <= 400
        for v, patches in enumerate(batch.patches):
            assert patches.dtype == torch.uint8
            assert patches.shape == (sum(batch.lengths(v)), 3 * PATCH**2)
            assert int(batch.grids[:, v].prod(1).max()) <= (36 if v < batch.num_global else 9)
        sizes.add(batch.batch_size)
        assert all(map(torch.equal, batch.to("cpu").patches, batch.patches))
    assert len(sizes) > 2


def test_views_are_the_grids_of_the_boxes_and_pixels_of_the_squares_loader(
    cfg: LoaderConfig,
) -> None:
    """Boxes are those that `Loader` draws for the positions; grids have their aspects."""
    ours = by_position(take(loader(cfg), 6))
    squares = Loader(replace(cfg, batch_size=len(ours)))
    batch = next(squares)
    num_views = len(batch.global_views) + len(batch.local_views)
    layout = loader(cfg)._budget
    most = layout.most_tokens(batch.position.numpy())
    for i, position in enumerate(batch.position.tolist()):
        grids, boxes, *rest = ours[position][num_views:]
        assert torch.equal(boxes, batch.boxes[i])
        for v in range(num_views):
            height, width = boxes[v, 2:4].tolist()
            assert tuple(grids[v].tolist()) == grid_of(height, width, int(most[i, v]))
        expected = batch.token_ids[i], batch.label[i], batch.sample_id[i]
        assert all(map(torch.equal, rest, expected))


def test_whole_pictures_keep_their_aspect(tmp_path: Path) -> None:
    """Pixels as the operator makes them of the decoded picture."""
    shapes = [(40, 80), (80, 40), (64, 64), (50, 70)]
    pictures = [smooth_picture(i, *shape) for i, shape in enumerate(shapes)]
    path = pack(tmp_path / "data", [sample(i, encode_image(p)) for i, p in enumerate(pictures)])
    view = ViewConfig(
        count=1, scale=(1, 1), ratio=(0.5, 2), flip_probability=0, jitter_probability=0,
        gray_probability=0,
    )  # fmt: skip
    cfg = LoaderConfig(path=path, global_views=view)
    batch = next(PackedLoader(cfg, token_budget=64 * 4, patch_size=4, global_sides=(8, 8)))
    assert batch.batch_size == 4
    for i, index in enumerate(batch.sample_id.tolist()):
        height, width = shapes[index]
        assert batch.boxes[i, 0].tolist() == [0, 0, height, width, 0]
        rows, columns = batch.grids[i, 0].tolist()
        assert rows / columns == pytest.approx(height / width, rel=0.12)
    (squares,) = [i for i, index in enumerate(batch.sample_id.tolist()) if index == 2]
    assert batch.grids[squares, 0].tolist() == [8, 8]
    one = next(Loader(replace(cfg, batch_size=4, global_views=replace(view, size=32))))
    (at,) = [i for i, index in enumerate(one.sample_id.tolist()) if index == 2]
    patches = batch.patches[0].split(batch.lengths(0))[squares]
    assert torch.equal(patches, cut_patches(one.global_views[0][at], 4))


@pytest.mark.parametrize("num_ranks, accumulate", [(2, 2), (4, 1), (1, 4)])
def test_a_step_is_the_same_on_any_ranks(
    cfg: LoaderConfig, num_ranks: int, accumulate: int
) -> None:
    alone = loader(cfg, accumulate=4)
    split = [
        loader(
            replace(cfg, num_threads=1 + rank), rank=rank, num_ranks=num_ranks,
            accumulate=accumulate,
        )
        for rank in range(num_ranks)
    ]  # fmt: skip
    for _ in range(3):
        parts = [batch for each in split for batch in take(each, accumulate)]
        assert same(by_position(parts), by_position(take(alone, 4)))
        assert {each.samples for each in split} == {alone.samples}


def batches(made: Iterator[PackedBatch], count: int) -> list[PackedBatch]:
    return [next(made) for _ in range(count)]


def test_it_resumes_where_a_step_ended(cfg: LoaderConfig) -> None:
    whole = loader(cfg, accumulate=2)
    before = batches(whole, 7)  # in the middle of a step, which is taken anew
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = loader(cfg, accumulate=2)
    resumed.load_state_dict(state)
    assert resumed.samples == whole.samples == sum(b.batch_size for b in before[:6])
    expected = by_position([before[6], *batches(whole, 5)])
    assert same(by_position(batches(resumed, 6)), expected)


def test_a_closed_loader_goes_on(cfg: LoaderConfig) -> None:
    expected = batches(loader(cfg, accumulate=3), 6)
    closed = loader(cfg, accumulate=3)
    found = batches(closed, 2)
    closed.close()
    found += batches(closed, 4)
    assert same(by_position(found), by_position(expected))


def test_named_columns_are_those_of_the_squares_loader(tmp_path: Path) -> None:
    columns = (
        ColumnInfo(name="genus", kind="class", names=("cat", "dog", "owl")),
        ColumnInfo(name="sizes", kind="numbers", names=("height", "weight"), size=2),
    )
    picture = encode_image(smooth_picture(0, 40, 56))
    samples = [
        sample(i, picture, columns={"genus": i % 3, "sizes": [i / 2, None]} if i % 4 else {})
        for i in range(12)
    ]
    path = tmp_path / "data"
    write_dataset(path, {"train": samples}, info(columns=columns), seed=0, samples_per_shard=4)
    cfg = LoaderConfig(path=path, global_views=ViewConfig(count=1, size=16))
    ours = next(PackedLoader(cfg, token_budget=16 * 6, patch_size=4, global_sides=(2, 4)))
    theirs = next(Loader(replace(cfg, batch_size=ours.batch_size)))
    assert ours.columns.keys() == theirs.columns.keys() == {"genus", "sizes"}
    for name, values in ours.to("cpu").columns.items():
        assert torch.equal(values.nan_to_num(), theirs.columns[name].nan_to_num())


def test_what_it_cannot_do_is_refused(cfg: LoaderConfig) -> None:
    with pytest.raises(ValueError, match="local_sides: expected two numbers, .* got None"):
        loader(cfg, local_sides=None)
    with pytest.raises(ValueError, match="token_budget: expected at least 99 tokens"):
        loader(cfg, token_budget=98)
    with pytest.raises(ValueError, match="patch_size: expected at least 1, got 0"):
        loader(cfg, patch_size=0)
    with pytest.raises(ValueError, match="rank: expected 0 to 1, got 2"):
        loader(cfg, rank=2, num_ranks=2)
