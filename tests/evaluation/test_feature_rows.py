"""Rows are taken as NumPy takes them, joined or not; what is not finite is refused."""

from pathlib import Path

import numpy as np
import pytest

from m3i_fast.evaluation.feature_rows import ROWS_A_SLICE, Joined, slices, take


def test_joined_rows_are_those_of_the_concatenation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((7, c)).astype(np.float32) for c in (3, 1, 4)]
    np.save(tmp_path / "mean_1.npy", parts[0])
    joined = Joined(np.load(tmp_path / "mean_1.npy", mmap_mode="r"), *parts[1:])
    whole = np.concatenate(parts, axis=1)
    assert joined.shape == (7, 8)
    for index in (slice(2, 5), np.array([6, 0, 6])):
        assert np.array_equal(take("x", joined, index).numpy(), whole[index])


def test_joined_rows_have_one_number() -> None:
    with pytest.raises(ValueError, match=r"parts: expected arrays of one number of rows, got \{"):
        Joined(np.zeros((3, 2)), np.zeros((4, 2)))


def test_what_is_taken_is_a_copy_and_finite() -> None:
    rows = np.zeros((4, 2), dtype=np.float32)
    take("x", rows, slice(0, 2)).fill_(1)
    assert not rows.any()
    rows[3, 1] = np.inf
    assert take("x", rows, slice(0, 3)).shape == (3, 2)
    with pytest.raises(ValueError, match="mean_1: expected finite features"):
        take("mean_1", rows, slice(2, 4))


@pytest.mark.parametrize("num", [0, 1, ROWS_A_SLICE, ROWS_A_SLICE + 1])
def test_slices_cover_all_rows(num: int) -> None:
    index = [i for part in slices(num) for i in range(num)[part]]
    assert index == list(range(num))
