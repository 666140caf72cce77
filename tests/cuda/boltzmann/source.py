"""Copies of boltzmann's sources that compile faster, or whose blocks are small."""

from __future__ import annotations

from pathlib import Path


def _replace(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert text.count(before) == 1, f"{text.count(before)} times: {before}"
    path.write_text(text.replace(before, after))


def shrink(folder: Path, *, blocks: bool = False) -> None:
    """To bfloat16 alone and, if asked, to blocks of two tiles."""
    every = "dispatch_dtype<BFloat16, Float16, float, double>"
    for source in ("launch.cu", "vectors.cu"):
        _replace(folder / "sm80" / source, every, "dispatch_dtype<BFloat16>")
    for both, one in (("float, double", "float"), ("BFloat16, Float16", "BFloat16")):
        _replace(folder / "sm80/vectors.cu", f"dispatch_dtype<{both}>", f"dispatch_dtype<{one}>")
    wgmma = "dispatch_dtype<BFloat16, Float16>"
    _replace(folder / "sm90/launch.cu", wgmma, "dispatch_dtype<BFloat16>")
    if blocks:
        _limit_elements(folder, "int64_t{2} * 128 * 128")


def _limit_elements(folder: Path, elements: str) -> None:
    tiling = folder / "tiling.h"
    _replace(tiling, "kPatches = 1024", "kPatches = 2")
    _replace(tiling, "kManyPatches = 4 * kPatches", "kManyPatches = kPatches")
    whole = "(int64_t{architecture >= 90 ? kGradsMibH100 : kGradsMibA100} << 20) / bytes_of(dtype)"
    _replace(tiling, whole, f"{elements} + 0 * (architecture + bytes_of(dtype))")


def limit_blocks(folder: Path, clusters: int) -> None:
    """By warpgroups: blocks of two tiles and two patches, shared by so many clusters at most."""
    _limit_elements(folder, "int64_t{2} * 256 * 256")
    every = "at_once = multiprocessors / kClusterBlocks"
    _replace(folder / "sm90/tiling.h", every, f"at_once = {clusters} + 0 * multiprocessors")
