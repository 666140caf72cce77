"""Near-duplicates: clusters of groups whose pictures are nearly equal, and splits between them.

The distance of two pictures is the root mean square, over pixels and channels, of the difference of
their thumbnails: 12 x 12 RGB in 0..1, averaged over areas. Clusters are those of single linkage:
groups are joined where two of their pictures are nearer than a threshold.

All pairs are too many for a million pictures. There hashes of 64 bits come first: pictures whose
hashes differ in more than some bits are not compared (`hash_pairs`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from m3i_fast.pipelines.dataset.pack import keyed_order

COMPARED_SIZE = 72  # side in pixels at which drawings are rendered to be compared
SIDE = 12  # side of a thumbnail in pixels
NEARER_THAN = 0.05
_ROWS_A_BLOCK = 512  # bounds the memory of the [block, N] distances
HASHED_SIDE = 32  # side in pixels of what is hashed
MOST_BITS = 10  # that hashes may differ in: with more of them, most pairs would be compared

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


class Clusters:
    """Numbers in clusters, each of which is called by its least one; at first each is alone."""

    def __init__(self) -> None:
        self._lower: dict[int, int] = {}  # another one of the cluster, of all but the least

    def __getitem__(self, number: int) -> int:
        """Return the least number of a number's cluster."""
        lower = self._lower
        while number in lower:
            below = lower[number]
            if below in lower:
                lower[number] = below = lower[below]
            number = below
        return number

    def join(self, one: int, other: int) -> None:
        """Make one cluster of those of two numbers."""
        low, high = sorted((self[one], self[other]))
        if low != high:
            self._lower[high] = low


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
    clusters = Clusters()
    for rows, columns in _near(thumbnails, nearer_than):
        pairs = np.unique(np.stack([of_row[rows], of_row[columns]], 1), axis=0)
        for one, other in pairs.tolist():
            clusters.join(one, other)
    return {name: clusters[name] for name in np.unique(of_row).tolist()}


def split_clusters(
    cluster_of: Mapping[int, int],  # group -> cluster
    *,
    seed: int,
    heldout: float,
    tune: float,
    fold: int = 0,
) -> dict[str, list[int]]:
    """Deal whole clusters into splits and return the groups of each.

    `heldout` is a share of all groups, `tune` of the rest. Clusters come in an order that depends
    on the seed; each goes to the held-out groups if it still fits, then to the tuning ones. A split
    therefore has the requested number of groups, or fewer by less than the smallest cluster left.
    Fold k holds out what follows on the held-out groups of the folds before it, so that no group is
    in those of two folds. The held-out groups depend on the clusters, the seed, `heldout` and the
    fold alone.
    """
    members: dict[int, list[int]] = {}
    for name in sorted(cluster_of):
        members.setdefault(cluster_of[name], []).append(name)
    in_order = list(members.values())
    order = [in_order[i] for i in keyed_order(len(in_order), "heldout", seed)]
    following = order
    for _ in range(fold + 1):
        heldout_groups, following = _fill(following, round(heldout * len(cluster_of)))
    held_out = set(heldout_groups)
    rest = [cluster for cluster in order if not held_out.intersection(cluster)]
    tune_groups, rest = _fill(rest, round(tune * sum(map(len, rest))))
    return {"train": sum(rest, []), "tune": tune_groups, "heldout": heldout_groups}


# ---- Hashes --------------------------------------------------------------------------------------


def _cosines() -> npt.NDArray[np.int64]:  # [8, HASHED_SIDE]
    """Return the first rows of a cosine transform, times 2 ** 20."""
    angles = np.arange(8)[:, None] * (2 * np.arange(HASHED_SIDE) + 1) * np.pi / (2 * HASHED_SIDE)
    return np.round(np.cos(angles) * 2**20).astype(np.int64)


_COSINES = _cosines()


def perceptual_hash(gray: npt.NDArray[np.uint8]) -> int:  # [HASHED_SIDE, HASHED_SIDE]
    """Hash a picture to 64 bits: which of its 8 x 8 lowest frequencies are above their median.

    It is the pHash of imagehash, in integers, so that it is the same on every machine.
    """
    frequencies = (_COSINES @ gray.astype(np.int64) @ _COSINES.T).ravel()
    middle = np.sort(frequencies)[31:33].sum()
    return int.from_bytes(np.packbits(2 * frequencies > middle).tobytes(), "big")


def hash_pairs(
    hashes: npt.NDArray[np.uint64],  # [N]
    most_bits: int,
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Yield rows and others of the pairs that differ in at most `most_bits` bits, some repeatedly.

    Of most_bits + 1 parts of such a pair's hashes one part is equal. Those that are equal in a part
    stand together when they are sorted by it, and are compared with the next, the one after that,
    and so on: O(N) memory, and time of O(N log N) and of the pairs that are equal in a part, which
    are about (most_bits + 1) N^2 / 2^(64 / (most_bits + 1) + 1).
    """
    num_parts = most_bits + 1
    bounds = [64 * i // num_parts for i in range(num_parts + 1)]
    for low, high in pairwise(bounds):
        part = hashes << np.uint64(64 - high) >> np.uint64(64 - high + low)
        order = np.argsort(part, kind="stable")
        part = part[order]
        at, ahead = np.arange(len(order)), 1
        while len(at):
            at = at[at + ahead < len(order)]
            at = at[part[at] == part[at + ahead]]
            rows, others = order[at], order[at + ahead]
            near = np.bitwise_count(hashes[rows] ^ hashes[others]) <= most_bits
            yield rows[near], others[near]
            ahead += 1


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
