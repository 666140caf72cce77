"""Pictures, samples and small data sets for the pipeline's tests."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from wds2idx import IndexCreator

from m3i_fast.config.data import ViewConfig
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.dataset.annotations.tokenizer import TokenizerInfo
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.dataset.pack import DatasetInfo, write_dataset
from m3i_fast.pipelines.dataset.sample_table import ROW, write_table
from m3i_fast.pipelines.dataset.samples import Sample
from m3i_fast.pipelines.loader import Loader

TOKENIZER = TokenizerInfo(num_merges=7, context_length=12, vocab_size=521, fingerprint="f" * 64)


def encode_image(pixels: NDArray[np.uint8], image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()


def smooth_picture(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    """[H, W, 3] soft colour noise, which JPEG and resampling treat kindly."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def sample(index: int, image: Any, **changes: Any) -> Sample:
    """A sample with a caption and a label that follow from its index."""
    fields: dict[str, Any] = {
        "image": image,
        "extension": "png" if image.startswith(b"\x89PNG") else "jpg",
        "name": f"picture-{index}",
        "sample_id": index,
        "group_id": index,
        "captions": (np.arange(1, 4 + index % 5, dtype=np.int32),),
        "label": index % 3,
    }
    return Sample(**{**fields, **changes})


def several_captions(index: int) -> tuple[NDArray[np.int32], ...]:
    """0 to 3 captions of 2 to 6 ids, no two alike: the second id says which one it is."""
    return tuple(
        np.array([index + 1, *range(100 * k, 100 * k + 1 + (index + k) % 5)], dtype=np.int32)
        for k in range(1, 1 + index % 4)
    )


def info(**changes: Any) -> DatasetInfo:
    fields: dict[str, Any] = {
        "name": "test",
        "class_names": ("a", "b", "c"),
        "tokenizer": TOKENIZER,
        "licence": "none",
        "attribution": "nobody",
        "settings": {},
    }
    return DatasetInfo(**{**fields, **changes})


def pack(out: Path, samples: Sequence[Sample], samples_per_shard: int = 4) -> Path:
    return write_dataset(
        out, {"train": samples}, info(), seed=0, samples_per_shard=samples_per_shard
    )


Components = dict[str, bytes]  # extension: content, of one sample


def repack(
    path: Path,
    change: Callable[[int, Components], Components],
    *,
    shard: int = 0,
    rename: Callable[[str], str] = str,
    tar_format: int = tarfile.USTAR_FORMAT,
) -> None:
    """Write a shard as others might: by tarfile, with an index and digests that are right.

    change: gets sample_id and components of each sample, returns those to write.
    rename: gets what the names of a sample's components share.
    """
    tar = path / f"train-{shard:06d}.tar"
    samples: dict[str, Components] = {}
    with tarfile.open(tar) as old:
        for member in old:
            key, _, extension = member.name.partition(".")
            samples.setdefault(key, {})[extension] = old.extractfile(member).read()  # type: ignore[union-attr]
    with tarfile.open(tar, "w", format=tar_format) as new:
        for key, components in samples.items():
            for extension, content in change(int(key[:9]), components).items():
                info = tarfile.TarInfo(f"{rename(key)}.{extension}")
                info.size = len(content)
                new.addfile(info, io.BytesIO(content))
    rows: dict[str, list[str]] = {}
    with tarfile.open(tar) as new:
        for member in new:
            key, _, extension = member.name.partition(".")
            found = f"{extension} {member.offset_data} {member.size} {member.name}"
            rows.setdefault(key, []).append(found)
    lines = [f"v1.2 {len(rows)}", *map(" ".join, rows.values())]
    if tar.with_suffix(".idx").exists():
        tar.with_suffix(".idx").write_text("\n".join(lines) + "\n")
    record(path, shard)


def record(path: Path, shard: int = 0) -> None:
    """Bring sizes and digests of a shard in the manifest up to date."""
    tar = path / f"train-{shard:06d}.tar"
    digests = {"num_bytes": tar.stat().st_size, "sha256": _sha256(tar)}
    index = tar.with_suffix(".idx")
    if index.exists():
        digests |= {"index_bytes": index.stat().st_size, "index_sha256": _sha256(index)}
    edit_manifest(path, lambda raw: raw["splits"]["train"]["shards"][shard].update(digests))
    if (path / "train.samples").exists():
        retable(path, shard)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def retable(path: Path, shard: int = 0) -> None:
    """Bring a shard's rows in the table of split train up to date, as tarfile reads its members."""
    manifest = read_manifest(path)
    tar = path / manifest.splits["train"].shards[shard].file
    content = tar.read_bytes()
    ends: dict[str, int] = {}
    numbers: dict[str, dict[str, int]] = {}
    with tarfile.open(tar) as opened:
        for member in opened:
            key, _, extension = member.name.partition(".")
            ends[key] = member.offset_data + -(-member.size // 512) * 512
            if extension in ("cls", "sid", "gid"):
                at = member.offset_data
                numbers.setdefault(key, {})[extension] = int.from_bytes(
                    content[at : at + 8], "little", signed=True
                )
    new = np.zeros(len(ends), ROW)
    starts = [0, *ends.values()]
    for i, (start, (key, end)) in enumerate(zip(starts[:-1], ends.items(), strict=True)):
        found = {"cls": -1, "sid": 0, "gid": 0} | numbers.get(key, {})
        label = min(max(found["cls"], -(2**31)), 2**31 - 1)
        crc = google_crc32c.value(content[start:end])
        new[i] = (start, found["sid"], found["gid"], end - start, shard, crc, label, 0, 0)
    table = np.fromfile(path / "train.samples", ROW)
    parts = [table[table["shard"] < shard], new, table[table["shard"] > shard]]
    info = asdict(write_table(path / "train.samples", parts))
    edit_manifest(path, lambda raw: raw["splits"]["train"].update(table=info))


def before_tables(path: Path) -> Path:
    """Turn a data set into one of the last format version before tables, with DALI's indices."""
    manifest = read_manifest(path)
    splits = {}
    for name, split in manifest.splits.items():
        (path / f"{name}.samples").unlink()
        shards = []
        for shard in split.shards:
            index = path / shard.index_file
            with IndexCreator(str(path / shard.file), str(index), verbose=False) as creator:
                creator.create_index()
            content = index.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            shards.append(replace(shard, index_bytes=len(content), index_sha256=digest))
        splits[name] = replace(split, table=None, shards=tuple(shards))
    (path / "manifest.json").write_text(replace(manifest, splits=splits).to_json())
    return path


def edit_manifest(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads((path / "manifest.json").read_text())
    edit(raw)
    (path / "manifest.json").write_text(json.dumps(raw, indent=2, sort_keys=True))


Packer = Callable[[Sequence[Sample]], Path]


EVERYTHING = ViewConfig(size=16, blur_probability=0.5, solarize_probability=0.3)


def equal(first: Batch, second: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.tensors(), second.tensors(), strict=True))


def take(loader: Loader, number: int) -> list[Batch]:
    return [next(loader) for _ in range(number)]
