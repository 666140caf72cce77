"""Pictures, samples and small data sets for the pipeline's tests."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from m3i_fast.config.data import ViewConfig
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.dataset.pack import DatasetInfo, write_dataset
from m3i_fast.pipelines.dataset.samples import Sample
from m3i_fast.pipelines.dataset.tokenizer import TokenizerInfo
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
    tar.with_suffix(".idx").write_text("\n".join(lines) + "\n")
    record(path, shard)


def record(path: Path, shard: int = 0) -> None:
    """Bring sizes and digests of a shard in the manifest up to date."""
    tar = path / f"train-{shard:06d}.tar"
    edit_manifest(
        path,
        lambda raw: raw["splits"]["train"]["shards"][shard].update(
            num_bytes=tar.stat().st_size,
            sha256=hashlib.sha256(tar.read_bytes()).hexdigest(),
            index_bytes=tar.with_suffix(".idx").stat().st_size,
            index_sha256=hashlib.sha256(tar.with_suffix(".idx").read_bytes()).hexdigest(),
        ),
    )


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
