"""Linear segmentation against plain torch modules, scikit-learn, and windows added by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import jaccard_score
from torch import Tensor, nn

from m3i_fast.evaluation.batches import LabelledBatch
from m3i_fast.evaluation.dense.segmentation import (
    IGNORED,
    LinearSegmentation,
    confusion_matrix,
    evaluate_segmentation,
    lr_factor,
    segmentation_loss,
    segmentation_scores,
    train_segmentation,
    window_logits,
    window_starts,
)

CPU = torch.device("cpu")
SIZE, PATCH, CLASSES = 32, 8, 4


def _encode(pictures: Tensor) -> Tensor:  # a token of zeros, and the mean colour of each patch
    cells = F.avg_pool2d(pictures.float() / 255, PATCH).flatten(2).mT
    return torch.cat([torch.zeros_like(cells[:, :1]), cells], 1)


def _pictures(num: int, height: int = SIZE, width: int = SIZE, seed: int = 0) -> LabelledBatch:
    """Patches of three colours and a rare fourth, with some pixels to ignore."""
    rng = torch.Generator().manual_seed(seed)
    rows, columns = height // PATCH, width // PATCH
    cells = torch.randint(0, 100, (num, rows, columns), generator=rng) % 33 // 10
    labels = cells.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
    colours = torch.tensor([[220, 30, 30], [30, 220, 30], [30, 30, 220], [200, 200, 60]])
    pictures = colours[labels].permute(0, 3, 1, 2)
    noise = torch.randint(-20, 21, pictures.shape, generator=rng)
    labels = labels.masked_fill(torch.rand(labels.shape, generator=rng) < 0.1, IGNORED)
    return (pictures + noise).to(torch.uint8), labels


def _train(batches: Any, num_steps: int, **options: Any) -> tuple[LinearSegmentation, Tensor]:
    given = {"num_classes": CLASSES, "num_prefix": 1, "seed": 0, "device": CPU, **options}
    return train_segmentation(_encode, batches, num_steps=num_steps, **given)


def test_training_equals_plain_modules() -> None:
    data = [_pictures(4, seed=s) for s in range(3)]
    num_steps = 9
    head, losses = _train(lambda epoch: data, num_steps, learning_rate=0.1)
    start = LinearSegmentation(3, CLASSES, seed=0)
    plain = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, CLASSES, 1))
    plain.load_state_dict(
        {
            k.replace("norm.", "0.").replace("classifier.", "1."): v
            for k, v in start.state_dict().items()
        }
    )
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: lr_factor(t, num_steps))
    expected = []
    for step in range(num_steps):
        pictures, labels = data[step % 3]
        grid = F.avg_pool2d(pictures.float() / 255, PATCH)
        logits = F.interpolate(plain(grid), size=(SIZE, SIZE), mode="bilinear")
        loss = nn.CrossEntropyLoss(ignore_index=255)(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        expected.append(float(loss.detach()))
    assert losses.tolist() == pytest.approx(expected, abs=1e-6)
    for ours, theirs in zip(head.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert not head.training


def test_the_schedule_is_mmsegmentations() -> None:
    """poly with power 1, min_lr 0, over 40,000 steps; warmup linear, 1,500 steps from 1e-6."""
    for step in (0, 1, 749, 1499, 1500, 20_000, 39_999):
        regular = 1 - step / 40_000
        warm = regular * (1 - (1 - step / 1500) * (1 - 1e-6)) if step < 1500 else regular
        assert lr_factor(step, 40_000) == pytest.approx(warm, rel=1e-9)
    assert lr_factor(0, 10) == 1.0  # of 10 steps none warms up


def test_a_map_that_is_all_ignored_has_a_loss_of_nothing() -> None:
    logits = torch.randn(1, CLASSES, 4, 4, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((1, SIZE, SIZE), IGNORED))
    loss.backward()
    assert float(loss.detach()) == 0 and not logits.grad.any()  # type: ignore[union-attr]


def test_scores_of_summed_matrices_are_scikit_learns_of_all_pixels() -> None:
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (3, 40, 50), generator=rng)
    predicted = torch.where(torch.rand(labels.shape, generator=rng) < 0.6, labels, 2)
    predicted[0, :3] = 6  # predicted and never labelled; class 5 is neither
    labels = labels.masked_fill(torch.rand(labels.shape, generator=rng) < 0.2, IGNORED)
    parts = [confusion_matrix(a, b, 7) for a, b in zip(labels, predicted, strict=True)]
    summed = torch.stack(parts).sum(0)
    y, p = (each[labels != IGNORED].numpy() for each in (labels, predicted))
    assert np.array_equal(summed.numpy(), sklearn_confusion(y, p, labels=range(7)))
    scores = segmentation_scores(summed)
    there = [0, 1, 2, 3, 4, 6]
    expected = jaccard_score(y, p, labels=there, average=None)
    np.testing.assert_allclose(scores.iou[there].numpy(), expected, atol=1e-12)
    assert scores.iou[5].isnan()
    assert scores.mean_iou == pytest.approx(expected.mean(), abs=1e-12)
    assert scores.pixel_accuracy == pytest.approx((y == p).mean())
    with pytest.raises(ValueError, match="expected a pixel that is labelled"):
        segmentation_scores(torch.zeros(3, 3, dtype=torch.int64))


def test_windows_cover_a_side_as_mmsegmentation_lays_them() -> None:
    assert list(window_starts(512, 512)) == [0]
    assert list(window_starts(683, 512)) == [0, 171]
    assert list(window_starts(1200, 512)) == [0, 341, 682, 688]
    for side in range(32, 120):
        covered = {y for start in window_starts(side, 32) for y in range(start, start + 32)}
        assert covered == set(range(side))


def test_overlapping_windows_are_averaged() -> None:
    head = LinearSegmentation(3, CLASSES, seed=0).eval()
    with torch.no_grad():
        head.norm.running_mean.copy_(torch.tensor([0.4, 0.5, 0.3]))  # type: ignore[union-attr]
        views, _ = _pictures(2, SIZE, 56)
        got = window_logits(_encode, head, views, 1, SIZE)
        grid = F.avg_pool2d(views.float() / 255, PATCH)
        total, count = torch.zeros(2, CLASSES, SIZE, 56), torch.zeros(56)
        for x in (0, 21, 24):
            part = views[..., x : x + SIZE]
            cells = F.avg_pool2d(part.float() / 255, PATCH)
            logits = head.classifier(head.norm(cells))
            total[..., x : x + SIZE] += F.interpolate(logits, size=(SIZE, SIZE), mode="bilinear")
            count[x : x + SIZE] += 1
        torch.testing.assert_close(got, total / count)
        whole = window_logits(_encode, head, views[..., :SIZE], 1, SIZE)
        plain = head.classifier(head.norm(grid[..., : SIZE // PATCH]))
        torch.testing.assert_close(whole, F.interpolate(plain, size=(SIZE, SIZE), mode="bilinear"))
    with pytest.raises(ValueError, match=r"sides of at least 32 pixels \(window\), got 24 x 56"):
        window_logits(_encode, head, views[:, :, :24], 1, SIZE)


def test_colours_are_segmented_at_the_size_of_the_label_map() -> None:
    data = [_pictures(8, seed=s) for s in range(8)]
    head, losses = _train(lambda epoch: data, 300, learning_rate=0.05)
    assert losses[-20:].mean() < 0.6 * losses[:5].mean()
    held = [_pictures(1, SIZE, 80, seed=s) for s in range(90, 94)]
    large = [
        (p, labels[:, ::1].repeat_interleave(3, 1).repeat_interleave(3, 2)) for p, labels in held
    ]
    options: Any = {"num_classes": CLASSES, "num_prefix": 1, "window": SIZE, "device": CPU}
    confusion = evaluate_segmentation(_encode, head, large, **options)
    assert int(confusion.sum()) == sum(int((labels != IGNORED).sum()) for _, labels in large)
    scores = segmentation_scores(confusion)
    assert scores.mean_iou > 0.6  # the rest is the bilinear border of 8 x 8 patches
    halves = [
        evaluate_segmentation(_encode, head, part, **options) for part in (large[:1], large[1:])
    ]
    assert torch.equal(halves[0] + halves[1], confusion)
    untrained = LinearSegmentation(3, CLASSES, seed=1).eval()
    other = segmentation_scores(evaluate_segmentation(_encode, untrained, large, **options))
    assert other.mean_iou < scores.mean_iou - 0.2


def test_what_does_not_fit_is_refused() -> None:
    pictures, labels = _pictures(2)
    with pytest.raises(ValueError, match=r"label map: expected 0 to 1 \(num_classes = 2\) or 255"):
        _train(lambda epoch: [(pictures, labels)], 1, num_classes=2)
    with pytest.raises(ValueError, match=r"tokens: expected a square grid .* got 17"):
        _train(lambda epoch: [(pictures, labels)], 1, num_prefix=0)
    with pytest.raises(ValueError, match="num_classes: expected 1 to 255, got 256"):
        _train(lambda epoch: [(pictures, labels)], 1, num_classes=256)
    with pytest.raises(ValueError, match="num_steps: expected one or more"):
        _train(lambda epoch: [(pictures, labels)], 0)


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_does() -> None:
    data = [_pictures(4, seed=s) for s in range(3)]
    (_, cpu), (_, gpu) = (
        _train(lambda epoch: data, 9, device=torch.device(d)) for d in ("cpu", "cuda")
    )
    torch.testing.assert_close(gpu, cpu, atol=1e-5, rtol=1e-4)
