import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from m3i_fast.evaluation.probes import knn as knn_module
from m3i_fast.evaluation.probes.knn import knn_predict, knn_predict_each


def _digits() -> tuple[Tensor, Tensor, Tensor]:
    digits = load_digits()
    rows = torch.from_numpy(digits.data).float()
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    rows = rows + 12 * noise  # hard enough that k and weights matter
    return rows[:1200], torch.from_numpy(digits.target[:1200]).long(), rows[1200:]


@pytest.mark.parametrize("k", [1, 5, 20, 200])
@pytest.mark.parametrize("temperature", [0.02, 0.07, 1.0])
def test_predictions_equal_sklearn(k: int, temperature: float) -> None:
    bank, labels, queries = _digits()
    oracle = KNeighborsClassifier(
        n_neighbors=k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / temperature),
    ).fit(bank.double().numpy(), labels.numpy())
    expected = torch.from_numpy(oracle.predict(queries.double().numpy()))
    assert torch.equal(knn_predict(bank, labels, queries, k=k, temperature=temperature), expected)


def test_several_k_and_chunks_give_what_one_k_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, labels, queries = _digits()
    alone = [knn_predict(bank, labels, queries, k=k) for k in (1, 7, 30)]
    assert not torch.equal(alone[0], alone[2])
    monkeypatch.setattr(knn_module, "_QUERIES_A_CHUNK", 100)  # 597 queries: the last chunk is short
    assert torch.equal(knn_predict_each(bank, labels, queries, ks=(1, 7, 30)), torch.stack(alone))


def test_the_length_of_a_feature_does_not_matter() -> None:
    bank, labels, queries = _digits()
    scaled = queries * torch.linspace(0.1, 90, len(queries))[:, None]
    assert torch.equal(
        knn_predict(bank, labels, queries, k=5), knn_predict(bank, labels, scaled, k=5)
    )


@pytest.mark.parametrize("k", [0, 1201])
def test_a_k_that_the_bank_cannot_serve_is_refused(k: int) -> None:
    bank, labels, queries = _digits()
    with pytest.raises(ValueError, match=rf"k: expected values in 1..1200 .*, got \[{k}\]"):
        knn_predict(bank, labels, queries, k=k)
