"""The hard half and the clusters of held-out pictures; oracle: scipy."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.cluster import hierarchy
from scipy.spatial.distance import cdist, pdist

from m3i_fast.evaluation.feature_extraction import small_pixels
from m3i_fast.evaluation.held_out import HeldOut, describe_held_out
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.dataset.near_duplicates import NEARER_THAN, thumbnail
from m3i_fast.pipelines.loader import evaluation_batches
from m3i_fast.pipelines.sources import openmoji


def test_pixels_are_the_thumbnails_that_splits_are_made_by() -> None:
    views = torch.randint(0, 256, (3, 3, 72, 72), dtype=torch.uint8)
    ours = small_pixels(views).view(3, 3, 144).mT.flatten(1)  # channels last
    for row, view in zip(ours, views, strict=True):
        assert row.numpy() == pytest.approx(thumbnail(view.permute(1, 2, 0).numpy()), abs=1e-5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "openmoji"
    return openmoji.build(out, limit=80, num_merges=200, heldout=0.5, max_variants=3)


def _batches(data: Path, split: str, *, alone: bool, batch_size: int = 16) -> list[Batch]:
    passes = evaluation_batches(
        data, split, image_size=72, batch_size=batch_size, representatives_only=alone
    )
    return list(passes)


def _pixels(batches: list[Batch]) -> np.ndarray:
    return torch.cat([small_pixels(b.global_views[0]) for b in batches]).double().numpy()


def test_the_hard_half_lies_farthest_from_training(data: Path) -> None:
    heldout = _batches(data, "heldout", alone=True)
    training = _batches(data, "train", alone=False)
    got = describe_held_out(heldout, training)
    nearest = cdist(_pixels(heldout), _pixels(training)).min(1) / 432**0.5
    assert got.distance.numpy() == pytest.approx(nearest, abs=2e-5)
    assert got.group.tolist() == torch.cat([b.group_id for b in heldout]).tolist()
    assert nearest.min() > NEARER_THAN - 2e-5
    assert int(got.hard.sum()) == 20
    assert nearest[got.hard].min() >= nearest[~got.hard].max() - 2e-5
    tree = hierarchy.linkage(pdist(_pixels(heldout)) / 432**0.5, "single")
    oracle = hierarchy.fcluster(tree, NEARER_THAN, "distance")
    same = np.equal.outer(oracle, oracle)
    assert np.array_equal(np.equal.outer(got.cluster.numpy(), got.cluster.numpy()), same)
    again = describe_held_out(
        _batches(data, "heldout", alone=True, batch_size=60),
        _batches(data, "train", alone=False, batch_size=50),
    )
    assert torch.equal(again.distance, got.distance)


def test_a_training_variant_makes_an_item_easy(data: Path) -> None:
    """Not the first drawing of a concept alone is what training saw."""
    heldout = _batches(data, "heldout", alone=True)
    variants = [b for b in _batches(data, "heldout", alone=False) if b.batch_size]
    got = describe_held_out(heldout, variants)
    assert torch.equal(got.distance, torch.zeros(40, dtype=torch.float64))
    assert got.hard.tolist() == [True] * 20 + [False] * 20  # of equals the first ones


def test_values_stand_at_their_concept() -> None:
    group = torch.tensor([40, 7, 12, 3])
    held_out = HeldOut(group=group, cluster=group, distance=torch.arange(4.0))
    values, of = torch.tensor([0.5, 0.25]), torch.tensor([7, 40])
    aligned = held_out.align(values, of, math.nan)
    assert aligned[:2].tolist() == [0.25, 0.5] and bool(aligned[2:].isnan().all())
    counts = held_out.align(torch.ones(1, 3, 2, dtype=torch.int64), torch.tensor([3]), 0)
    assert counts.sum((1, 2)).tolist() == [0, 0, 0, 6]
    assert bool(held_out.align(values[:0], of[:0], math.nan).isnan().all())
    assert held_out.rows("").tolist() == [True] * 4
    assert held_out.rows("_hard").tolist() == [False, False, True, True]
    odd = HeldOut(group=group[:3], cluster=group[:3], distance=torch.arange(3.0))
    assert odd.hard.tolist() == [False, True, True]
