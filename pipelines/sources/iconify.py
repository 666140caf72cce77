"""Icon sets in Iconify's JSON format, the icons.json of its npm packages: names and drawings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3i_fast.json_files import misfit, read_json

_NUMBERS = {f"{name}?": float for name in ("left", "top", "width", "height")}
_ICONS = {
    "prefix": str,
    "icons": {str: {"body": str, "hidden?": bool, **_NUMBERS}},
    "aliases?": {str: {"parent": str}},
    "info?": dict,
    **_NUMBERS,
}
_INFO = {
    "name": str,
    "author": {"name": str, "url?": str},
    "license": {"title": str, "url?": str},
}
_CHANGES = {"hFlip", "vFlip", "rotate"}  # keys of an alias that change its parent's drawing
_SIDE = 16  # Iconify's default width and height
_ROOT = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'viewBox="{left:g} {top:g} {side:g} {side:g}">{body}</svg>'
)


@dataclass(frozen=True, kw_only=True, slots=True)
class IconSet:
    """The drawings of one icons.json, with their licence and author."""

    prefix: str
    title: str
    author: str
    author_url: str
    licence: str
    licence_url: str
    icons: Mapping[str, Mapping[str, Any]]  # name -> body and numbers
    other_names: Mapping[str, tuple[str, ...]]  # name -> its aliases

    def svg(self, name: str) -> str:
        """Return an icon as an SVG file, centred in a square."""
        icon = self.icons[name]
        width, height = icon["width"], icon["height"]
        side = max(width, height)
        return _ROOT.format(
            left=icon["left"] - (side - width) / 2,
            top=icon["top"] - (side - height) / 2,
            side=side,
            body=icon["body"],
        )


def read_icons(file: Path) -> IconSet:
    """Read an icons.json, and its licence from there or from the info.json beside it.

    Icons that the set hides (superseded ones, kept for old pages) are left out, and so are aliases
    that mirror or rotate their icon. ValueError names the file and what is wrong in it.
    """
    raw = read_json(file, _ICONS)
    info = _read_info(file, raw)
    common = {"left": 0, "top": 0, "width": _SIDE, "height": _SIDE}
    common |= {name: raw[name] for name in common if name in raw}
    icons = {
        name: {**common, **icon} for name, icon in raw["icons"].items() if not icon.get("hidden")
    }
    for name, icon in icons.items():
        if min(icon["width"], icon["height"]) <= 0:
            raise ValueError(
                f"{file}: icons.{name}: expected a width and a height above 0, got "
                f"{icon['width']} x {icon['height']}"
            )
    return IconSet(
        prefix=raw["prefix"],
        title=info["name"],
        author=info["author"]["name"],
        author_url=info["author"].get("url", ""),
        licence=info["license"]["title"],
        licence_url=info["license"].get("url", ""),
        icons=icons,
        other_names=_other_names(raw.get("aliases", {})),
    )


def _read_info(file: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Read title, author and licence of a set; ValueError where it has none."""
    beside = file.with_name("info.json")
    if "info" not in raw and not beside.is_file():
        raise ValueError(
            f"{file}: expected the set's licence as its entry info or in {beside.name} beside it, "
            "as its npm package has them, got neither"
        )
    info: dict[str, Any] = raw["info"] if "info" in raw else read_json(beside)
    where = f"{file}: info" if "info" in raw else f"{beside}"
    if wrong := misfit(info, _INFO):
        raise ValueError(f"{where}: {wrong}")
    return info


def _other_names(aliases: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Map each icon to the aliases that show it unchanged, aliases of aliases included."""
    aliases_of: dict[str, tuple[str, ...]] = {}
    for alias in aliases:
        name, passed = alias, set[str]()
        while name in aliases and name not in passed and not _CHANGES & aliases[name].keys():
            passed.add(name)
            name = aliases[name]["parent"]
        if name not in aliases:
            aliases_of[name] = (*aliases_of.get(name, ()), alias)
    return aliases_of
