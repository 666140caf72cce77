"""The queries that are shown are those of the largest and the smallest margin of a full sort."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from m3i_fast.evaluation.rows import retrieval, retrieval_examples
from m3i_fast.evaluation.rows.retrieval_examples import Sides, best_and_worst

RANDOM = np.random.default_rng(13)
IMAGES = RANDOM.normal(size=(30, 8)).astype(np.float32)
CAPTION_ROW = np.sort(np.concatenate([np.arange(30), RANDOM.integers(0, 30, 25)]))
TEXTS = (IMAGES[CAPTION_ROW] + RANDOM.normal(size=(55, 8))).astype(np.float32)
PICTURES, CAPTIONS = np.arange(30), np.arange(55)
SIDES = {
    "captions": Sides(TEXTS, CAPTIONS, CAPTION_ROW, IMAGES, PICTURES, PICTURES),
    "pictures": Sides(IMAGES, PICTURES, PICTURES, TEXTS, CAPTIONS, CAPTION_ROW),
}


@pytest.mark.parametrize("name", SIDES)
@pytest.mark.parametrize("blocks", [(1024, 4096), (7, 11)])
def test_best_and_worst_are_those_of_a_full_sort(
    name: str, blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval_examples, "QUERY_BLOCK", blocks[0])
    monkeypatch.setattr(retrieval, "GALLERY_BLOCK", blocks[1])
    sides = SIDES[name]
    cosine = cosine_similarity(sides.queries.astype(np.float64), sides.gallery.astype(np.float64))
    is_own = sides.query_item[:, None] == sides.gallery_item
    own = np.where(is_own, cosine, -np.inf).max(1)
    margin = own - np.where(is_own, -np.inf, cosine).max(1)
    order = np.argsort(-margin)
    found = best_and_worst(sides, num_each=3, k=5)
    assert found.queries.tolist() == [*order[:3], *order[-3:]]
    np.testing.assert_array_equal(found.found, np.argsort(-cosine[found.queries], axis=1)[:, :5])
    ranks = [(cosine[row][~is_own[row]] > own[row]).sum() for row in found.queries]
    assert found.rank.tolist() == ranks
    assert ranks[:3] == [0, 0, 0] and min(ranks[3:]) > 0  # the others are found, these are not


def test_rows_are_taken_by_their_numbers_and_few_queries_are_all_shown() -> None:
    rows = np.array([4, 2, 9])
    sides = Sides(IMAGES, rows, rows, IMAGES, rows, rows)
    found = best_and_worst(sides, num_each=2, k=5)
    assert sorted(found.queries.tolist()) == [0, 1, 2] and found.rank.tolist() == [0, 0, 0]
    assert found.found.shape == (3, 3) and found.found[:, 0].tolist() == found.queries.tolist()


def test_a_tie_counts_against_the_query() -> None:
    same = np.ones((4, 3), np.float32)
    sides = Sides(same, PICTURES[:4], PICTURES[:4], same, PICTURES[:4], PICTURES[:4])
    assert best_and_worst(sides, num_each=2, k=1).rank.tolist() == [3, 3, 3, 3]
