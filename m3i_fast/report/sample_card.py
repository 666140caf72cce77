"""A sample as pages show it: its picture with the regions of its views, and its annotations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from m3i_fast.report.inputs import ShownRegion, ShownSample, ShownView
from m3i_fast.report.pictures import photo

NUM_COLOURS = 3  # of boxes of global views
NUM_REGION_COLOURS = 6
MOST_REGIONS = 12
"""Regions that are drawn on a picture, the first ones; the page says how many there are."""


def printable(text: str) -> str:
    """Return text that a page can hold: what is no character, or steers others, is U+FFFD.

    Lone surrogates cannot be encoded; controls and marks of direction would move or hide what
    stands beside them.
    """
    marks = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C}
    return "".join(
        "\N{REPLACEMENT CHARACTER}"
        if 0xD800 <= ord(c) < 0xE000 or ord(c) in marks or (c < " " and c not in "\t\n")
        else c
        for c in text
    )


def sample_card(sample: ShownSample) -> dict[str, Any]:
    """Return what sample_card.html shows of a sample."""
    height, width = sample.size
    caption, category = printable(sample.caption), printable(sample.category)
    name = caption or category or f"picture {sample.sample_id}"
    views = [_view(view, i, sample) for i, view in enumerate(sample.views)]
    return {
        "picture": photo(sample.picture, name),
        "caption": caption,
        "category": category,
        "columns": [(name, printable(value)) for name, value in sample.columns],
        "ids": f"sample {sample.sample_id}"
        + (f", group {sample.group_id}" if sample.group_id != sample.sample_id else ""),
        "size": f"{width} x {height}",
        "width": width,
        "height": height,
        "global_views": [view for view in views if not view["is_local"]],
        "local_views": [view for view in views if view["is_local"]],
        "regions": _regions(sample.regions[:MOST_REGIONS]),
        "more_regions": len(sample.regions[MOST_REGIONS:]),
    }


def _regions(regions: Sequence[ShownRegion]) -> list[dict[str, Any]]:
    """Return boxes of a drawing of 1 x 1, each with its text, number and colour."""
    return [
        {
            "number": region.number,
            "text": printable(region.text),
            "colour": f"r{region.number % NUM_REGION_COLOURS}",
            "x": round(region.left, 5),
            "y": round(region.top, 5),
            "width": round(region.right - region.left, 5),
            "height": round(region.bottom - region.top, 5),
        }
        for region in regions
    ]


def _view(view: ShownView, index: int, sample: ShownSample) -> dict[str, Any]:
    height, width = sample.size
    words = [f"view {index + 1}"]
    words += ["local"] * view.is_local + ["mirrored"] * view.is_mirrored
    words += ["of another picture of it"] * view.is_of_alternate
    return {
        "number": index + 1,
        "kind": "local" if view.is_local else f"g{index % NUM_COLOURS}",
        "is_local": view.is_local,
        "is_mirrored": view.is_mirrored,
        "is_of_alternate": view.is_of_alternate,
        "picture": photo(view.picture, ", ".join(words)),
        "regions": _regions(view.regions),
        "box": {"x": view.x, "y": view.y, "width": view.width, "height": view.height},
        "corner": _corner(view, width, height, at_end=index == 1 and not view.is_local),
    }


def _corner(view: ShownView, width: int, height: int, *, at_end: bool) -> str:
    """Return the style that puts a view's number at its box's first corner, or at its last one."""
    if at_end:
        right, bottom = width - view.x - view.width, height - view.y - view.height
        return f"right: {100 * right / width:.2f}%; bottom: {100 * bottom / height:.2f}%"
    return f"left: {100 * view.x / width:.2f}%; top: {100 * view.y / height:.2f}%"
