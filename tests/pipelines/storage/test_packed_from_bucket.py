"""Views of any size of data in a bucket: the folder's bits, on any ranks, after any resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.pipelines.any_shape.batch import PackedBatch
from m3i_fast.pipelines.any_shape.loader import PackedLoader
from m3i_fast.pipelines.opened.mixture import MAX_ID
from m3i_fast.pipelines.storage.upload import push
from tests.pipelines.storage.packed import write
from tests.shared.pipelines.data import encode_image, pack, sample, smooth_picture, take
from tests.shared.pipelines.packed_batches import by_position, same
from tests.shared.pipelines.s3_server import S3Server, cut, refuse

SIDES: dict[str, Any] = {"token_budget": 100, "patch_size": 2, "global_sides": (1, 3)}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("packed") / "data")


@pytest.fixture
def cfg(path: Path, url: str, server: S3Server, tmp_path: Path) -> LoaderConfig:
    push(path, url)
    server.clear()
    return LoaderConfig(
        path=Path(url),
        global_views=ViewConfig(size=8, ratio=(0.4, 2.5)),
        lanes=8,
        fetch_ahead=100,
        cache_dir=tmp_path / "cache",
        backend="torch",
    )


def steps(loaders: list[PackedLoader], count: int, accumulate: int) -> list[list[PackedBatch]]:
    """Batches of all ranks, step by step."""
    return [[b for each in loaders for b in take(each, accumulate)] for _ in range(count)]


def of_ranks(cfg: LoaderConfig, num_ranks: int, accumulate: int) -> list[PackedLoader]:
    options = {**SIDES, "num_ranks": num_ranks, "accumulate": accumulate}
    return [PackedLoader(cfg, rank=rank, **options) for rank in range(num_ranks)]


@pytest.mark.parametrize("num_ranks, accumulate", [(1, 1), (2, 2)])
def test_batches_equal_those_of_the_folder(
    path: Path, cfg: LoaderConfig, server: S3Server, num_ranks: int, accumulate: int
) -> None:
    """Of two epochs, though the server fails now and then."""
    server.fault(".tar", refuse("503 Slow Down", "SlowDown"), 2)
    server.fault(".tar", cut, 2)
    remote = of_ranks(cfg, num_ranks, accumulate)
    seen: list[int] = []
    for rank, loader in enumerate(remote):
        opened = PackedLoader(replace(cfg, path=path), **SIDES)._open
        local = PackedLoader(
            replace(cfg, path=path), rank=rank, num_ranks=num_ranks, accumulate=accumulate,
            opened=replace(opened, lanes=loader._open.lanes), **SIDES,
        )  # fmt: skip
        while loader.samples < 1300:
            ours, theirs = take(loader, accumulate), take(local, accumulate)
            assert same(by_position(ours), by_position(theirs))
            seen += [i for batch in ours for i in batch.sample_id.tolist()]
        loader.close()
    counts = np.bincount(seen, minlength=650)
    assert len(counts) == 650 and counts.min() >= 2


def test_the_positions_of_a_rank_are_those_of_its_lanes(cfg: LoaderConfig) -> None:
    for rank, loader in enumerate(of_ranks(cfg, 2, 3)):
        while loader.samples < 200:
            lanes = next(loader).position.numpy() % 8
            assert set(lanes.tolist()) <= set(range(rank, 8, 2))
        loader.close()


@pytest.mark.parametrize("num_ranks, accumulate", [(2, 2), (4, 1)])
def test_a_step_is_the_same_on_any_ranks_after_any_resume(
    cfg: LoaderConfig, num_ranks: int, accumulate: int
) -> None:
    (alone,) = of_ranks(cfg, 1, 4)
    before = steps([alone], 3, 4)
    state = json.loads(json.dumps(alone.state_dict()))
    assert state["order"].endswith("lanes 8, window 1, images 1")
    expected = steps([alone], 3, 4)
    alone.close()
    split = of_ranks(cfg, num_ranks, accumulate)
    for loader in split:
        loader.load_state_dict(state)
    found = steps(split, 3, accumulate)
    for loader in split:
        loader.close()
    assert {loader.samples for loader in split} == {alone.samples}
    for ours, theirs in zip(found, expected, strict=True):
        assert same(by_position(ours), by_position(theirs))
    taken = np.concatenate([b.position.numpy() for step in before + expected for b in step])
    assert np.array_equal(np.sort(taken), np.arange(alone.samples))


def test_a_bucket_and_a_folder_are_mixed(cfg: LoaderConfig, tmp_path: Path) -> None:
    """A step is the same on any ranks, whose lanes are of the run's positions."""
    pictures = [encode_image(smooth_picture(40 + i, 9, 7)) for i in range(10)]
    other = pack(tmp_path / "other", [sample(i, pictures[i % 10]) for i in range(90)], 50)
    places = [(cfg.path, 2), (other, 1)]
    mixed = replace(cfg, mixture=tuple(f"{place}:train:{weight}" for place, weight in places))
    (alone,) = of_ranks(mixed, 1, 2)
    expected = steps([alone], 12, 2)
    alone.close()
    split = of_ranks(mixed, 2, 1)
    found = steps(split, 12, 1)
    for loader in split:
        loader.close()
    for ours, theirs in zip(found, expected, strict=True):
        assert same(by_position(ours), by_position(theirs))
        assert [set((b.position % 2).tolist()) for b in ours] == [{0}, {1}]
    counts = np.bincount([d for step in found for b in step for d in datasets(b)], minlength=2)
    assert counts[0] == pytest.approx(2 * counts[1], rel=0.05)


def datasets(batch: PackedBatch) -> list[int]:
    """The data set that each sample of a mixture is of."""
    return (batch.sample_id // MAX_ID).tolist()
