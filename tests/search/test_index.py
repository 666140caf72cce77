"""The nearest rows are those of brute force in fp64, of equal ones the lower row first."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from m3i_fast.search import index as index_module
from m3i_fast.search.index import Index

F32 = NDArray[np.float32]


def brute_force(rows: F32, query: F32, num: int, among: NDArray[np.bool_]) -> list[int]:
    """All cosines in fp64 by NumPy."""
    wide = rows.astype(np.float64)
    unit = query.astype(np.float64)
    cosines = (wide @ unit) / np.linalg.norm(wide, axis=1) / np.linalg.norm(unit)
    order = sorted(np.flatnonzero(among), key=lambda row: (-cosines[row], row))
    return [int(row) for row in order[:num]]


@pytest.mark.parametrize(("num_rows", "width", "num"), [(1, 3, 5), (777, 129, 24), (5000, 64, 96)])
@pytest.mark.parametrize("chunk_bytes", [1000, 1 << 20])
def test_nearest_are_those_of_brute_force(
    num_rows: int, width: int, num: int, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "CHUNK_BYTES", chunk_bytes)
    rng = np.random.default_rng(num_rows)
    rows = rng.standard_normal((num_rows, width), np.float32)
    rows *= rng.uniform(0.01, 100, (num_rows, 1)).astype(np.float32)  # of any length
    index = Index(rows)
    for _ in range(5):
        query = rng.standard_normal(width, np.float32)
        among = rng.random(num_rows) < 0.7
        for mask in (None, among):
            found, cosines = index.nearest(torch.from_numpy(query), num, mask)
            allowed = np.ones(num_rows, bool) if mask is None else mask
            assert found.tolist() == brute_force(rows, query, num, allowed)
            near = rows[found].astype(np.float64)
            expected = near @ query / np.linalg.norm(near, axis=1) / np.linalg.norm(query)
            np.testing.assert_allclose(cosines, expected, rtol=0, atol=1e-6)


def test_rows_that_fp32_cannot_tell_apart_are_ordered_by_fp64() -> None:
    """Differences of a unit in the last place, of which products in fp32 lose nearly all."""
    rng = np.random.default_rng(1)
    base = rng.standard_normal(768).astype(np.float32)
    rows = np.tile(base, (3000, 1))
    nudged = np.arange(3000), rng.integers(0, 768, 3000)
    rows[nudged] = np.nextafter(rows[nudged], np.float32(9))
    rows = rows[rng.permutation(3000)]
    query = rng.standard_normal(768).astype(np.float32)
    in_fp32 = (rows / np.linalg.norm(rows, axis=1, keepdims=True)) @ query
    expected = brute_force(rows, query, 20, np.ones(3000, bool))
    assert np.argsort(-in_fp32, kind="stable")[:20].tolist() != expected  # it would not do
    assert Index(rows).nearest(torch.from_numpy(query), 20)[0].tolist() == expected


def test_equal_rows_come_in_their_order() -> None:
    rows = np.ones((50, 8), np.float32)
    rows[30:] *= 2
    assert Index(rows).nearest(torch.ones(8), 10)[0].tolist() == list(range(10))


def test_a_row_of_zeros_is_unlike_all_and_no_number_is_lost() -> None:
    rows = np.array([[0, 0], [1, 0], [-1, 0]], np.float32)
    found, cosines = Index(rows).nearest(torch.tensor([1.0, 0.0]), 3)
    assert found.tolist() == [1, 0, 2] and cosines.tolist() == [1, 0, -1]
    found, cosines = Index(rows).nearest(torch.zeros(2), 3)
    assert found.tolist() == [0, 1, 2] and cosines.tolist() == [0, 0, 0]
    nothing = Index(rows).nearest(torch.ones(2), 3, np.zeros(3, bool))
    assert [len(part) for part in nothing] == [0, 0]


def test_a_row_that_is_not_finite_hides_no_other() -> None:
    rows = np.array([[0, 1], [np.nan, 0], [1, 0], [np.inf, 0], [3e38, 3e38]], np.float32)
    found, cosines = Index(rows).nearest(torch.tensor([1.0, 0.0]), 5)
    assert found.tolist() == [2, 0] and cosines.tolist() == [1, 0]
    only = np.array([False, True, False, False, False])
    assert len(Index(rows).nearest(torch.ones(2), 5, only)[0]) == 0
    with pytest.raises(ValueError, match="expected a query of finite numbers"):
        Index(rows).nearest(torch.tensor([torch.nan, 0.0]), 5)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_small_integers_have_many_ties(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 4)))
    numbers = st.integers(-2, 2)
    rows = np.array(
        data.draw(st.lists(st.tuples(*[numbers] * shape[1]), min_size=shape[0], max_size=shape[0])),
        np.float32,
    )
    rows[~rows.any(1)] = 1
    query = np.array(data.draw(st.tuples(*[numbers] * shape[1])), np.float32)
    query[0] = query[0] or 1
    num = data.draw(st.integers(1, 50))
    found, cosines = Index(rows).nearest(torch.from_numpy(query), num)
    assert len(found) == min(num, len(rows)) and len(set(found.tolist())) == len(found)
    every = rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)
    np.testing.assert_allclose(cosines, np.sort(every)[::-1][:num], rtol=0, atol=1e-6)


def test_rows_are_read_from_a_file(tmp_path: object) -> None:
    file = str(tmp_path) + "/rows.npy"
    rows = np.random.default_rng(2).standard_normal((300, 40), np.float32)
    np.save(file, rows)
    query = torch.from_numpy(rows[17])
    mapped = Index(np.load(file, mmap_mode="c"))
    assert mapped.nearest(query, 5)[0].tolist() == Index(rows).nearest(query, 5)[0].tolist()
    assert mapped.nearest(query, 5)[0][0] == 17 and len(mapped) == 300
