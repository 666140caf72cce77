"""Recall at K both ways: as counting by hand says, and ties as a random order has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from m3i_fast.evaluation.rows import retrieval
from m3i_fast.evaluation.rows.retrieval import expected_hit, recall_hits

RANDOM = np.random.default_rng(11)
IMAGES = RANDOM.normal(size=(40, 8)).astype(np.float32)
CAPTION_ROW = np.sort(np.concatenate([np.arange(40), RANDOM.integers(0, 40, 50)]))
TEXTS = (IMAGES[CAPTION_ROW] + RANDOM.normal(size=(90, 8))).astype(np.float32)
KS = (1, 5, 10)


def unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    result: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return result


def random_order(similarity: np.ndarray, right: np.ndarray, draws: int) -> np.ndarray:
    """Hits at KS of each query, averaged over orders in which equal items are shuffled."""
    hits = np.zeros((len(KS), len(similarity)))
    for _ in range(draws):
        shuffled = RANDOM.permutation(similarity.shape[1])
        order = np.argsort(-similarity[:, shuffled], axis=1, kind="stable")
        sorted_right = np.take_along_axis(right[:, shuffled], order, 1)
        hits += [sorted_right[:, :k].any(1) for k in KS]
    return hits / draws


@pytest.mark.parametrize("blocks", [(1024, 4096), (7, 13)])
def test_recall_both_ways_is_that_of_a_full_sort(
    blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "QUERY_BLOCK", blocks[0])
    monkeypatch.setattr(retrieval, "GALLERY_BLOCK", blocks[1])
    rows, captions = np.arange(40), np.arange(90)
    similarity = unit(IMAGES) @ unit(TEXTS).T
    right = rows[:, None] == CAPTION_ROW
    found = recall_hits(IMAGES, rows, rows, TEXTS, captions, CAPTION_ROW)
    assert np.array_equal(found, random_order(similarity, right, 1))
    back = recall_hits(TEXTS, captions, CAPTION_ROW, IMAGES, rows, rows)
    assert np.array_equal(back, random_order(similarity.T, right.T, 1))
    assert 0.2 < found[0].mean() < found[2].mean()


def test_equal_items_are_hit_as_often_as_by_chance() -> None:
    texts = TEXTS.copy()
    texts[10:60] = texts[10]  # one text for several pictures, and several times for one
    similarity = np.round(unit(IMAGES) @ unit(texts).T, 12)
    right = np.arange(40)[:, None] == CAPTION_ROW
    rows, captions = np.arange(40), np.arange(90)
    found = recall_hits(IMAGES, rows, rows, texts, captions, CAPTION_ROW)
    assert 0 < (found % 1 > 0).mean()
    np.testing.assert_allclose(found, random_order(similarity, right, 4000), atol=0.05)


def test_an_encoder_of_one_point_has_the_recall_of_chance() -> None:
    rows = np.arange(40)
    one = np.ones((40, 8), dtype=np.float32)
    found = recall_hits(one, rows, rows, one, rows, rows)
    np.testing.assert_allclose(found.mean(1), [1 / 40, 5 / 40, 10 / 40])


def test_right_ones_among_the_tied_are_drawn_without_replacement() -> None:
    def value(better: int, tied: int, right: int, k: int) -> float:
        return float(expected_hit(*(torch.tensor([n]) for n in (better, tied, right)), k=k))

    assert value(0, 1, 1, 1) == 1
    assert value(5, 1, 1, 5) == 0
    assert value(0, 4, 2, 2) == pytest.approx(1 - (2 * 1) / (4 * 3))
    assert value(3, 4, 1, 5) == pytest.approx(2 / 4)
    assert value(0, 3, 2, 2) == 1


def test_a_query_without_an_item_of_its_own_is_refused() -> None:
    rows = np.arange(40)
    with pytest.raises(ValueError, match="gallery: expected an item of every query, got none of 7"):
        recall_hits(IMAGES, rows, rows, IMAGES, rows, np.where(rows == 7, 8, rows))


@pytest.mark.parametrize("side", [0, 1])
def test_rows_that_are_not_finite_have_no_recall(side: int) -> None:
    """No text is nearer than NaN, which made every picture a hit."""
    sides = [IMAGES.copy(), TEXTS.copy()]
    sides[side][7] = np.nan
    rows, captions = np.arange(40), np.arange(90)
    with pytest.raises(ValueError, match="expected finite features, got NaN or infinity"):
        recall_hits(sides[0], rows, rows, sides[1], captions, CAPTION_ROW)
