import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from sklearn.model_selection import GroupKFold

from m3i_fast.evaluation.probes.accuracy import (
    balanced_accuracy,
    grouped_folds,
    largest_class,
    mean_by_group,
    top_k_hits,
)


def test_balanced_accuracy_equals_sklearn() -> None:
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (200,), generator=rng) * 2  # classes 0, 2 .. 8: gaps in between
    predictions = torch.where(torch.rand(200, generator=rng) < 0.6, labels, 4)
    oracle = balanced_accuracy_score(labels.numpy(), predictions.numpy())
    assert balanced_accuracy(predictions, labels) == pytest.approx(oracle, abs=1e-12)


def test_top_k_hits_are_scikit_learns() -> None:
    rng = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(3, 50, 7, generator=rng), torch.randint(0, 7, (50,), generator=rng)
    for k in (1, 3, 6):
        got = top_k_hits(logits, labels, k=k).double().mean(-1)
        for r in range(3):
            oracle = top_k_accuracy_score(labels.numpy(), logits[r].numpy(), k=k, labels=range(7))
            assert float(got[r]) == pytest.approx(oracle)
    assert bool(top_k_hits(logits, labels, k=9).all())


def test_equal_logits_are_one_hit_and_no_number_is_none() -> None:
    labels = torch.arange(4)
    assert top_k_hits(torch.zeros(4, 4), labels, k=2).tolist() == [True, True, False, False]
    broken = torch.eye(4)
    broken[0, 3], broken[1, 1] = torch.nan, torch.inf
    assert top_k_hits(broken, labels, k=1).tolist() == [False, False, True, True]


def test_mean_by_group_counts_each_group_once() -> None:
    values, group = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([7, 7, 7, 2])
    torch.testing.assert_close(mean_by_group(values, group), torch.tensor([1.0, 1 / 3]).double())


def test_largest_class() -> None:
    assert largest_class(torch.tensor([3, 1, 3, 1, 0])) == 1


def test_folds_keep_groups_whole_and_are_as_even_as_sklearns() -> None:
    group = torch.arange(103).repeat_interleave(torch.arange(103) % 4 + 1) * 10
    fold = grouped_folds(group, num_folds=5, seed=1)
    sizes = [len(group[fold == i].unique()) for i in range(5)]
    assert sum(sizes) == 103  # a group in two folds would be counted twice
    assert max(sizes) - min(sizes) <= 1
    splits = GroupKFold(n_splits=5).split(group, groups=group.numpy())
    assert max(sizes) <= max(len(group[torch.from_numpy(ask)].unique()) for _, ask in splits) + 1
    assert torch.equal(fold, grouped_folds(group, num_folds=5, seed=1))
    assert not torch.equal(fold, grouped_folds(group, num_folds=5, seed=2))


def test_too_few_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="group: expected at least 5 groups, got 2"):
        grouped_folds(torch.tensor([1, 1, 2, 2, 2, 2]), num_folds=5, seed=0)
