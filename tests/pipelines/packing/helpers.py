"""Sources of a few small pictures, packed as the verb does, and what the shards then hold."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import webdataset
from numpy.typing import NDArray
from PIL import Image

from m3i_fast.cli.data.pack import Pack
from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer
from m3i_fast.pipelines.dataset.manifest import Manifest, read_manifest
from m3i_fast.pipelines.dataset.verification.verify import find_faults
from m3i_fast.pipelines.packing.job import Packed, pack
from m3i_fast.pipelines.packing.workers import Run, run_here
from m3i_fast.pipelines.storage.remote_files import opened_files
from m3i_fast.terminal import make_console
from tests.shared.pipelines.data import encode_image, smooth_picture

SMALL = {"num_merges": 100, "context_length": 16}
TOKENIZER = Tokenizer(**SMALL)


def picture(seed: int = 0, image_format: str = "PNG", height: int = 20, width: int = 30) -> bytes:
    return encode_image(smooth_picture(seed, height, width), image_format)


def put(root: Path, name: str, content: bytes | None = None) -> Path:
    """Write a file below a folder; without content, a picture that its name decides."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(sum(name.encode())) if content is None else content)
    return path


def make_folder(root: Path, number: int) -> Path:
    """Pictures of three classes, every seventh of them none."""
    kinds = ("JPEG", "PNG", "BMP", "GIF")
    pictures = [picture(i, kinds[i % 4], 8, 12) for i in range(16)]
    for i in range(number):
        content = b"no picture" if i % 7 == 3 else pictures[i % 16]
        put(root, f"class {i % 3}/{i:05d}.png", content)
    return root


def pack_with(source: Path, out: Path, run: Run = run_here, **flags: Any) -> Packed:
    """Pack in this process, unless `run` says otherwise, with the flags of `m3i-fast data pack`."""
    asked = Pack(source=source, out=out, **{**SMALL, **flags})
    console = make_console(stderr=True)
    packed = pack(asked.settings(), out, run, console, cache_dir=asked.cache_dir)
    with opened_files(out, asked.cache_dir, anew=True) as files:
        report = find_faults(files, decode=True, max_pixels=asked.max_pixels)
    assert (report.faults, report.manifest) == ([], packed.manifest)
    return packed


class Row(NamedTuple):
    """A sample as webdataset reads it."""

    image: bytes
    extension: str
    label: int
    sample_id: int
    group_id: int
    captions: tuple[str, ...]

    @property
    def pixels(self) -> NDArray[np.uint8]:
        return np.asarray(Image.open(io.BytesIO(self.image)).convert("RGB"))


def rows_of(out: Path, split: str = "train") -> list[Row]:
    """Read the shards of a split back by webdataset, in the order of sample ids."""
    manifest = read_manifest(out)
    tars = [str(out / shard.file) for shard in manifest.splits[split].shards]
    found = [_row(raw) for raw in webdataset.WebDataset(tars, shardshuffle=False)]
    assert len(found) == manifest.splits[split].num_samples
    return sorted(found, key=lambda row: row.sample_id)


def _row(raw: dict[str, Any]) -> Row:
    tokens = np.frombuffer(raw.get("tok", b""), "<i4")
    lengths = np.frombuffer(raw["len"], "<i4") if "len" in raw else [len(tokens)]
    ids = np.split(tokens, np.cumsum(lengths)[:-1]) if len(tokens) else []
    extension = "jpg" if "jpg" in raw else "png"
    numbers = (int(np.frombuffer(raw[key], "<i8")[0]) for key in ("cls", "sid", "gid"))
    captions = tuple(TOKENIZER.decode(one) for one in ids)
    return Row(raw[extension], extension, *numbers, captions)


def labels_of(out: Path, split: str = "train") -> list[str | None]:
    """Return the names of the classes, in the order of sample ids."""
    names = read_manifest(out).class_names
    return [names[row.label] if row.label >= 0 else None for row in rows_of(out, split)]


def refused_of(packed: Packed) -> dict[str, str]:
    return {refusal.file: refusal.reason for refusal in packed.refused}


def contents(out: Path) -> dict[str, bytes]:
    """All that lies in a directory, hidden files too."""
    return {
        p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()
    }


def refused_file(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "refused.jsonl").read_text().splitlines()]


def sizes(manifest: Manifest) -> dict[str, int]:
    return {name: split.num_samples for name, split in manifest.splits.items()}
