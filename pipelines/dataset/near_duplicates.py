"""Near-duplicates: clusters of groups whose pictures are nearly equal, and splits between them.

The distance of two pictures is the root mean square, over pixels and channels, of the difference of
their thumbnails: 12 x 12 RGB in 0..1, averaged over areas. Clusters are those of single linkage:
groups are joined where two of their pictures are nearer than a threshold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from m3i_fast.pipelines.dataset.pack import keyed_order

COMPARED_SIZE = 72  # side in pixels at which drawings are rendered to be compared
SIDE = 12  # side of a thumbnail in pixels
NEARER_THAN = 0.05
_ROWS_A_BLOCK = 512  # bounds the memory of the [block, N] distances

Thumbnails = npt.NDArray[np.float64]  # [N, SIDE * SIDE * 3] of `rounded`


def thumbnail(picture: npt.NDArray[np.uint8]) -> Thumbnails:  # [H, W, 3] -> [SIDE * SIDE * 3]
    """Average a picture over areas; raises ValueError where SIDE does not divide its sides."""
    height, width, _ = picture.shape
    if height % SIDE or width % SIDE:
        raise ValueError(f"picture: expected sides that {SIDE} divides, got {height} x {width}")
    blocks = picture.reshape(SIDE, height // SIDE, SIDE, width // SIDE, 3)
    return rounded(blocks.mean((1, 3)).ravel() / 255)


def rounded(values: Any) -> Thumbnails:  # [...] in 0..1
    """Round to multiples of 2 ** -16.

    Products and sums of these are exact in fp64 in any order of summation, so that distances do not
    depend on the matrix library.
    """
    return np.round(np.asarray(values, dtype=np.float64) * 65536) / 65536


def distances(first: Thumbnails, second: Thumbnails) -> npt.NDArray[np.float64]:  # -> [n, m]
    """Compute the root mean square difference of each of the first and each of the second."""
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1) - 2 * first @ second.T
    return np.sqrt(squares / first.shape[1])


def cluster_groups(
    group: npt.ArrayLike,  # [N] int64
    thumbnails: Thumbnails,  # [N, D]
    *,
    nearer_than: float = NEARER_THAN,
) -> dict[int, int]:
    """Map each group to the least group of its cluster.

    Two groups with pictures nearer than `nearer_than` are in one cluster, and transitively.
    """
    of_row = np.asarray(group, dtype=np.int64)
    parent = {int(name): int(name) for name in np.unique(of_row)}

    def root(name: int) -> int:
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    for rows, columns in _near(thumbnails, nearer_than):
        pairs = np.unique(np.stack([of_row[rows], of_row[columns]], 1), axis=0)
        for one, other in pairs.tolist():
            low, high = sorted((root(one), root(other)))
            parent[high] = low
    return {name: root(name) for name in parent}


def split_clusters(
    cluster_of: Mapping[int, int],  # group -> cluster
    *,
    seed: int,
    heldout: float,
    tune: float,
) -> dict[str, list[int]]:
    """Deal whole clusters into splits and return the groups of each.

    `heldout` is a share of all groups, `tune` of the rest. Clusters come in an order that depends
    on the seed; each goes to the held-out groups if it still fits, then to the tuning ones. A split
    therefore has the requested number of groups, or fewer by less than the smallest cluster left.
    The held-out groups depend on the clusters, the seed and `heldout` alone.
    """
    members: dict[int, list[int]] = {}
    for name in sorted(cluster_of):
        members.setdefault(cluster_of[name], []).append(name)
    in_order = list(members.values())
    order = [in_order[i] for i in keyed_order(len(in_order), "heldout", seed)]
    heldout_groups, rest = _fill(order, round(heldout * len(cluster_of)))
    tune_groups, rest = _fill(rest, round(tune * sum(map(len, rest))))
    return {"train": sum(rest, []), "tune": tune_groups, "heldout": heldout_groups}


def _near(
    thumbnails: Thumbnails, nearer_than: float
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Yield rows and columns of the pairs that are nearer, block by block, some pairs twice."""
    for start in range(0, len(thumbnails), _ROWS_A_BLOCK):
        block = thumbnails[start : start + _ROWS_A_BLOCK]
        rows, columns = np.nonzero(distances(block, thumbnails[start:]) < nearer_than)
        yield rows + start, columns + start


def _fill(clusters: list[list[int]], room: int) -> tuple[list[int], list[list[int]]]:
    """Take the clusters that fit, in order; returns the groups taken and the clusters left."""
    taken: list[int] = []
    left: list[list[int]] = []
    for cluster in clusters:
        if len(cluster) <= room - len(taken):
            taken += cluster
        else:
            left.append(cluster)
    return taken, left
