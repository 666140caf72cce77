"""Packing of a dataset directory: validated, globally shuffled WebDataset shards and a manifest.

The directory appears at OUT once everything is written; the same samples and settings give the same
bytes on every run.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, TextColumn

from m3i_fast.config.data import MAX_PIXELS
from m3i_fast.pipelines.dataset import alternates, captions
from m3i_fast.pipelines.dataset.manifest import (
    MANIFEST_NAME,
    TABLE_SUFFIX,
    Manifest,
    ShardInfo,
    SplitInfo,
    is_dataset,
    is_free,
    sha256_file,
)
from m3i_fast.pipelines.dataset.sample_table import ROW, Rows, add_checksums, write_table
from m3i_fast.pipelines.dataset.samples import Sample, SampleSource, Tally
from m3i_fast.pipelines.dataset.tar_shards import INDEX_VERSION, TAR_BLOCK
from m3i_fast.pipelines.dataset.tokenizer import TokenizerInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetInfo:
    """The entries of a manifest that the packer does not count itself."""

    name: str
    class_names: tuple[str, ...]
    tokenizer: TokenizerInfo
    licence: str
    attribution: str
    settings: dict[str, Any]
    extra_files: dict[str, bytes] = field(default_factory=dict)  # content by name in OUT


def _components(sample: Sample) -> Iterator[tuple[str, bytes]]:
    yield sample.extension, sample.image
    yield from captions.components(sample.captions)
    yield from alternates.components(sample.alternates)
    for name, value in (("cls", sample.label), ("sid", sample.sample_id), ("gid", sample.group_id)):
        yield name, np.array([value], dtype="<i8").tobytes()


def _write_shard(file: Path, samples: Iterator[Sample], number: int) -> tuple[ShardInfo, Rows]:
    """Write one tar and its DALI index (format of wds2idx v1.2), and make its rows of the table."""
    rows, found = [], []
    with (
        file.open("wb") as raw,
        tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for sample in samples:
            key = f"{sample.sample_id:09d}-{re.sub('[^A-Za-z0-9_-]', '_', sample.name)[:60]}"
            row, start = [], tar.offset
            for extension, content in _components(sample):
                member = tarfile.TarInfo(f"{key}.{extension}")  # mtime, uid and gid are 0
                member.size = len(content)
                offset = tar.offset + TAR_BLOCK
                tar.addfile(member, io.BytesIO(content))
                row.append(f"{extension} {offset} {len(content)} {member.name}")
            rows.append(" ".join(row))
            ids = sample.sample_id, sample.group_id
            found.append((start, *ids, tar.offset - start, number, 0, sample.label, 0, 0))
        tar.close()
        raw.flush()
        os.fsync(raw.fileno())
    index = file.with_suffix(".idx")
    index.write_text("\n".join([f"{INDEX_VERSION} {len(rows)}", *rows]) + "\n")
    table = np.array(found, ROW)
    add_checksums(file, table)
    shard = ShardInfo(
        file=file.name,
        num_samples=len(rows),
        num_bytes=file.stat().st_size,
        sha256=sha256_file(file),
        index_bytes=index.stat().st_size,
        index_sha256=sha256_file(index),
    )
    return shard, table


def keyed_order(num: int, *key: object) -> list[int]:
    """Return a permutation of range(num) that depends on the key alone, not on a library."""
    return sorted(range(num), key=lambda index: keyed_hash(*key, index))


def keyed_hash(*key: object) -> bytes:
    """Hash a key to bytes to sort by: the order of two keys depends on these two alone."""
    return hashlib.sha256("|".join(map(str, key)).encode()).digest()


def _write_splits(
    directory: Path,
    splits: Mapping[str, SampleSource],
    info: DatasetInfo,
    *,
    seed: int,
    samples_per_shard: int,
    max_pixels: int,
) -> None:
    tally = Tally(info.tokenizer, len(info.class_names), max_pixels)
    written: dict[str, SplitInfo] = {}
    columns = (TextColumn("{task.description}", markup=False), *Progress.get_default_columns()[1:])
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for split, source in splits.items():
            order = keyed_order(len(source), "order", seed, split)
            task = progress.add_task(f"packing {info.name}/{split}", total=len(order))
            shards: list[ShardInfo] = []
            rows: list[Rows] = []
            for start in range(0, len(order), samples_per_shard):
                chosen = order[start : start + samples_per_shard]
                samples = (tally.check(source[i], split) for i in chosen)
                file = directory / f"{split}-{len(shards):06d}.tar"
                shard, of_shard = _write_shard(file, samples, len(shards))
                shards.append(shard)
                rows.append(of_shard)
                progress.advance(task, len(chosen))
            table = write_table(directory / f"{split}{TABLE_SUFFIX}", rows)
            written[split] = replace(tally.split(split, shards), table=table)
    for name, content in info.extra_files.items():
        (directory / name).write_bytes(content)
    heights, widths = zip(*tally.sizes, strict=True)
    manifest = Manifest(
        name=info.name,
        class_names=info.class_names,
        tokenizer=info.tokenizer,
        image_format="+".join(sorted(tally.extensions)),
        min_image_size=(min(heights), min(widths)),
        max_image_size=(max(heights), max(widths)),
        licence=info.licence,
        attribution=info.attribution,
        settings={**info.settings, "samples_per_shard": samples_per_shard, "seed": seed},
        splits=written,
    )
    (directory / MANIFEST_NAME).write_text(manifest.to_json())


@contextlib.contextmanager
def replaced_directory(out: Path) -> Iterator[Path]:
    """Make a directory beside `out` that replaces it when the block ends without an error.

    An older dataset at `out` stays whole until then. Raises ValueError where `out` holds other
    files.
    """
    if not (is_free(out) or is_dataset(out)):
        raise ValueError(f"OUT: expected a new or empty directory or a dataset, got {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.packing-", dir=out.parent))
    old = temporary.with_name(temporary.name.replace(".packing-", ".old-"))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        if out.exists():
            out.rename(old)
        try:
            temporary.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_dataset(
    out: Path,
    splits: Mapping[str, SampleSource],
    info: DatasetInfo,
    *,
    seed: int,
    samples_per_shard: int,
    max_pixels: int = MAX_PIXELS,
) -> Path:
    """Pack splits into the dataset directory `out` and return it; ValueError names a bad sample.

    Samples are shuffled over all shards. After any error `out` is as before. max_pixels: larger
    pictures are refused by their header, before they are decoded.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard: expected at least 1, got {samples_per_shard}")
    for name, source in splits.items():
        if len(source) == 0:
            raise ValueError(f"split {name}: expected at least one sample, got none")
    out = Path(os.path.abspath(out))
    with replaced_directory(out) as directory:
        _write_splits(
            directory,
            splits,
            info,
            seed=seed,
            samples_per_shard=samples_per_shard,
            max_pixels=max_pixels,
        )
    return out
