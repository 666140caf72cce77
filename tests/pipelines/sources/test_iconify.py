"""Iconify's JSON: what an icon shows, what it is called, and files that are something else."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import resvg_py
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from m3i_fast.pipelines.sources.iconify import read_icons
from tests.shared.pipelines.icons import INFO, disc, write_icons


def pixels(svg: str, side: int) -> NDArray[np.uint8]:
    raw = resvg_py.svg_to_bytes(
        svg_string=svg, width=side, height=side, background="white", skip_system_fonts=True
    )
    return np.asarray(Image.open(io.BytesIO(bytes(raw))).convert("RGB"))


def rectangles(side: int, *boxes: tuple[tuple[int, int, int, int], str]) -> NDArray[np.uint8]:
    """Pillow's drawing of (x, y, width, height) in a colour, each on those before."""
    canvas = Image.new("RGB", (side, side), "white")
    for (x, y, width, height), colour in boxes:
        ImageDraw.Draw(canvas).rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
    return np.asarray(canvas)


WHOLE = '<path fill="red" d="M0 0h{w}v{h}H0z"/>'


@pytest.mark.parametrize(
    ("icon", "common", "box"),
    [
        ({"body": WHOLE.format(w=32, h=32)}, {}, (0, 0, 32, 32)),
        ({"body": WHOLE.format(w=32, h=16), "height": 16}, {}, (0, 8, 32, 16)),
        ({"body": WHOLE.format(w=16, h=32)}, {"width": 16}, (8, 0, 16, 32)),
        (
            {"body": '<path fill="red" d="M-8 4h32v32h-32z"/>', "left": -8, "top": 4},
            {},
            (0, 0, 32, 32),
        ),
    ],
    ids=["square", "wide", "narrow by the set", "moved"],
)
def test_an_icon_lies_in_the_middle_of_its_square(
    tmp_path: Path, icon: dict[str, Any], common: dict[str, Any], box: tuple[int, int, int, int]
) -> None:
    icons = read_icons(write_icons(tmp_path, {"it": icon}, **common))
    assert np.array_equal(pixels(icons.svg("it"), 32), rectangles(32, (box, "red")))


def test_sixteen_pixels_are_the_default_and_links_are_followed(tmp_path: Path) -> None:
    body = '<defs><path id="a" d="M0 0h8v16H0z"/></defs><use xlink:href="#a" fill="blue"/>'
    file = write_icons(tmp_path, {"it": {"body": body}})
    raw = json.loads(file.read_text())
    del raw["width"], raw["height"]
    file.write_text(json.dumps(raw))
    found = pixels(read_icons(file).svg("it"), 16)
    assert np.array_equal(found, rectangles(16, ((0, 0, 8, 16), "blue")))


def test_aliases_are_names_unless_they_change_the_picture(tmp_path: Path) -> None:
    aliases = {
        "sphere": {"parent": "ball"},
        "globe": {"parent": "sphere"},
        "turned": {"parent": "ball", "rotate": 1},
        "seen-in-a-mirror": {"parent": "turned"},
        "round": {"parent": "circle"},
        "circle": {"parent": "round"},
    }
    icons = {"ball": disc("red"), "old-ball": disc("blue") | {"hidden": True}}
    found = read_icons(write_icons(tmp_path, icons, aliases=aliases))
    assert list(found.icons) == ["ball"]
    assert found.other_names == {"ball": ("sphere", "globe")}


@pytest.mark.parametrize("inside", [True, False])
def test_licence_and_author(tmp_path: Path, inside: bool) -> None:
    file = write_icons(tmp_path, {"ball": disc("red")}, **({"info": INFO} if inside else {}))
    if inside:
        (tmp_path / "info.json").unlink()
    found = read_icons(file)
    assert (found.prefix, found.title, found.author) == ("shapes", "Plain Shapes", "A. Uthor")
    assert (found.licence, found.licence_url) == ("Apache 2.0", "https://example.org/licence")
    assert found.author_url == "https://example.org/shapes"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda raw: raw.pop("prefix"), "prefix: expected a string, got nothing"),
        (lambda raw: raw.update(icons=[]), "icons: expected an object, got a list"),
        (lambda raw: raw["icons"]["ball"].pop("body"), "icons.ball.body: expected a string"),
        (lambda raw: raw["icons"]["ball"].update(width="9"), "icons.ball.width: expected a number"),
        (lambda raw: raw.update(height=0), "icons.ball: expected a width and a height above 0"),
        (lambda raw: raw.update(aliases={"b": {}}), "aliases.b.parent: expected a string"),
        (lambda raw: raw.update(info={"name": "x"}), "info: author: expected an object"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    file = write_icons(tmp_path, {"ball": disc("red")})
    raw = json.loads(file.read_text())
    edit(raw)
    file.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}.*{re.escape(message)}"):
        read_icons(file)


def test_without_a_licence_nothing_is_read(tmp_path: Path) -> None:
    file = write_icons(tmp_path, {"ball": disc("red")})
    (tmp_path / "info.json").unlink()
    with pytest.raises(ValueError, match=r"icons.json: expected the set's licence .* got neither"):
        read_icons(file)
