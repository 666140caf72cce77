"""Folders as ADE20k's and VOC's, written by Pillow: what is read, cropped, and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from m3i_fast.evaluation.dense import segmentation_folder
from m3i_fast.evaluation.dense.segmentation import (
    IGNORED,
    evaluate_segmentation,
    segmentation_scores,
    train_segmentation,
)
from m3i_fast.evaluation.dense.segmentation_folder import (
    SegmentationFolder,
    open_folder,
    training_batches,
    whole_pictures,
)

Bytes = NDArray[np.uint8]


def _scene(index: int, height: int = 40, width: int = 60) -> tuple[Bytes, Bytes]:
    """A picture that is white where its mask is 2, black where it is 1, gray where it is 0."""
    rng = np.random.default_rng(index)
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[4:-4, 5:-5] = 1
    y, x = rng.integers(6, height // 2), rng.integers(8, width // 2)
    mask[y : y + 14, x : x + 18] = 2
    picture = np.array([128, 0, 255], dtype=np.uint8)[mask]
    return np.repeat(picture[..., None], 3, axis=2), mask


def _save(array: Bytes, path: Path, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(array)
    if mode == "P":
        picture = Image.new("P", array.shape[::-1])
        picture.putdata(array.flatten().tolist())
        picture.putpalette([7 * i % 256 for i in range(768)])
    picture.save(path)


@pytest.fixture
def ade(tmp_path: Path) -> Path:
    for split, num in (("training", 6), ("validation", 3)):
        for i in range(num):
            picture, mask = _scene(i, 40 + i, 60)
            _save(picture, tmp_path / "images" / split / "sub" / f"{i:03}.png")
            _save(mask, tmp_path / "annotations" / split / "sub" / f"{i:03}.png")
    return tmp_path


def test_ade20ks_zero_is_ignored_and_classes_are_counted(ade: Path) -> None:
    folder = open_folder(ade, "validation")
    assert (len(folder.pairs), folder.num_classes, folder.ignores_zero) == (3, 2, True)
    picture, mask = _scene(1, 41, 60)
    pixels, labels = folder.read(1)
    assert np.array_equal(pixels, picture)
    assert np.array_equal(labels, np.array([IGNORED, 0, 1], dtype=np.uint8)[mask])
    kept = open_folder(ade, "validation", ignores_zero=False)
    assert kept.num_classes == 3 and np.array_equal(kept.read(1)[1], mask)


def test_255_is_ignored_in_both(ade: Path) -> None:
    mask = _scene(0, 40, 60)[1]
    mask[:3] = 255
    _save(mask, ade / "annotations/training/sub/000.png")
    for ignores_zero in (True, False):
        folder = open_folder(ade, "training", ignores_zero=ignores_zero)
        assert folder.num_classes == 3 - ignores_zero
        assert (folder.read(0)[1][:3] == IGNORED).all()


def test_voc_reads_the_lists_and_palettes(tmp_path: Path) -> None:
    for i in range(4):
        picture, mask = _scene(i)
        _save(picture, tmp_path / "JPEGImages" / f"2007_{i}.jpg")
        _save(mask, tmp_path / "SegmentationClass" / f"2007_{i}.png", "P")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_0\n2007_3\n")
    (lists / "val.txt").write_text("2007_2\n")
    folder = open_folder(tmp_path, "training")
    assert [p.stem for p, _ in folder.pairs] == ["2007_0", "2007_3"]
    assert (folder.num_classes, folder.ignores_zero) == (3, False)
    assert np.array_equal(folder.read(1)[1], _scene(3)[1])
    assert len(open_folder(tmp_path, "validation").pairs) == 1
    (lists / "val.txt").write_text("2007_9\n")
    with pytest.raises(FileNotFoundError, match=r"2007_9\.jpg: expected a picture, got no file"):
        open_folder(tmp_path, "validation")
    (lists / "val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"val\.txt: expected the names of the pictures"):
        open_folder(tmp_path, "validation")


def test_a_missing_mask_is_named(ade: Path) -> None:
    (ade / "annotations/training/sub/004.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"sub/004\.png: expected the mask of 004\.png"):
        open_folder(ade, "training", num_classes=2)


def test_wrong_masks_are_named(ade: Path) -> None:
    path = ade / "annotations/training/sub/002.png"
    folder = open_folder(ade, "training")
    _save(_scene(2, 42, 61)[1], path)
    with pytest.raises(ValueError, match=r"002\.png: expected the size .* 42 x 60 .* got 42 x 61"):
        folder.read(2)
    _save(np.full((42, 60), 9, dtype=np.uint8), path)
    with pytest.raises(ValueError, match=r"002\.png: expected indices up to 2 or 255 .* got 9"):
        folder.read(2)
    _save(np.zeros((42, 60, 3), dtype=np.uint8), path)
    with pytest.raises(ValueError, match=r"002\.png: expected a PNG of class indices .* mode RGB"):
        folder.read(2)
    for i in range(6):
        _save(np.zeros((40 + i, 60), dtype=np.uint8), ade / f"annotations/training/sub/{i:03}.png")
    with pytest.raises(ValueError, match="expected a labelled pixel, got none"):
        open_folder(ade, "training")


def test_folders_without_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected images/training .* or JPEGImages"):
        open_folder(tmp_path, "training")
    (tmp_path / "images" / "training").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"images/training: expected pictures"):
        open_folder(tmp_path, "training")


def _hold_together(pictures: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of pixels, away from borders of classes, whose brightness is that of their label."""
    gray = pictures.float().mean(1)
    inside = torch.ones_like(labels, dtype=torch.bool)
    for shift in (-3, 3):
        for dim in (1, 2):
            inside &= labels.roll(shift, dim) == labels
    right = torch.where(labels == 1, gray > 128, gray < 128)
    return float(right[inside & (labels != IGNORED)].float().mean())


def test_crops_and_their_label_maps_hold_together(ade: Path) -> None:
    folder = open_folder(ade, "training")
    seen = [
        batch
        for e in range(12)
        for batch in training_batches(folder, size=32, batch_size=3, seed=0)(e)
    ]
    assert len(seen) == 24
    for pictures, labels in seen:
        assert pictures.shape == (3, 3, 32, 32) and pictures.dtype == torch.uint8
        assert labels.shape == (3, 32, 32) and labels.dtype == torch.int64
    pictures, labels = (torch.cat(column) for column in zip(*seen, strict=True))
    assert _hold_together(pictures, labels) > 0.98
    assert _hold_together(pictures.flip(-1), labels) < 0.95  # the measure sees a wrong mirror
    padded = (labels == IGNORED).flatten(1).float().mean(1)
    assert float(padded.max()) > 0.3 > float(padded.min())  # small pictures are padded


def test_a_crop_depends_on_seed_epoch_and_picture_alone(
    ade: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_folder(ade, "training")

    def crops(seed: int, epoch: int, size: int = 2, workers: int = 0) -> set[bytes]:
        batches = training_batches(folder, size=32, batch_size=size, seed=seed, num_workers=workers)
        return {
            p.numpy().tobytes() + labels.numpy().tobytes()
            for pictures, maps in batches(epoch)
            for p, labels in zip(pictures, maps, strict=True)
        }

    before = torch.random.get_rng_state()
    first = crops(0, 0)
    assert len(first) == 6 and first == crops(0, 0, size=3) == crops(0, 0, workers=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.isdisjoint(crops(1, 0)) and first.isdisjoint(crops(0, 1))
    monkeypatch.setattr(segmentation_folder, "_COLOURS", {})
    assert first != crops(0, 0)
    with pytest.raises(ValueError, match="batch_size: expected at most 6, the pictures there are"):
        training_batches(folder, size=32, batch_size=7, seed=0)


def test_what_is_padded_is_ignored(ade: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmentation_folder, "_COLOURS", {})
    folder = open_folder(ade, "training", ignores_zero=False)
    batches = training_batches(folder, size=32, batch_size=6, seed=0)
    seen = [batch for epoch in range(4) for batch in batches(epoch)]
    pictures, labels = (torch.cat(column) for column in zip(*seen, strict=True))
    padding = torch.tensor(segmentation_folder._PADDING, dtype=torch.uint8)[:, None, None]
    is_padding = (pictures == padding).all(1)
    assert is_padding.any() and torch.equal(is_padding, labels == IGNORED)


def test_equal_pictures_are_cropped_differently(ade: Path) -> None:
    folder = open_folder(ade, "training")
    alike = replace(folder, pairs=folder.pairs[:1] * 6)
    (crops, _), *_ = training_batches(alike, size=32, batch_size=6, seed=0)(0)
    assert len({crop.numpy().tobytes() for crop in crops}) == 6


def test_whole_pictures_keep_their_ratio_and_their_masks_size(ade: Path) -> None:
    folder = open_folder(ade, "validation")
    batches = list(whole_pictures(folder, size=32)(0))
    assert [tuple(p.shape) for p, _ in batches] == [(1, 3, 32, w) for w in (48, 46, 45)]
    for i, (_, labels) in enumerate(batches):
        assert np.array_equal(labels[0].numpy(), folder.read(i)[1])


def test_a_turned_picture_is_upright_beside_its_mask(tmp_path: Path) -> None:
    picture, mask = _scene(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    turned = Image.fromarray(np.rot90(picture))
    turned.save(tmp_path / "turned.png", exif=exif)
    _save(mask, tmp_path / "mask.png")
    folder = SegmentationFolder(
        pairs=((tmp_path / "turned.png", tmp_path / "mask.png"),), ignores_zero=False, num_classes=3
    )
    pixels, labels = folder.read(0)
    assert np.array_equal(pixels, picture) and np.array_equal(labels, mask)


def test_a_folder_is_segmented_from_end_to_end(ade: Path) -> None:
    def encode(pictures: torch.Tensor) -> torch.Tensor:  # the mean colour of 4 x 4 pixels
        return F.avg_pool2d(pictures.float() / 255, 4).flatten(2).mT

    options = {"num_classes": 2, "num_prefix": 0, "device": torch.device("cpu")}
    train, val = (open_folder(ade, split) for split in ("training", "validation"))
    head, _ = train_segmentation(
        encode,
        training_batches(train, size=32, batch_size=6, seed=0),
        num_steps=60,
        learning_rate=0.05,
        seed=0,
        **options,  # type: ignore[arg-type]
    )
    pictures = whole_pictures(val, size=32)(0)
    confusion = evaluate_segmentation(encode, head, pictures, window=32, **options)  # type: ignore[arg-type]
    labels = np.concatenate([val.read(i)[1].flatten() for i in range(3)])
    assert confusion.sum(1).tolist() == [int((labels == c).sum()) for c in range(2)]
    assert segmentation_scores(confusion).mean_iou > 0.85


def test_crops_leave_the_generators_of_gpus_alone(
    ade: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seed_all(seed: int) -> None:
        raise AssertionError("the generators of all GPUs are seeded")

    monkeypatch.setattr("torch.cuda.manual_seed_all", seed_all)
    before = torch.get_rng_state()
    next(iter(training_batches(open_folder(ade, "training"), size=16, batch_size=2, seed=0)(0)))
    assert torch.equal(torch.get_rng_state(), before)
