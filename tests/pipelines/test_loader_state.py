"""Exact resume, and the states that are refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from m3i_fast.config.data import LoaderConfig
from m3i_fast.pipelines.loader import Loader
from tests.shared.pipelines.data import (
    EVERYTHING,
    Packer,
    encode_image,
    equal,
    sample,
    smooth_picture,
    take,
)


@pytest.mark.parametrize("position", [0, 1, 5, 11, 12, 13, 24, 30])
def test_resume_is_exact(cfg: LoaderConfig, position: int) -> None:
    """Before the first batch, in mid-epoch, at an epoch's last batch, and after it."""
    original = Loader(cfg)
    take(original, position)
    state = json.loads(json.dumps(original.state_dict()))
    expected = take(original, 15)
    resumed = Loader(replace(cfg, num_threads=2, prefetch=3))
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert all(equal(a, b) for a, b in zip(take(resumed, 15), expected, strict=True))
    assert resumed.epoch == original.epoch
    assert resumed.state_dict()["step"] == original.state_dict()["step"]


def test_resume_in_a_running_loader_and_twice(cfg: LoaderConfig) -> None:
    loader = Loader(cfg)
    take(loader, 4)
    state = loader.state_dict()
    expected = take(loader, 9)
    for _ in range(2):
        loader.load_state_dict(state)
        assert all(equal(a, b) for a, b in zip(take(loader, 9), expected, strict=True))
    later = loader.state_dict()
    expected = take(loader, 3)
    fresh = Loader(cfg)
    fresh.load_state_dict(later)  # the state of a resumed loader is as good as another
    assert all(equal(a, b) for a, b in zip(take(fresh, 3), expected, strict=True))


def test_resume_on_a_rank(cfg: LoaderConfig) -> None:
    loader = Loader(cfg, shard_id=2, num_shards=3)
    take(loader, 7)
    state, expected = loader.state_dict(), take(loader, 6)
    resumed = Loader(cfg, shard_id=2, num_shards=3)
    resumed.load_state_dict(state)
    assert all(equal(a, b) for a, b in zip(take(resumed, 6), expected, strict=True))


def test_resume_after_the_data_set_moved(cfg: LoaderConfig, tmp_path: Path) -> None:
    loader = Loader(cfg)
    take(loader, 3)
    state, expected = loader.state_dict(), take(loader, 3)
    moved = Loader(replace(cfg, path=Path(shutil.copytree(cfg.path, tmp_path / "moved"))))
    moved.load_state_dict(state)
    assert all(equal(a, b) for a, b in zip(take(moved, 3), expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 8}, "batch_size: expected 4, got 8"),
        ({"seed": 6}, "seed: expected 5, got 6"),
        ({"global_views": replace(EVERYTHING, scale=(0.2, 1.0))}, "graph: expected '.*', got '"),
        ({"local_views": None}, "graph: expected '.*', got '"),
        ({"initial_fill": 17}, "graph: expected '.*', got '"),
    ],
)
def test_the_state_of_another_run_is_refused(
    cfg: LoaderConfig, change: dict[str, Any], message: str
) -> None:
    loader = Loader(cfg)
    take(loader, 1)
    with pytest.raises(ValueError, match=message):
        Loader(replace(cfg, **change)).load_state_dict(loader.state_dict())


def test_the_state_of_other_ranks_data_and_versions_is_refused(
    cfg: LoaderConfig, packer: Packer
) -> None:
    state = Loader(cfg, shard_id=0, num_shards=2).state_dict()
    with pytest.raises(ValueError, match="num_shards: expected 2, got 3"):
        Loader(cfg, num_shards=3).load_state_dict(state)
    with pytest.raises(ValueError, match="shard_id: expected 0, got 1"):
        Loader(cfg, shard_id=1, num_shards=2).load_state_dict(state)
    picture = encode_image(smooth_picture(0, 9, 9))
    other = replace(cfg, path=packer([sample(i, picture) for i in range(50)]))
    with pytest.raises(ValueError, match="dataset: expected '.*', got '"):
        Loader(other, num_shards=2).load_state_dict(state)
    state["fingerprint"]["dali_version"] = "1.0.0"
    with pytest.raises(ValueError, match=r"dali_version: expected '1.0.0', got '"):
        Loader(cfg, num_shards=2).load_state_dict(state)
    with pytest.raises(ValueError, match="expected version 1, got 9"):
        Loader(cfg, num_shards=2).load_state_dict({**state, "version": 9})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": None}, "expected fingerprint of a loader, got None"),
        ({"fingerprint": ["f"]}, "expected fingerprint of a loader, got"),
        ({"epoch": 1.5}, "expected epoch of a loader, got 1.5"),
        ({"epoch": -1}, "expected epoch of a loader, got -1"),
        ({"step": "2"}, "expected step of a loader, got '2'"),
        ({"step": 99}, "expected step 0 to 12, got 99"),
        ({"dali_checkpoint": 5}, "expected dali_checkpoint of a loader, got 5"),
        ({"dali_checkpoint": "!!!"}, "base64"),
    ],
)
def test_a_state_of_a_wrong_shape_is_refused(
    cfg: LoaderConfig, change: dict[str, Any], message: str
) -> None:
    """And the loader stays where it was."""
    loader = Loader(cfg)
    state = loader.state_dict()
    with pytest.raises(ValueError, match=message):
        loader.load_state_dict({**state, **change})
    assert loader.state_dict() == state
