"""Reads a folder of pictures and masks of class indices, laid out as ADE20k or as Pascal VOC.

    ADE20k  images/{training,validation}/NAME.jpg, annotations/{training,validation}/NAME.png
    VOC     JPEGImages/NAME.jpg, SegmentationClass/NAME.png, ImageSets/Segmentation/{train,val}.txt

A mask has one channel of 8 bits, gray or with a palette, and the picture's size. Index 0 of ADE20k
means "other" and is ignored, so that index i is class i - 1, as in mmsegmentation
(reduce_zero_label); index 0 of VOC is the background, a class. 255 is ignored in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from m3i_fast.evaluation.batches import Batches, LabelledBatch
from m3i_fast.evaluation.dense.segmentation import IGNORED
from m3i_fast.pipelines.dataset.pictures import rgb_pixels
from m3i_fast.pipelines.optional_imports import require

Split = Literal["training", "validation"]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_VOC_LISTS: dict[Split, str] = {"training": "train", "validation": "val"}
_SCALES = (0.5, 2.0)  # of the window, the range of a crop's picture's shorter side (mmsegmentation)
_COLOURS = {"brightness": 32 / 255, "contrast": 0.5, "saturation": 0.5, "hue": 0.1}
_PADDING = (124, 116, 104)  # ImageNet's mean, so that a normalised picture has about 0 there


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentationFolder:
    """The pictures of one split, each with its mask."""

    pairs: tuple[tuple[Path, Path], ...]
    ignores_zero: bool
    """Whether index 0 of a mask is ignored and index i is class i - 1."""
    num_classes: int

    def read(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:  # [H, W, 3], [H, W]
        """Read a picture and its label map, whose values are classes or IGNORED.

        Raises ValueError, with the file's name, for a mask that is no map of indices, has another
        size than its picture, or an index past num_classes.
        """
        picture, mask = self.pairs[index]
        with require("PIL.Image", extra="eval").open(picture) as opened:
            pixels = rgb_pixels(opened)
        indices = _indices(mask)
        if indices.shape != pixels.shape[:2]:
            (height, width), (own_height, own_width) = pixels.shape[:2], indices.shape
            raise ValueError(
                f"{mask}: expected the size of {picture.name}, {height} x {width} pixels (upright, "
                f"as its EXIF says), got {own_height} x {own_width}"
            )
        wrong = indices[(indices != IGNORED) & (indices >= self.num_classes + self.ignores_zero)]
        if len(wrong):
            raise ValueError(
                f"{mask}: expected indices up to {self.num_classes - 1 + self.ignores_zero} or "
                f"{IGNORED} ({self.num_classes} classes), got {int(wrong.max())}"
            )
        if self.ignores_zero:  # 0 wraps to 255, which is IGNORED
            indices = np.where(indices == IGNORED, IGNORED, indices - np.uint8(1)).astype(np.uint8)
        return pixels, indices


def open_folder(
    root: Path, split: Split, *, num_classes: int | None = None, ignores_zero: bool | None = None
) -> SegmentationFolder:
    """Find the pictures and masks of a split, and check that every picture has a mask.

    num_classes: None to count them, which reads all masks of the training part. ignores_zero: None
    for what the layout's data set means by index 0, as the module describes.

    Raises FileNotFoundError where the folder has neither layout, the split has no pictures, or a
    picture has no mask, and ValueError as `SegmentationFolder.read`.
    """
    is_voc = (root / "JPEGImages").is_dir()
    if not is_voc and not (root / "images").is_dir():
        raise FileNotFoundError(
            f"{root}: expected images/training and annotations/training (ADE20k), or JPEGImages, "
            "SegmentationClass and ImageSets/Segmentation (VOC), got neither"
        )
    find = _voc_pairs if is_voc else _ade_pairs
    pairs = find(root, split)
    ignores_zero = not is_voc if ignores_zero is None else ignores_zero
    if num_classes is None:
        num_classes = _count_classes([mask for _, mask in find(root, "training")], ignores_zero)
    return SegmentationFolder(
        pairs=tuple(pairs), ignores_zero=ignores_zero, num_classes=num_classes
    )


def training_batches(
    folder: SegmentationFolder, *, size: int, batch_size: int, seed: int, num_workers: int = 0
) -> Batches:
    """Return batches of random crops, uint8 [B, 3, S, S] and label maps [B, S, S] int64.

    As mmsegmentation's pipeline for ADE20k, by torchvision: the shorter side is resized to between
    half and twice `size`, a square is cut out (where the picture is smaller, padded with ImageNet's
    mean and IGNORED), mirrored in half of the cases, and changed in its brightness, contrast,
    saturation and hue, each in half of the cases. Two things differ: brightness is a factor and no
    summand, and a crop may be of one class alone. Every draw depends on (seed, epoch, index of the
    picture). The last part of a batch is left out. Raises ValueError where the folder has fewer
    pictures than a batch.
    """
    if len(folder.pairs) < batch_size:
        raise ValueError(
            f"batch_size: expected at most {len(folder.pairs)}, the pictures there are, got "
            f"{batch_size}"
        )

    def epoch_of(epoch: int) -> Iterator[LabelledBatch]:
        order = np.random.default_rng((seed, epoch)).permutation(len(folder.pairs))
        yield from DataLoader(
            _Crops(folder, size, seed, epoch),
            batch_size=batch_size,
            sampler=order.tolist(),
            num_workers=num_workers,
            drop_last=True,
            generator=torch.Generator(),  # else each epoch would draw from torch's global one
        )

    return epoch_of


def whole_pictures(folder: SegmentationFolder, *, size: int, num_workers: int = 0) -> Batches:
    """Return every picture with its shorter side resized to `size`, and its label map as stored.

    One picture a batch: uint8 [1, 3, h, w], int64 [1, H, W].
    """

    def epoch_of(epoch: int) -> Iterator[LabelledBatch]:
        yield from DataLoader(
            _Whole(folder, size), num_workers=num_workers, generator=torch.Generator()
        )

    return epoch_of


class _Crops(Dataset[LabelledBatch]):
    """Random crops of one epoch; an item depends on the seed, the epoch and its index alone."""

    def __init__(self, folder: SegmentationFolder, size: int, seed: int, epoch: int) -> None:
        self.folder, self.key = folder, (seed, epoch)
        self.tv_tensors, v2 = _torchvision()
        fill = {self.tv_tensors.Image: _PADDING, self.tv_tensors.Mask: IGNORED}
        low, high = (round(scale * size) for scale in _SCALES)
        self.transform = v2.Compose(
            [
                v2.RandomResize(low, high + 1, antialias=True),
                v2.RandomCrop(size, pad_if_needed=True, fill=fill),
                v2.RandomHorizontalFlip(),
                *(
                    v2.RandomApply([v2.ColorJitter(**{name: width})], p=0.5)
                    for name, width in _COLOURS.items()
                ),
            ]
        )

    def __len__(self) -> int:
        return len(self.folder.pairs)

    def __getitem__(self, index: int) -> LabelledBatch:
        picture, labels = _tensors(self.folder, index)
        drawn = np.random.SeedSequence((*self.key, index)).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the generators of all GPUs, too.
            torch.default_generator.manual_seed(int(drawn[0] >> np.uint64(1)))
            picture, labels = self.transform(
                self.tv_tensors.Image(picture), self.tv_tensors.Mask(labels)
            )
        return picture.as_subclass(Tensor), labels.as_subclass(Tensor).long()


class _Whole(Dataset[LabelledBatch]):
    """Pictures resized to a shorter side, and their label maps as stored."""

    def __init__(self, folder: SegmentationFolder, size: int) -> None:
        self.folder, self.size = folder, size
        self.resize = _torchvision()[1].functional.resize

    def __len__(self) -> int:
        return len(self.folder.pairs)

    def __getitem__(self, index: int) -> LabelledBatch:
        picture, labels = _tensors(self.folder, index)
        return self.resize(picture, [self.size], antialias=True), labels.long()


def _torchvision() -> tuple[Any, Any]:
    """Return torchvision's modules tv_tensors and transforms.v2."""
    names = ("torchvision.tv_tensors", "torchvision.transforms.v2")
    tv_tensors, v2 = (require(name, extra="eval") for name in names)
    return tv_tensors, v2


def _tensors(
    folder: SegmentationFolder, index: int
) -> LabelledBatch:  # [3, H, W] uint8, [H, W] uint8
    pixels, labels = folder.read(index)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), torch.from_numpy(labels)


def _indices(mask: Path) -> NDArray[np.uint8]:  # [H, W]
    with require("PIL.Image", extra="eval").open(mask) as opened:
        if opened.mode not in ("P", "L"):
            raise ValueError(
                f"{mask}: expected a PNG of class indices in 8 bits (mode P or L), got mode "
                f"{opened.mode}; a picture of colours has to be turned into indices first"
            )
        return np.array(opened, dtype=np.uint8)


def _count_classes(masks: Sequence[Path], ignores_zero: bool) -> int:
    highest = -1
    for mask in masks:
        indices = _indices(mask)
        highest = max(highest, int(indices[indices != IGNORED].max(initial=0)))
    num_classes = highest + 1 - ignores_zero
    if num_classes < 1:
        raise ValueError("masks of the training part: expected a labelled pixel, got none")
    return num_classes


def _ade_pairs(root: Path, split: Split) -> list[tuple[Path, Path]]:
    pictures, masks = root / "images" / split, root / "annotations" / split
    found = sorted(p for p in pictures.rglob("*") if p.suffix.lower() in _SUFFIXES)
    if not found:
        raise FileNotFoundError(f"{pictures}: expected pictures ({', '.join(_SUFFIXES)}), got none")
    return [_pair(p, masks / p.relative_to(pictures).with_suffix(".png")) for p in found]


def _voc_pairs(root: Path, split: Split) -> list[tuple[Path, Path]]:
    listed = root / "ImageSets" / "Segmentation" / f"{_VOC_LISTS[split]}.txt"
    if not listed.is_file():
        raise FileNotFoundError(f"{listed}: expected the names of the pictures, a line each")
    names = listed.read_text().split()
    if not names:
        raise FileNotFoundError(f"{listed}: expected names of pictures, got none")
    folder, masks = root / "JPEGImages", root / "SegmentationClass"
    return [_pair(folder / f"{name}.jpg", masks / f"{name}.png") for name in names]


def _pair(picture: Path, mask: Path) -> tuple[Path, Path]:
    for path, what in ((picture, "a picture"), (mask, f"the mask of {picture.name}")):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected {what}, got no file")
    return picture, mask
