"""Tars as others write them, and their index."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from m3i_fast.config.data import MAX_PIXELS
from m3i_fast.pipelines.dataset.manifest import Manifest, read_manifest
from m3i_fast.pipelines.dataset.sample_table import Rows, SampleTable
from m3i_fast.pipelines.indexing.build import IndexInfo, index_tars
from m3i_fast.pipelines.indexing.contents import Columns
from m3i_fast.pipelines.indexing.tar_places import TarFolder
from m3i_fast.pipelines.indexing.tars import find_tars
from m3i_fast.pipelines.packing.items import split_in_name
from tests.shared.pipelines.data import TOKENIZER, encode_image, smooth_picture

Files = list[tuple[str, bytes]]
JPEG, PNG, WEBP, GIF = (
    encode_image(smooth_picture(0, 20, 30), name) for name in ("JPEG", "PNG", "WEBP", "GIF")
)
INFO = IndexInfo(name="tars", licence="none", attribution="nobody")


def columns(**changes: Any) -> Columns:
    fields: dict[str, Any] = {
        "caption": "txt",
        "label": "cls",
        "group": None,
        "class_names": None,
        "max_pixels": MAX_PIXELS,
        "decode": False,
        "tokenizer": TOKENIZER,
    }
    return Columns(**{**fields, **changes})


def write_tar(file: Path, files: Iterable[tuple[str, bytes]], tar_format: int = 1) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=tar_format) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file


def as_img2dataset(start: int, count: int) -> Files:
    """Pictures with text and json, no two alike."""
    files: Files = []
    for i in range(start, start + count):
        facts = {"caption": f"picture {i}", "label": i % 3, "key": f"{i:09d}", "url": "none"}
        files += [
            (f"{i:09d}.jpg", encode_image(smooth_picture(i, 20 + i % 7, 30), "JPEG")),
            (f"{i:09d}.json", json.dumps(facts).encode()),
            (f"{i:09d}.txt", f"picture {i}".encode()),
        ]
    return files


def index(root: Path, out: Path | None = None, workers: int = 1, **changes: Any) -> Manifest:
    names = {name: split_in_name(name) or "train" for name in find_tars(root, ["**/*.tar"])}
    out = out or root
    index_tars(
        TarFolder(root),
        names,
        columns(**changes),
        INFO,
        out=out,
        workers=workers,
        advance=lambda *_: None,
    )
    return read_manifest(out)


def table(root: Path, split: str = "train") -> SampleTable:
    return SampleTable.open(root, read_manifest(root), split)


def contents(root: Path, split: str = "train") -> list[bytes]:
    """The bytes that each row points to."""
    opened = table(root, split)
    files = [(root / name).read_bytes() for name in opened.shard_files]
    return [files[r["shard"]][r["offset"] :][: r["size"]] for r in opened.rows]


def rows(root: Path, split: str = "train") -> Rows:
    return table(root, split).rows


def refused(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "refused.jsonl").read_text().splitlines()]
