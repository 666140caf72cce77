"""Draws keyed by position: uniform, independent of each other, and the same in any batch."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from m3i_fast.keyed_draws import Purpose, uniform, words

N = 20_000


def draws(**changed: object) -> np.ndarray:
    options: dict = {"seed": 3, "purpose": Purpose.CELLS, **changed}
    return uniform(np.arange(N), 3, **options)


def splitmix64(seed: int, count: int) -> list[int]:
    """The published generator, in whole numbers of Python."""
    found, mask = [], 2**64 - 1
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        found.append(z ^ (z >> 31))
    return found


def test_a_row_is_the_stream_of_splitmix64() -> None:
    """Seeded by the stream of the purpose's word in the stream of the seed."""
    seed, purpose, position = 2**64 - 5, Purpose.REPLACEMENT, 10**12
    mask, gamma = 2**64 - 1, 0x9E3779B97F4A7C15
    key = splitmix64((seed + gamma * int(purpose)) & mask, 1)[0]
    key = splitmix64((key + gamma * position) & mask, 1)[0]
    found = words(np.array([position]), 5, seed=seed, purpose=purpose)
    assert found.tolist() == [splitmix64(key, 5)]


def test_values_do_not_change() -> None:
    """A change of these is another run from the same seed: raise ORDER_VERSION with it."""
    found = uniform(np.array([0, 1, 10**12]), 3, seed=7, purpose=Purpose.CELLS)
    assert (found * 2**24).astype(int).tolist() == GOLDEN


GOLDEN = [
    [3131122, 8360059, 4954871],
    [524200, 11974345, 11856833],
    [3001221, 7242549, 11649224],
]


def test_an_entry_does_not_depend_on_its_batch() -> None:
    whole = draws()
    rows = np.array([17, 4, 4, N - 1])
    assert (uniform(rows, 3, seed=3, purpose=Purpose.CELLS) == whole[rows]).all()
    for count in (0, 1, 2, 7):
        wider = uniform(rows, 8, seed=3, purpose=Purpose.CELLS)
        found = uniform(rows, count, seed=3, purpose=Purpose.CELLS)
        assert found.shape == (4, count) and (found == wider[:, :count]).all()
    assert uniform(np.arange(0), 3, seed=3, purpose=Purpose.CELLS).shape == (0, 3)


def test_draws_are_uniform() -> None:
    """By position at one index, by index at one position, and in every low bit."""
    by_position = draws()
    assert by_position.dtype == np.float32
    assert by_position.min() >= 0 and by_position.max() < 1
    by_index = uniform(np.array([5]), N, seed=3, purpose=Purpose.CELLS)[0]
    for sample in (*by_position.T, by_index):
        assert stats.kstest(sample, "uniform").pvalue > 1e-3
        low = (sample * 2**24).astype(np.int64) % 64
        assert stats.chisquare(np.bincount(low, minlength=64)).pvalue > 1e-3


OTHERS = {
    "seed": draws(seed=4),
    "a high bit of the seed": draws(seed=3 + 2**63),
    "purpose": draws(purpose=Purpose.OWN_QUERIES),
    "index": np.roll(draws(), 1, axis=1),
    "position": np.roll(draws(), 1, axis=0),
}


@pytest.mark.parametrize("other", OTHERS)
def test_draws_are_independent_of_others(other: str) -> None:
    """Pairs fill the unit square evenly: 16 x 16 cells by chi-square, as NumPy's own would."""
    first, second = draws()[:, 0], OTHERS[other][:, 0]
    numpys = np.random.default_rng(0).random((2, N))
    for pair in ((first, second), numpys):
        counts = np.histogram2d(*pair, bins=16, range=[[0, 1], [0, 1]])[0]
        assert stats.chisquare(counts.flatten()).pvalue > 1e-3


def test_bad_arguments_are_named() -> None:
    for match, positions, count, seed in (
        ("seed: expected 0 to", np.arange(2), 1, -1),
        ("count: expected 0 or more, got -1", np.arange(2), -1, 0),
        (r"positions: expected \[N\], got \[1, 2\]", np.zeros((1, 2), np.int64), 1, 0),
        ("positions: expected 0 or more, got -3", np.array([1, -3]), 1, 0),
    ):
        with pytest.raises(ValueError, match=match):
            words(positions, count, seed=seed, purpose=Purpose.CELLS)
