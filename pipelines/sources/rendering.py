"""The rendering of SVG drawings on white as samples, with the annotations that they keep."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer
from m3i_fast.pipelines.dataset.samples import Sample
from m3i_fast.pipelines.optional_imports import require
from m3i_fast.pipelines.sources.concepts import Drawing
from m3i_fast.pipelines.sources.label_subsets import Annotation

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One drawing to render, with the ids that it has in the data set."""

    drawing: Drawing
    read_svg: Callable[[], str]
    name: str
    sample_id: int
    group_id: int
    read_alternates: tuple[Callable[[], str], ...] = ()  # SVGs of other pictures of the thing


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendering:
    """The settings by which every picture becomes a sample."""

    image_size: int
    image_format: Literal["png", "jpg"]
    class_names: tuple[str, ...]
    tokenizer: Tokenizer
    captions_per_picture: int

    @property
    def changes(self) -> str:
        """Sentence for the attribution that tells how the drawings were changed."""
        return f"Changes: rendered as {self.image_size} x {self.image_size} pixels on white."

    def encode(self, svg: str) -> bytes:
        """Render an SVG as [S, S] RGB on white and encode it in `image_format`."""
        buffer = io.BytesIO()
        picture = render(svg, self.image_size)
        if self.image_format == "png":
            picture.save(buffer, "PNG")
        else:
            picture.save(buffer, "JPEG", quality=95, subsampling=0)
        return buffer.getvalue()


def render(svg: str, size: int) -> Image:
    """Render an SVG as [size, size] RGB, centred on white; ValueError where resvg refuses it."""
    pillow = require("PIL.Image")
    drawn: Image = pillow.open(io.BytesIO(_png(svg, size))).convert("RGB")
    if drawn.size == (size, size):
        return drawn
    square: Image = pillow.new("RGB", (size, size), "white")
    square.paste(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
    return square


@lru_cache(maxsize=8192)  # all drawings of a style, which are compared before they are packed
def _png(svg: str, size: int) -> bytes:
    rendered = require("resvg_py").svg_to_bytes(
        svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True
    )
    return bytes(rendered)


class RenderedSamples:
    """Samples of pictures, which are rendered when they are indexed.

    annotation_of: what each concept (`Drawing.group_id`) keeps; concepts not in it keep both.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        rendering: Rendering,
        annotation_of: Mapping[int, Annotation],
    ) -> None:
        self.pictures = pictures
        self.rendering = rendering
        self.annotation_of = annotation_of

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int, /) -> Sample:
        picture = self.pictures[index]
        drawing, how = picture.drawing, self.rendering
        kept = self.annotation_of.get(drawing.group_id, "both")
        has_caption, has_class = kept in ("both", "caption"), kept in ("both", "class")
        texts = (drawing.caption, *drawing.other_captions)[: how.captions_per_picture]
        try:
            image, *alternates = [
                how.encode(read()) for read in (picture.read_svg, *picture.read_alternates)
            ]
        except ValueError as error:
            raise ValueError(f"{picture.name}: expected an SVG drawing, got {error}") from error
        return Sample(
            image=image,
            extension=how.image_format,
            name=picture.name,
            sample_id=picture.sample_id,
            group_id=picture.group_id,
            captions=tuple(how.tokenizer.encode(text) for text in texts) if has_caption else (),
            label=how.class_names.index(drawing.category) if has_class else -1,
            alternates=tuple(alternates),
        )
