"""The probe of patches against scikit-learn: IoU, predictions, folds without a shared concept."""

from functools import cache, partial

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from m3i_fast.evaluation.dense.correspondence import patch_pixels
from m3i_fast.evaluation.dense.patch_probe import (
    DenseResult,
    SceneSets,
    build_scenes,
    guess_scenes,
    mean_iou,
    overlaps,
    patch_features,
    probe_scenes,
)
from m3i_fast.evaluation.dense.scenes import IGNORED
from m3i_fast.evaluation.probes.accuracy import grouped_folds

GRID = 4
CPU = torch.device("cpu")
pixels = partial(patch_pixels, grid=GRID)


def _digits(start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """Handwritten digits in black on white, each a concept."""
    digits = load_digits()
    ink = torch.from_numpy(digits.images[start:stop]).float()
    views = (255 - 15 * ink).clamp(0, 255).to(torch.uint8)
    views = views.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand(-1, 3, -1, -1)
    label = torch.from_numpy(digits.target[start:stop]).long()
    return views.contiguous(), label, torch.arange(start, stop)


@cache
def _sets() -> SceneSets:
    return build_scenes(_digits(0, 200), _digits(200, 280), grid=GRID)


@cache
def _pixel_result() -> DenseResult:
    return probe_scenes(_sets(), pixels, CPU)


def _asked(sets: SceneSets) -> tuple[Tensor, Tensor, Tensor]:  # keep, label, group
    keep = sets.heldout.label != IGNORED
    return keep, sets.heldout.label[keep], sets.heldout.group[keep]


def test_mean_iou_is_sklearns_jaccard_score() -> None:
    rng = torch.Generator().manual_seed(0)
    label, group = (torch.randint(0, high, (500,), generator=rng) for high in (5, 30))
    predicted = torch.where(torch.rand(500, generator=rng) < 0.5, label, label.flip(0))
    predicted[predicted == 4] = 6  # never right, and a class that is only predicted
    overlap = overlaps(label, predicted, group, 9)  # 5, 7 and 8 are neither
    expected = jaccard_score(label, predicted, average="macro", zero_division=0)
    assert float(mean_iou(overlap.sum(0))) == pytest.approx(expected, abs=1e-12)
    for row, concept in enumerate(group.unique().tolist()):
        own = group == concept
        table = confusion_matrix(label[own], predicted[own], labels=range(9))
        stacked = np.stack([table.diagonal(), table.sum(1), table.sum(0)])
        assert np.array_equal(overlap[row].numpy(), stacked)
    assert mean_iou(overlap).shape == (30,)


def test_the_probe_is_sklearns_on_the_same_patches() -> None:
    sets = _sets()
    result = _pixel_result()
    keep, label, group = _asked(sets)
    rows = patch_features(sets.train, sets.fit, pixels, CPU)
    by_hand = [
        view[:, y * 8 : y * 8 + 8, x * 8 : x * 8 + 8].flatten() / 255
        for view, kept in zip(sets.train.views, sets.fit, strict=True)
        for y, x in (divmod(n, GRID) for n in kept.nonzero()[:, 0].tolist())
    ]
    assert torch.equal(rows, torch.stack(by_hand))
    assert result.l2 is not None
    oracle = make_pipeline(
        StandardScaler(),
        LogisticRegression(C=1 / (result.l2 * len(rows)), tol=1e-9, max_iter=100_000),
    ).fit(rows.double().numpy(), sets.train.label[sets.fit].numpy())
    predicted = oracle.predict(patch_features(sets.heldout, keep, pixels, CPU).double().numpy())
    expected = jaccard_score(label, predicted, average="macro")
    assert float(mean_iou(result.overlap.sum(0))) == pytest.approx(expected, abs=2e-3)
    each = [accuracy_score(label[group == g], predicted[group == g]) for g in group.unique()]
    assert np.abs(result.hits.numpy() - each).max() < 0.1
    assert float(result.hits.mean()) == pytest.approx(np.mean(each), abs=2e-3)
    assert 0.15 < float(result.hits.mean()) < 0.9


def test_chance_is_the_category_of_most_patches() -> None:
    sets = _sets()
    _, label, group = _asked(sets)
    guess = guess_scenes(sets)
    most = int(np.bincount(label.numpy()).argmax())
    share = jaccard_score(label, np.full(len(label), most), average="macro", zero_division=0)
    assert float(mean_iou(guess.overlap.sum(0))) == pytest.approx(share)
    assert guess.hits.shape == group.unique().shape and guess.l2 is None
    assert set(guess.hits.tolist()) == {0.0, 1.0}


def test_features_that_know_the_category_get_all_right_and_noise_gets_chance() -> None:
    label = torch.arange(40) % 4
    colour = torch.tensor([[200, 0, 0], [0, 200, 0], [0, 0, 200], [100, 100, 0]])[label]
    drawings = colour.to(torch.uint8)[:, :, None, None].expand(-1, -1, 32, 32).contiguous()
    sets = build_scenes(
        (drawings, label, torch.arange(40)), (drawings, label, 40 + torch.arange(40)), grid=GRID
    )

    def without(views: Tensor) -> Tensor:  # share of the patch that has no red, green, blue
        return (patch_pixels(views, GRID) == 0).double().unflatten(-1, (3, -1)).mean(-1)

    knows = probe_scenes(sets, without, CPU)
    assert float(mean_iou(knows.overlap.sum(0))) == 1.0 and bool((knows.hits == 1).all())
    noise = probe_scenes(sets, lambda views: torch.randn(len(views), GRID * GRID, 4), CPU)
    assert float(noise.hits.mean()) == pytest.approx(0.25, abs=0.05)


def test_no_scene_has_concepts_of_two_folds() -> None:
    sets = _sets()
    fold = grouped_folds(torch.arange(200), num_folds=5, seed=0)
    labelled = sets.train.group != IGNORED
    expected = sets.train_fold[:, None].expand_as(labelled)[labelled]
    assert torch.equal(fold[sets.train.group[labelled]], expected)
    assert sets.train_fold.bincount().tolist() == [80] * 5


def test_the_strength_does_not_depend_on_the_held_out_scenes() -> None:
    drawings, label, group = _digits(200, 280)
    wrong = build_scenes(_digits(0, 200), (255 - drawings // 2, label.flip(0), group), grid=GRID)
    assert torch.equal(wrong.train.views, _sets().train.views)
    right, other = _pixel_result(), probe_scenes(wrong, pixels, CPU)
    assert other.l2 == right.l2
    assert float(mean_iou(other.overlap.sum(0))) < float(mean_iou(right.overlap.sum(0)))
