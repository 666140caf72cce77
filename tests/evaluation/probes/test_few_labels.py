"""A few labels a category: what is drawn, and scikit-learn's hits with settings chosen likewise."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from m3i_fast.evaluation.probes.cross_validation import NEIGHBOURS
from m3i_fast.evaluation.probes.few_labels import NUM_DRAWS, STRENGTHS, draw_labels, few_label_hits


def _digits() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    rng = torch.Generator().manual_seed(0)
    rows = torch.from_numpy(digits.data[:900]).float()
    return rows + 6 * torch.randn(rows.shape, generator=rng), torch.from_numpy(digits.target[:900])


def test_five_concepts_a_category_one_in_each_fold() -> None:
    _, label = _digits()
    group = torch.arange(900) // 2  # two items a concept, of any category
    rows, fold = draw_labels(label, group, seed=0)
    assert torch.bincount(label[rows]).tolist() == [5] * 10
    assert len(group[rows].unique()) == 50
    for f in range(5):
        assert label[rows[fold == f]].sort().values.tolist() == list(range(10))
    again, other = draw_labels(label, group, seed=0)[0], draw_labels(label, group, seed=1)[0]
    assert torch.equal(rows, again) and not torch.equal(rows, other)


def test_a_rare_category_gives_all_it_has() -> None:
    label = torch.tensor([0] * 20 + [1] * 3 + [2])
    rows, fold = draw_labels(label, torch.arange(24), seed=0)
    assert torch.bincount(label[rows]).tolist() == [5, 3, 1]
    assert sorted(fold[label[rows] == 1].tolist()) == [0, 1, 2]


def test_nothing_to_choose_on_is_refused() -> None:
    with pytest.raises(ValueError, match="label: expected a category of at least 2 concepts"):
        draw_labels(torch.arange(9), torch.arange(9), seed=0)
    with pytest.raises(ValueError, match="label: expected a category of at least 2 concepts"):
        draw_labels(torch.zeros(9, dtype=torch.int64), torch.zeros(9), seed=0)


def _probe(l2: float, num: int) -> object:
    return make_pipeline(
        StandardScaler(), LogisticRegression(C=1 / (l2 * num), tol=1e-10, max_iter=100_000)
    )


def _knn(k: int, num: int) -> object:
    return KNeighborsClassifier(
        n_neighbors=k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / 0.07),
    )


def _sklearn_hits(make, settings, features, label, asked, right) -> np.ndarray:  # type: ignore[no-untyped-def]
    draws = []
    for draw in range(NUM_DRAWS):
        rows, fold = draw_labels(label, torch.arange(len(label)), seed=draw)
        x, y, fold = features[rows].double().numpy(), label[rows].numpy(), fold.numpy()

        def score(setting, x=x, y=y, fold=fold) -> int:  # type: ignore[no-untyped-def]
            hits = 0
            for f in range(5):
                model = make(setting, int((fold != f).sum())).fit(x[fold != f], y[fold != f])
                hits += int((model.predict(x[fold == f]) == y[fold == f]).sum())
            return hits

        best = max(settings, key=score)  # the first of equals
        model = make(best, len(rows)).fit(x, y)
        draws.append(model.predict(asked.double().numpy()) == right.numpy())
    return np.mean(draws, axis=0)


@pytest.mark.parametrize(
    ("measure", "make", "settings"),
    [
        ("few_label_top1", _probe, STRENGTHS),
        ("few_label_knn_top1", _knn, [k for k in NEIGHBOURS if k <= 40]),
    ],
)
def test_hits_are_sklearns_averaged_over_draws(measure, make, settings) -> None:  # type: ignore[no-untyped-def]
    features, label = _digits()
    fit, ask = slice(0, 600), slice(600, 900)
    got = few_label_hits(
        features[fit], label[fit], torch.arange(600), features[ask], label[ask], seed=0
    )[measure]
    oracle = _sklearn_hits(make, settings, features[fit], label[fit], features[ask], label[ask])
    assert np.abs(got.numpy() - oracle).mean() < 0.002
    assert got.shape == (300,) and got.dtype == torch.float64
    assert 0.4 < float(got.mean()) < 0.95
    assert {round(3 * float(hit)) for hit in got.unique()} == {0, 1, 2, 3}
