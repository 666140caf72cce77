"""Near-duplicates: distances and clusters are scipy's, and no split has a part of a cluster."""

from __future__ import annotations

import io
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from scipy.cluster import hierarchy
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist, pdist
from skimage.measure import block_reduce

from m3i_fast.pipelines.dataset.near_duplicates import (
    NEARER_THAN,
    Thumbnails,
    cluster_groups,
    distances,
    rounded,
    split_clusters,
    thumbnail,
)
from m3i_fast.pipelines.sources import openmoji


def _pictures(num: int, seed: int = 0) -> Thumbnails:
    """Random ones, every third one of which is nearly the one before it."""
    rng = np.random.default_rng(seed)
    values = rng.random((num, 432))
    values[2::3] = values[1::3][: len(values[2::3])] + 0.06 * rng.random((len(values[2::3]), 432))
    return rounded(values.clip(0, 1))


def _partition(labels: object) -> set[frozenset[int]]:
    members: dict[object, set[int]] = defaultdict(set)
    for row, label in enumerate(np.asarray(labels).tolist()):
        members[label].add(row)
    return {frozenset(rows) for rows in members.values()}


def test_a_thumbnail_is_the_mean_of_areas() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (48, 72, 3), dtype=np.uint8)
    oracle = block_reduce(picture / 255, (4, 6, 1), np.mean)
    assert thumbnail(picture) == pytest.approx(oracle.ravel(), abs=2**-17)
    with pytest.raises(ValueError, match="picture: expected sides that 12 divides, got 48 x 50"):
        thumbnail(picture[:, :50])


def test_distances_are_scipys_and_exact_in_any_order() -> None:
    first, second = _pictures(40), _pictures(30, seed=1)
    found = distances(first, second)
    assert found == pytest.approx(cdist(first, second) / 432**0.5, abs=1e-12)
    turned = np.random.default_rng(2).permutation(432)
    assert np.array_equal(found, distances(first[:, turned], second[:, turned]))
    assert np.array_equal(distances(first, first).diagonal(), np.zeros(40))


def test_clusters_are_those_of_single_linkage() -> None:
    pictures = _pictures(1400)  # several chunks
    found = cluster_groups(range(1400), pictures)
    tree = hierarchy.linkage(pdist(pictures) / 432**0.5, "single")
    oracle = hierarchy.fcluster(tree, np.nextafter(NEARER_THAN, 0), "distance")
    assert _partition([found[i] for i in range(1400)]) == _partition(oracle)
    assert 900 < len(set(found.values())) < 1000
    assert all(cluster <= group for group, cluster in found.items())


def test_groups_are_joined_by_any_of_their_pictures_and_along_chains() -> None:
    rng = np.random.default_rng(3)
    line = rounded(rng.random(432) / 2 + np.arange(12)[:, None] * 0.04)  # neighbours 0.04 apart
    pictures, group = np.concatenate([line, _pictures(30)]), np.arange(42) // 2 * 5
    found = cluster_groups(group, pictures)
    near = cdist(pictures, pictures) / 432**0.5 < NEARER_THAN
    near |= group[:, None] == group
    oracle = connected_components(near, directed=False)[1]
    assert _partition([found[g] for g in group.tolist()]) == _partition(oracle)
    assert {found[g] for g in group[:12].tolist()} == {0}
    pair, between = line[:2], float(distances(line[:1], line[1:2])[0, 0])
    assert cluster_groups([7, 3], pair, nearer_than=between) == {3: 3, 7: 7}  # not nearer
    assert cluster_groups([7, 3], pair, nearer_than=between + 1e-9) == {3: 3, 7: 3}


CLUSTERS = {g: g - g % 7 if g < 210 else g for g in range(1000)}  # thirty of seven, 790 of one


@pytest.mark.parametrize(("heldout", "tune"), [(0.2, 0.0), (0.2, 0.25), (0.0, 0.1), (1.0, 0.0)])
def test_clusters_are_split_whole_and_shares_are_exact(heldout: float, tune: float) -> None:
    members = split_clusters(CLUSTERS, seed=0, heldout=heldout, tune=tune)
    assert sorted(sum(members.values(), [])) == list(range(1000))
    clusters = [{CLUSTERS[g] for g in groups} for groups in members.values()]
    assert sum(map(len, clusters)) == len(set.union(*clusters)) == 820
    assert len(members["heldout"]) == round(1000 * heldout)
    assert len(members["tune"]) == round(tune * (1000 - round(1000 * heldout)))
    if 0 < heldout < 1:
        shared = sum(g < 210 for g in members["heldout"]) / 210
        assert 0.05 < shared < 0.45  # large clusters are held out as often as small ones


def test_the_split_depends_on_clusters_seed_and_share_alone() -> None:
    first = split_clusters(CLUSTERS, seed=0, heldout=0.2, tune=0.1)
    turned = dict(sorted(CLUSTERS.items(), reverse=True))
    assert split_clusters(turned, seed=0, heldout=0.2, tune=0.1) == first
    assert split_clusters(CLUSTERS, seed=0, heldout=0.2, tune=0.0)["heldout"] == first["heldout"]
    assert split_clusters(CLUSTERS, seed=1, heldout=0.2, tune=0.1)["heldout"] != first["heldout"]


@pytest.mark.parametrize(("heldout", "folds"), [(0.2, 5), (0.25, 4), (0.3, 3)])
def test_folds_hold_each_group_out_once(heldout: float, folds: int) -> None:
    splits = [
        split_clusters(CLUSTERS, seed=0, heldout=heldout, tune=0.1, fold=k) for k in range(folds)
    ]
    assert splits[0] == split_clusters(CLUSTERS, seed=0, heldout=heldout, tune=0.1)
    held_out = [group for members in splits for group in members["heldout"]]
    assert len(held_out) == len(set(held_out)) == folds * round(1000 * heldout)
    for members in splits:
        assert sorted(sum(members.values(), [])) == list(range(1000))
        clusters = [{CLUSTERS[g] for g in groups} for groups in members.values()]
        assert sum(map(len, clusters)) == 820


def test_what_fits_in_no_split_is_trained_on() -> None:
    one = split_clusters(dict.fromkeys(range(10), 0), seed=0, heldout=0.2, tune=0.5)
    assert one == {"train": list(range(10)), "tune": [], "heldout": []}


def _shard_pictures(path: Path, split: str) -> tuple[list[int], Thumbnails]:
    """Groups and thumbnails, from the bytes on disk."""
    groups, pictures = [], []
    for tar in sorted(path.glob(f"{split}-*.tar")):
        for row in webdataset.WebDataset(str(tar), shardshuffle=False):
            groups.append(int(np.frombuffer(row["gid"], "<i8")[0]))
            pictures.append(thumbnail(np.asarray(Image.open(io.BytesIO(row["png"])))))
    return groups, np.stack(pictures)


def test_no_held_out_drawing_is_nearly_a_training_one(tmp_path: Path) -> None:
    """Of 250 concepts, some of which are nearly the same: scipy looks at what was packed."""
    path = openmoji.build(tmp_path / "data", limit=250, tune=0.2, num_merges=200, max_variants=1)
    sets = {split: _shard_pictures(path, split) for split in ("train", "tune", "heldout")}
    for one in sets:
        for other in sets:
            if one < other:
                between = cdist(sets[one][1], sets[other][1]) / 432**0.5
                assert between.min() >= NEARER_THAN, (one, other)
    groups = np.array(sum((groups for groups, _ in sets.values()), []))
    pictures = np.concatenate([of for _, of in sets.values()])
    near = (cdist(pictures, pictures) / 432**0.5 < NEARER_THAN) & (groups[:, None] != groups)
    assert near.sum() > 10  # there was something to keep together
    counts = {split: len(set(groups)) for split, (groups, _) in sets.items()}
    assert counts == {"train": 160, "tune": 40, "heldout": 50}
