"""A data set of tiles of the Earth seen from space, with land cover, places and climate.

A tile's class is the land cover that most of its pixels have, its caption says where it is: country
or ocean, coast, climate, and never the land cover. The Earth is divided into blocks of 15 degrees,
each of them in one split, and a training tile lies at least a tile's side away from any block of
another split, so that no measured pixel was seen in training, and none next to it.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer
from m3i_fast.pipelines.dataset.pack import DatasetInfo, keyed_order, write_dataset
from m3i_fast.pipelines.dataset.samples import Sample
from m3i_fast.pipelines.optional_imports import require
from m3i_fast.pipelines.sources.earth_maps import (
    CLIMATES,
    COUNTRIES_CREDIT,
    COVERS,
    PACKAGES,
    EarthMaps,
    read_maps,
    versions,
)
from m3i_fast.pipelines.sources.label_subsets import Annotation, annotate
from m3i_fast.pipelines.sources.openmoji import check_fold, check_options

BLOCK = 15  # degrees
NORTH, SOUTH = 75.0, -60.0  # latitudes between which tiles lie: the rest is ice, stretched
LEAST_LAND = 0.25  # share of a tile's pixels
COAST = 0.1  # share of a tile's pixels that are water, and that are land, from which it is a coast


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """A square of the maps: the pixels of its upper left corner, and its block."""

    row: int
    column: int
    block: tuple[int, int]


# ---- Where tiles lie -----------------------------------------------------------------------------


def split_blocks(
    blocks: Sequence[tuple[int, int]], *, heldout: float, tune: float, seed: int, fold: int = 0
) -> dict[str, set[tuple[int, int]]]:
    """Deal blocks to train, tune and heldout by keyed hashes.

    The held-out ones depend on (blocks, seed, heldout, fold) alone, no block is in those of two
    folds; tune is a share of the others.
    """
    order = [blocks[i] for i in keyed_order(len(blocks), "earth", seed)]
    first, last = (round(heldout * len(order) * k) for k in (fold, fold + 1))
    rest = order[:first] + order[last:]
    tuned = round(tune * len(rest))
    parts = {"train": rest[tuned:], "tune": rest[:tuned], "heldout": order[first:last]}
    return {split: set(those) for split, those in parts.items()}


def training_tiles(
    height: int, tile: int, stride: int, splits: Mapping[str, set[tuple[int, int]]]
) -> Iterator[Tile]:
    """Yield tiles every `stride` pixels that keep a tile's side away from other splits' blocks."""
    side, width = height * BLOCK // 180, 2 * height
    forbidden = splits["tune"] | splits["heldout"]
    for row in range(0, height - tile + 1, stride):
        for column in range(0, width - tile + 1, stride):
            near = _blocks_of(row - tile, column - tile, 3 * tile, side, height)
            if not near & forbidden:
                block = (row + tile // 2) // side, (column + tile // 2) // side
                yield Tile(row=row, column=column, block=block)


def _blocks_of(row: int, column: int, span: int, side: int, height: int) -> set[tuple[int, int]]:
    """Return the blocks that a square of `span` pixels touches; longitudes go round."""
    rows = range(max(row, 0) // side, (min(row + span, height) - 1) // side + 1)
    columns = range(column // side, (column + span - 1) // side + 1)
    per_turn = 2 * height // side
    return {(r, c % per_turn) for r in rows for c in columns}


def measured_tiles(height: int, tile: int, blocks: set[tuple[int, int]]) -> Iterator[Tile]:
    """Yield as many tiles side by side as fit into each block, in its middle."""
    side = height * BLOCK // 180
    count, left = divmod(side, tile)
    for block in sorted(blocks):
        for i in range(count * count):
            corner = np.array(block) * side + left // 2 + tile * np.array(divmod(i, count))
            yield Tile(row=int(corner[0]), column=int(corner[1]), block=block)


# ---- What a tile is ------------------------------------------------------------------------------


def cut(values: NDArray[Any], where: Tile, tile: int) -> NDArray[Any]:
    """Return a tile's pixels [tile, tile, ...] of a map."""
    return values[where.row : where.row + tile, where.column : where.column + tile]


def is_land(maps: EarthMaps, where: Tile, tile: int) -> bool:
    """Return whether enough of a tile is land between NORTH and SOUTH."""
    height = len(maps.cover)
    north = 90 - 180 * where.row / height
    south = 90 - 180 * (where.row + tile) / height
    if north > NORTH or south < SOUTH:
        return False
    return bool((cut(maps.cover, where, tile) != 0).mean() >= LEAST_LAND)


def cover_of(maps: EarthMaps, where: Tile, tile: int) -> str:
    """Return the land cover of most pixels of a tile; of equals, the first one of COVERS."""
    counts = np.bincount(cut(maps.cover, where, tile).ravel(), minlength=len(COVERS))
    return COVERS[int(counts.argmax())]


def caption_of(maps: EarthMaps, where: Tile, tile: int) -> str:
    """Say where a tile is: "coast of Peru, arid climate", "Mali, arid climate"."""
    country = cut(maps.country, where, tile)
    countries = np.bincount(country[country >= 0], minlength=len(maps.country_names))
    if countries.any():
        place = maps.country_names[int(countries.argmax())]
    else:
        place = _ocean(maps, where, tile)
    water = float((cut(maps.cover, where, tile) == 0).mean())
    if COAST <= water <= 1 - COAST:
        place = f"coast of {place}"
    climate = cut(maps.climate, where, tile)
    climates = np.bincount(climate[climate > 0], minlength=len(CLIMATES))
    return f"{place}, {CLIMATES[int(climates.argmax())]} climate" if climates.any() else place


def _ocean(maps: EarthMaps, where: Tile, tile: int) -> str:
    """Name the ocean of a tile's centre, by its meridians; north of 66 degrees the Arctic."""
    height = len(maps.cover)
    latitude = 90 - 180 * (where.row + tile / 2) / height
    longitude = 180 * (where.column + tile / 2) / height - 180
    if latitude > 66:
        return "Arctic Ocean"
    if -70 <= longitude < 20:
        return "Atlantic Ocean"
    return "Indian Ocean" if 20 <= longitude < 120 else "Pacific Ocean"


class TileSamples:
    """Samples of tiles, which are cut out and encoded when they are indexed.

    annotation_of: what each tile keeps, by its index; those not in it keep both. Tiles of one
    caption are one group, so that none is another's negative.
    """

    def __init__(
        self,
        maps: EarthMaps,
        tiles: Sequence[Tile],
        *,
        tile: int,
        tokenizer: Tokenizer,
        first_id: int,
        annotation_of: Mapping[int, Annotation],
    ) -> None:
        self.maps, self.tiles, self.tile = maps, tiles, tile
        self.tokenizer, self.first_id, self.annotation_of = tokenizer, first_id, annotation_of
        self.captions = [caption_of(maps, each, tile) for each in tiles]
        self.covers = [cover_of(maps, each, tile) for each in tiles]
        first = {caption: i for i, caption in reversed([*enumerate(self.captions)])}
        self.groups = [first_id + first[caption] for caption in self.captions]

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, index: int, /) -> Sample:
        where = self.tiles[index]
        kept = self.annotation_of.get(index, "both")
        text = self.tokenizer.encode(self.captions[index])
        return Sample(
            image=encode_png(cut(self.maps.picture, where, self.tile)),
            extension="png",
            name=f"{where.row}-{where.column}",
            sample_id=self.first_id + index,
            group_id=self.groups[index],
            captions=(text,) if kept in ("both", "caption") else (),
            label=COVERS.index(self.covers[index]) if kept in ("both", "class") else -1,
        )


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode [H, W] indices or [H, W, 3] RGB as PNG."""
    buffer = io.BytesIO()
    require("PIL.Image").fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()


# ---- The data set --------------------------------------------------------------------------------


def build(
    out: Path,
    *,
    countries: Path | None = None,
    maps: EarthMaps | None = None,
    masks: Path | None = None,
    tile: int = 64,
    stride: int = 16,
    labelled: float = 1.0,
    captioned: float | None = None,
    annotated_only: bool = False,
    heldout: float = 0.25,
    fold: int = 0,
    tune: float = 0.0,
    num_merges: int | None = None,
    context_length: int = 24,
    seed: int = 0,
    samples_per_shard: int = 256,
) -> Path:
    """Write tiles of the Earth as a dataset directory and return it.

    Splits: "train", overlapping tiles every `stride` pixels; "tune" and "heldout", tiles side by
    side in blocks of their own. countries: as of `read_maps`, which reads the maps unless `maps`
    are given. masks: also write the training and held-out tiles with their land cover pixel by
    pixel, as a folder of ADE20k's layout that `m3i-fast evaluate --segmentation` reads; tuning
    tiles lie there as a third part, "tune".
    fold: which of the parts of `heldout` blocks is held out; each block is in one of them at most.
    labelled, captioned: as of `label_subsets.annotate`, place by place: the training tiles whose
    upper left corners lie in one square of a tile's side, which overlap, keep the same.
    annotated_only: leave out training tiles that keep neither class nor caption.

    Raises ValueError naming an option out of range, FileExistsError where there is something at
    `masks`, and as `read_maps`.
    """
    shares = {"labelled": labelled, "captioned": captioned, "heldout": heldout, "tune": tune}
    check_options(shares, {"image_size": tile, "stride": stride})
    check_fold(fold, heldout)
    if masks is not None and masks.exists():
        raise FileExistsError(f"{masks}: expected no file or folder there, got one; remove it")
    if maps is None:
        if countries is None:
            raise ValueError(
                "countries: expected countries-50m.json of npm's world-atlas, got none"
            )
        maps = read_maps(countries)
    height = len(maps.cover)
    rows, columns = 180 // BLOCK, 360 // BLOCK
    blocks = [(row, column) for row in range(rows) for column in range(columns)]
    splits = split_blocks(blocks, heldout=heldout, tune=tune, seed=seed, fold=fold)
    tokenizer = Tokenizer(num_merges, context_length)
    chosen = {"train": [*training_tiles(height, tile, stride, splits)]}
    chosen |= {name: [*measured_tiles(height, tile, splits[name])] for name in ("tune", "heldout")}
    samples: dict[str, TileSamples] = {}
    first_id = 0
    for split, tiles in chosen.items():
        land = [each for each in tiles if is_land(maps, each, tile)]
        annotation_of: Mapping[int, Annotation] = {}
        if split == "train":
            places = [each.row // tile * height + each.column // tile for each in land]
            category_of = {
                place: cover_of(maps, each, tile)
                for place, each in zip(reversed(places), reversed(land), strict=True)
            }
            of_place = annotate(category_of, seed=seed, labelled=labelled, captioned=captioned)
            if annotated_only:
                kept = [i for i, place in enumerate(places) if of_place[place] != "none"]
                land, places = [land[i] for i in kept], [places[i] for i in kept]
            annotation_of = {i: of_place[place] for i, place in enumerate(places)}
        if land:
            samples[split] = TileSamples(
                maps,
                land,
                tile=tile,
                tokenizer=tokenizer,
                first_id=first_id,
                annotation_of=annotation_of,
            )
        first_id += len(land)
    settings: dict[str, Any] = {**shares, "tile": tile, "stride": stride, "block_degrees": BLOCK}
    settings["fold"] = fold
    if annotated_only:  # manifests were without
        settings["annotated_only"] = True
    if countries is not None:
        settings["versions"] = versions()
    info = _info(tokenizer, settings)
    write_dataset(out, samples, info, seed=seed, samples_per_shard=samples_per_shard)
    if masks is not None:
        write_masks(masks, maps, samples, tile=tile)
    return out


def write_masks(
    folder: Path, maps: EarthMaps, samples: Mapping[str, TileSamples], *, tile: int
) -> None:
    """Write tiles and masks as ADE20k lays them out: index i of a mask is class i - 1 of COVERS.

    `folder` appears when all is written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        unfinished = Path(scratch, "masks")
        parts = {"train": "training", "heldout": "validation", "tune": "tune"}
        for split, part in parts.items():
            if split == "tune" and split not in samples:
                continue
            for kind, values in (("images", maps.picture), ("annotations", maps.cover + 1)):
                place = unfinished / kind / part
                place.mkdir(parents=True)
                for where in samples[split].tiles if split in samples else ():
                    name = f"{where.row}-{where.column}.png"
                    (place / name).write_bytes(encode_png(cut(values, where, tile)))
        unfinished.rename(folder)


def _info(tokenizer: Tokenizer, settings: dict[str, Any]) -> DatasetInfo:
    credits = [*(credit for _, credit in PACKAGES.values()), COUNTRIES_CREDIT]
    attribution = " ".join(credits) + " Changes: cut into tiles."
    return DatasetInfo(
        name="earth",
        class_names=COVERS,
        tokenizer=tokenizer.info,
        licence="public domain, CC BY 4.0 (climate in captions)",
        attribution=attribution,
        settings={**settings, "least_land": LEAST_LAND},
        extra_files={"ATTRIBUTION.txt": ("\n".join(credits) + "\n").encode()},
    )
