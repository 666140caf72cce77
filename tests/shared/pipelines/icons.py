"""Icon sets in Iconify's format, made by hand: no drawing of theirs is here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INFO = {
    "name": "Plain Shapes",
    "author": {"name": "A. Uthor", "url": "https://example.org/shapes"},
    "license": {"title": "Apache 2.0", "spdx": "Apache-2.0", "url": "https://example.org/licence"},
}


def slug(name: str) -> str:
    """As icon sets spell a name: "flag: Kenya" is flag-kenya."""
    return "-".join(re.findall(r"[^\W_]+", name.lower().replace("&", " and ")))


def disc(colour: str, side: float = 32) -> dict[str, Any]:
    half = side / 2
    return {"body": f'<circle cx="{half}" cy="{half}" r="{0.8 * half}" fill="{colour}"/>'}


def write_icons(
    folder: Path, icons: Mapping[str, Mapping[str, Any]], *, prefix: str = "shapes", **more: Any
) -> Path:
    """A folder with icons.json and info.json, as npm's packages have them; returns the first."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "icons.json"
    whole = {"prefix": prefix, "icons": dict(icons), "width": 32, "height": 32, **more}
    file.write_text(json.dumps(whole))
    (folder / "info.json").write_text(json.dumps({"prefix": prefix, **INFO}))
    return file
