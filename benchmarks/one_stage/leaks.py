"""Whether what is measured was seen in training: captions, near-duplicates, blocks that touch.

The sources keep the parts of a data set apart; this looks at what they wrote, each picture, caption
and tile of it, since a measure on data that leaks would be taken for a result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from m3i_fast.benchmarks.one_stage.measures import EARTH_HEIGHT
from m3i_fast.evaluation.held_out import describe_held_out
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.dataset.near_duplicates import COMPARED_SIZE, NEARER_THAN
from m3i_fast.pipelines.loader import evaluation_batches
from m3i_fast.pipelines.sources.earth_maps import COVERS
from m3i_fast.pipelines.sources.styles import OTHER_STYLES, SEEN_STYLE

_PICTURES_A_PASS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Separation:
    """How far a measured split lies from training."""

    name: str
    """Data set and split."""
    num_captions: int
    """Distinct captions of the split."""
    nearest: float
    """Styles: least rms of thumbnails to a training picture. Earth: least gap to a training tile,
    in tiles' sides."""

    def __str__(self) -> str:
        return f"{self.name}: {self.num_captions} captions, nearest {self.nearest:.3f}"


def separation_of_styles(path: Path, *, nearer_than: float = NEARER_THAN) -> Iterator[Separation]:
    """Compare the concepts that a data set of styles is measured on with those it trains on.

    Of OTHER_STYLES only the hard half is measured, in which the nearest picture is looked for.
    Raises ValueError for a caption of both, and for a picture nearer than `nearer_than`.
    """
    seen = captions(path, "train")
    for split in sorted({SEEN_STYLE, OTHER_STYLES, "tune"} & {*read_manifest(path).splits}):
        asked = captions(path, split)
        if shared := asked & seen:
            some = ", ".join(sorted(shared)[:3])
            raise ValueError(
                f"{path}: expected captions of {split} that no training picture has, got "
                f"{len(shared)} of both, such as {some}"
            )
        held_out = describe_held_out(
            _views(path, split, size=COMPARED_SIZE), _views(path, "train", size=COMPARED_SIZE)
        )
        rows = held_out.rows("_hard" if split == OTHER_STYLES else "")
        nearest, place = held_out.distance[rows].min(0)
        if nearest < nearer_than:
            concept = int(held_out.group[rows][place])
            raise ValueError(
                f"{path}: expected pictures of {split} at least rms {nearer_than:g} from every "
                f"training picture, got {nearest:.3f} for concept {concept}"
            )
        yield Separation(
            name=f"{path.name}, {split}", num_captions=len(asked), nearest=float(nearest)
        )


def separation_of_earth(path: Path, masks: Path, *, tile: int = 64) -> Iterator[Separation]:
    """Compare the tiles that a data set of the Earth is measured on with those it trains on.

    masks: tiles by part, named by their upper left corners. Raises ValueError for a caption that
    names a land cover, and for a measured tile with a training tile nearer than a tile's side.
    """
    told = {split: captions(path, split) for split in read_manifest(path).splits}
    for split, those in told.items():
        if named := sorted(filter(names_a_cover, those)):
            raise ValueError(
                f"{path}: expected captions of {split} that name no land cover, got {named[0]}"
            )
    training = _corners(masks, "training")
    for part, split in (("validation", "heldout"), ("tune", "tune")):
        if not (masks / "images" / part).is_dir():
            continue
        nearest = least_gap(_corners(masks, part), training, tile)
        if nearest < tile:
            raise ValueError(
                f"{masks}: expected tiles of {part} at least {tile} pixels from every training "
                f"tile, got {nearest}"
            )
        name = f"{path.name}, {split}"
        yield Separation(name=name, num_captions=len(told[split]), nearest=nearest / tile)


def captions(path: Path, split: str) -> set[str]:
    """Return the distinct captions of a split, as its tokenizer reads them back."""
    tokenizer = Tokenizer.from_info(read_manifest(path).tokenizer)
    found: set[str] = set()
    for batch in _views(path, split, size=8):
        ids, counts = batch.token_ids.numpy(), batch.num_tokens.tolist()
        found |= {tokenizer.decode(row[:n]) for row, n in zip(ids, counts, strict=True) if n}
    return found


def names_a_cover(caption: str) -> bool:
    """Return whether a caption has all words of a class of land cover, one after the other."""
    words = " ".join(caption.lower().replace(",", " ").split())
    return any(f" {cover} " in f" {words} " for cover in COVERS)


def least_gap(
    asked: NDArray[np.int64],  # [A, 2] corners, row and column
    training: NDArray[np.int64],  # [T, 2]
    tile: int,
    height: int = EARTH_HEIGHT,
) -> int:
    """Return the pixels between the nearest two tiles, at least 0; longitudes go round."""
    least = height
    for corner in asked:
        rows, columns = np.abs(training - corner).T
        columns = np.minimum(columns, 2 * height - columns)
        least = min(least, int(np.maximum(rows, columns).min()) - tile)
    return max(least, 0)


def _corners(masks: Path, part: str) -> NDArray[np.int64]:
    files: Iterable[Path] = (masks / "images" / part).iterdir()
    return np.array([[int(n) for n in file.stem.split("-")] for file in sorted(files)], np.int64)


def _views(path: Path, split: str, *, size: int) -> Iterator[Batch]:
    return evaluation_batches(path, split, image_size=size, batch_size=_PICTURES_A_PASS)
