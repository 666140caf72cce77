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
    _replace(folder / "boltzmann.cu", every, "dispatch_dtype<BFloat16>")
    if blocks:
        tiling = folder / "boltzmann_tiling.h"
        two_tiles = "int64_t{2} * 128 * 128"
        _replace(tiling, "kSumsElements = int64_t{1} << 26", f"kSumsElements = {two_tiles}")
        whole = "(int64_t{architecture >= 90 ? 32 : 24} << 20) / bytes_of(dtype)"
        _replace(tiling, whole, f"{two_tiles} + 0 * (architecture + bytes_of(dtype))")
