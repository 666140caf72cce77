"""Random numbers as a pure function of (seed, purpose, position, index).

A sample's draws are keyed by its position in the run, so that they are the same on any number of
ranks, in any batch and after any resume, and no generator has a state that a checkpoint must hold.
Legend: N positions.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio, as SplitMix64's
_FLOAT_STEP = np.float32(2**-24)


class Purpose(IntEnum):
    """What is drawn; draws of two purposes are independent. A value never gets another meaning."""

    CAPTION = 0
    """Which of several captions a sample has."""
    ALTERNATE = 1
    """Which other picture of a sample a view is cut from."""
    TOKEN_DROP = 2
    """Which caption tokens are dropped."""
    CELLS = 3
    """Which cells of the token grid each image of an input shows."""
    OWN_QUERIES = 4
    """Which hidden cells are predicted of an image's own view."""
    OTHER_QUERIES = 5
    """Which cells are predicted of another view."""
    BLEND = 6
    """The weights of two images whose pixels are blended."""
    DROP_PATH = 7
    """Which residual branches of an encoder are dropped for a row (stochastic depth)."""
    DROP_PATH_LOCAL = 8
    """Those of the rows of local views."""
    REPLACEMENT = 9
    """Which sample stands in for one that cannot be used."""
    GENERATOR = 10
    """The seed of torch's generators in a step, for modules that draw from them."""
    VIEW_TOKENS = 11
    """How many patches each view of a sample may have, where views are of any size."""
    SLICES = 12
    """The random directions of a step, on which embeddings are projected."""
    REGIONS = 13
    """Which regions a view has, where it shows more than a batch has room for."""


def uniform(
    positions: NDArray[np.int64],  # [N]
    count: int,
    *,
    seed: int,
    purpose: Purpose,
) -> NDArray[np.float32]:  # [N, count]
    """Return `count` numbers of [0, 1) for each position, multiples of 2**-24.

    Entry [n, i] depends on (seed, purpose, positions[n], i) alone. Raises ValueError as `words`.
    """
    halves = words(positions, -(-count // 2), seed=seed, purpose=purpose)
    bits = halves.astype("<u8", copy=False).view("<u4") >> np.uint32(8)
    return bits[:, :count].astype(np.float32, order="C") * _FLOAT_STEP


def words(
    positions: NDArray[np.int64],  # [N]
    count: int,
    *,
    seed: int,
    purpose: Purpose,
) -> NDArray[np.uint64]:  # [N, count]
    """Return `count` random words of 64 bits for each position.

    Row n is the stream of SplitMix64 (Steele, Lea and Flood, 2014) whose seed is a hash of (seed,
    purpose, positions[n]). Raises ValueError for a negative position or count, or a seed outside
    [0, 2**64).
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected 0 to 2**64 - 1, got {seed}")
    if count < 0:
        raise ValueError(f"count: expected 0 or more, got {count}")
    positions = np.asarray(positions, np.int64)
    if positions.ndim != 1:
        raise ValueError(f"positions: expected [N], got {list(positions.shape)}")
    if positions.size and positions.min() < 0:
        raise ValueError(f"positions: expected 0 or more, got {positions.min()}")
    with np.errstate(over="ignore"):  # of the products of scalars; those of arrays wrap silently
        key = finalise(np.array([seed], np.uint64) + _GAMMA * np.uint64(int(purpose) + 1))
        keys = finalise(key + _GAMMA * (positions.astype(np.uint64) + np.uint64(1)))
        steps = _GAMMA * np.arange(1, count + 1, dtype=np.uint64)
    return finalise(keys[:, None] + steps)


def finalise(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash words in place by SplitMix64's finaliser, a permutation of them; return x."""
    shifted = x >> np.uint64(30)
    x ^= shifted
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= np.right_shift(x, np.uint64(27), out=shifted)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= np.right_shift(x, np.uint64(31), out=shifted)
    return x
