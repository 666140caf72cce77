"""Exact resume on any ranks, and the states that are refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m3i_fast.config.data import LoaderConfig
from m3i_fast.pipelines.loader import Loader
from tests.shared.pipelines.data import (
    Packer,
    encode_image,
    equal,
    sample,
    smooth_picture,
    take,
)


@pytest.mark.parametrize("position", [0, 1, 5, 12, 13, 30])
def test_resume_is_exact(cfg: LoaderConfig, position: int) -> None:
    """Before the first batch, in mid-epoch, across the end of an epoch, and later."""
    original = Loader(cfg)
    take(original, position)
    state = json.loads(json.dumps(original.state_dict()))
    expected = take(original, 15)
    resumed = Loader(replace(cfg, num_threads=2, prefetch=3))
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert all(equal(a, b) for a, b in zip(take(resumed, 15), expected, strict=True))
    assert resumed.state_dict() == original.state_dict()


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


def test_resume_after_the_data_set_moved(cfg: LoaderConfig, tmp_path: Path) -> None:
    loader = Loader(cfg)
    take(loader, 3)
    state, expected = loader.state_dict(), take(loader, 3)
    moved = Loader(replace(cfg, path=Path(shutil.copytree(cfg.path, tmp_path / "moved"))))
    moved.load_state_dict(state)
    assert all(equal(a, b) for a, b in zip(take(moved, 3), expected, strict=True))


def stops(cfg: LoaderConfig, rng: np.random.Generator, number: int) -> None:
    """Stop at random places, and go on with other ranks, batches, threads and another backend.

    One loader that is never stopped, with batches of one input, is the oracle.
    """
    images = 2
    whole = Loader(replace(cfg, batch_size=images, backend="torch"), images_per_input=images)
    state: dict[str, Any] | None = None
    for _ in range(number):
        num_ranks, accumulate = (int(n) for n in rng.integers(1, 4, 2))
        changed = replace(
            cfg,
            batch_size=images * int(rng.integers(1, 5)),
            num_threads=int(rng.integers(1, 4)),
            prefetch=int(rng.integers(1, 4)),
            backend=str(rng.choice(["dali", "torch"])),
        )
        ranks = [
            Loader(
                changed,
                rank=rank,
                num_ranks=num_ranks,
                accumulate=accumulate,
                images_per_input=images,
            )
            for rank in range(num_ranks)
        ]
        for loader in ranks if state is not None else ():
            loader.load_state_dict(state)
        for _ in range(int(rng.integers(1, 6))):
            batches = [batch for loader in ranks for batch in take(loader, accumulate)]
            found = [torch.cat(p) for p in zip(*(b.tensors() for b in batches), strict=True)]
            order = found[-1].argsort()
            expected = take(whole, len(order) // images)
            for ours, *parts in zip(found, *(b.tensors() for b in expected), strict=True):
                assert torch.equal(ours[order], torch.cat(parts))
        states = [json.loads(json.dumps(loader.state_dict())) for loader in ranks]
        assert all(other == states[0] for other in states)
        state = states[int(rng.integers(num_ranks))]
        assert state is not None and state["samples"] == whole.samples


def test_stopped_at_random_and_continued_on_other_ranks(cfg: LoaderConfig) -> None:
    stops(cfg, np.random.default_rng(0), 5)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(10))
def test_stopped_twenty_times(cfg: LoaderConfig, seed: int) -> None:
    stops(cfg, np.random.default_rng(seed), 20)


def test_a_step_that_is_not_whole_is_taken_again(cfg: LoaderConfig) -> None:
    loader = Loader(cfg, accumulate=3)
    expected = take(loader, 5)
    state = loader.state_dict()
    assert state["samples"] == loader.samples == 12
    resumed = Loader(cfg, accumulate=3)
    resumed.load_state_dict(state)
    assert all(equal(a, b) for a, b in zip(take(resumed, 2), expected[3:], strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, "loader state of another run: seed: expected 5, got 6"),
        ({"path": "other"}, "dataset: expected '.*', got '"),
    ],
)
def test_the_state_of_another_run_is_refused(
    cfg: LoaderConfig, packer: Packer, change: dict[str, Any], message: str
) -> None:
    """Where the samples would be others; views may be cut in another way from there on."""
    loader = Loader(cfg)
    take(loader, 1)
    if "path" in change:
        picture = encode_image(smooth_picture(0, 9, 9))
        change = {"path": packer([sample(i, picture) for i in range(50)])}
    with pytest.raises(ValueError, match=message):
        Loader(replace(cfg, **change)).load_state_dict(loader.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": None}, "expected samples, a multiple of 2, got None"),
        ({"samples": 1.5}, "expected samples, a multiple of 2, got 1.5"),
        ({"samples": -2}, "expected samples, a multiple of 2, got -2"),
        ({"samples": 3}, "expected samples, a multiple of 2, got 3"),
        ({"samples": True}, "expected samples, a multiple of 2, got True"),
        ({"version": 1}, "loader state: expected version 2, got 1"),
        ({"order": 99}, "order: expected 99, got"),
        ({"dataset": None}, "dataset: expected None, got '"),
        ({"split": "test"}, "split: expected 'test', got 'train'"),
    ],
)
def test_a_state_of_a_wrong_shape_is_refused(
    cfg: LoaderConfig, change: dict[str, Any], message: str
) -> None:
    """And the loader stays where it was."""
    loader = Loader(cfg, images_per_input=2)
    take(loader, 2)
    state = loader.state_dict()
    with pytest.raises(ValueError, match=message):
        loader.load_state_dict({**state, **change})
    assert loader.state_dict() == state
