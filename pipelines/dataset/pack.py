"""Packing of a dataset directory: validated, globally shuffled WebDataset shards and a manifest.

The directory appears at OUT once everything is written; the same samples and settings give the same
bytes on every run.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress, TextColumn

from m3i_fast.config.data import MAX_PIXELS
from m3i_fast.durable_files import write_atomically
from m3i_fast.pipelines.dataset import alternates
from m3i_fast.pipelines.dataset.annotations import captions
from m3i_fast.pipelines.dataset.annotations.columns import (
    COLUMNS_SUFFIX,
    ColumnInfo,
    rows_of,
    write_columns,
)
from m3i_fast.pipelines.dataset.annotations.tokenizer import TokenizerInfo
from m3i_fast.pipelines.dataset.manifest import (
    INDEXED,
    MANIFEST_NAME,
    PACKED,
    TABLE_SUFFIX,
    Manifest,
    ShardInfo,
    SplitInfo,
    is_dataset,
    is_free,
)
from m3i_fast.pipelines.dataset.sample_table import ROW, Rows, write_table
from m3i_fast.pipelines.dataset.samples import Counts, Sample, SampleSource, Tally
from m3i_fast.pipelines.optional_imports import require

# Names of the files of a data set, of any format.
_OWN = re.compile(
    r"manifest\.json|(ATTRIBUTION|LICENSE[\w-]*)\.txt|\w+(-\d+\.(tar|idx)|\.samples|\.columns)"
)


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
    columns: tuple[ColumnInfo, ...] = ()


# ---- A shard -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedShard:
    """A shard that is written: its files, and what the manifest says of its samples."""

    info: ShardInfo
    rows: Rows  # of the table; `shard` is not set
    num_captions: tuple[int, ...]  # of each sample
    num_alternates: tuple[int, ...]
    extensions: tuple[str, ...]  # of its pictures, sorted
    least_size: tuple[int, int]  # height, width
    most_size: tuple[int, int]
    columns: NDArray[np.void] | None = None  # rows of the split's columns, where it has any


def _components(sample: Sample) -> Iterator[tuple[str, bytes]]:
    yield sample.extension, sample.image
    yield from captions.components(sample.captions)
    yield from alternates.components(sample.alternates)
    for name, value in (("cls", sample.label), ("sid", sample.sample_id), ("gid", sample.group_id)):
        yield name, np.array([value], dtype="<i8").tobytes()


class _Hashed(io.RawIOBase):
    """A file that is hashed while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.size = file, hashlib.sha256(), 0
        self.crc32c = 0  # of what was written since it was set to 0
        self._extend = require("google_crc32c").extend

    def write(self, content: Any, /) -> int:
        self.sha256.update(content)
        self.crc32c = self._extend(self.crc32c, bytes(content))
        self.size += len(content)
        return self.file.write(content)

    def tell(self) -> int:
        return self.size


def write_shard(
    file: Path,
    name: str,
    samples: Iterable[tuple[Sample, tuple[int, int]]],
    columns: Sequence[ColumnInfo] = (),
) -> PackedShard:
    """Write one tar, and return its counts and its rows of the split's table.

    name: what the tar will be called, which `file` need not be yet. samples: at least one, each
    with its upright (height, width), checked before.
    """
    kept: list[tuple[int, ...]] = []
    num_captions: list[int] = []
    num_alternates: list[int] = []
    values: list[Mapping[str, Any]] = []
    extensions: set[str] = set()
    sizes: set[tuple[int, int]] = set()
    with file.open("wb") as raw:
        hashed = _Hashed(raw)
        with tarfile.open(fileobj=hashed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for sample, size in samples:
                start, hashed.crc32c = tar.offset, 0
                _add(tar, sample)
                ids = (start, sample.sample_id, sample.group_id)
                kept.append((*ids, tar.offset - start, 0, hashed.crc32c, sample.label, 0, 0))
                num_captions.append(len(sample.captions))
                num_alternates.append(len(sample.alternates))
                values.append(sample.columns)
                extensions.add(sample.extension)
                sizes.add(size)
        raw.flush()
        os.fsync(raw.fileno())
    heights, widths = zip(*sizes, strict=True)
    return PackedShard(
        info=ShardInfo(
            file=name,
            num_samples=len(kept),
            num_bytes=hashed.size,
            sha256=hashed.sha256.hexdigest(),
        ),
        rows=np.array(kept, dtype=ROW),
        num_captions=tuple(num_captions),
        num_alternates=tuple(num_alternates),
        extensions=tuple(sorted(extensions)),
        least_size=(min(heights), min(widths)),
        most_size=(max(heights), max(widths)),
        columns=rows_of(columns, values) if columns else None,
    )


def _add(tar: tarfile.TarFile, sample: Sample) -> None:
    """Add the members of a sample to a tar."""
    key = f"{sample.sample_id:09d}-{re.sub('[^A-Za-z0-9_-]', '_', sample.name)[:60]}"
    for extension, content in _components(sample):
        member = tarfile.TarInfo(f"{key}.{extension}")  # mtime, uid and gid are 0
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def write_manifest(
    directory: Path,
    splits: Mapping[str, Sequence[PackedShard]],
    info: DatasetInfo,
    settings: Mapping[str, Any],
) -> Manifest:
    """Write tables and, last, the manifest of shards that lie in a directory.

    settings: beside those of `info`.
    """
    written = {
        name: _write_split(directory, name, shards, info.columns) for name, shards in splits.items()
    }
    for name, content in info.extra_files.items():
        write_atomically(directory / name, content)
    shards = [shard for split in splits.values() for shard in split]
    least = [shard.least_size for shard in shards]
    most = [shard.most_size for shard in shards]
    manifest = Manifest(
        name=info.name,
        class_names=info.class_names,
        tokenizer=info.tokenizer,
        image_format="+".join(sorted({e for shard in shards for e in shard.extensions})),
        min_image_size=(min(h for h, _ in least), min(w for _, w in least)),
        max_image_size=(max(h for h, _ in most), max(w for _, w in most)),
        licence=info.licence,
        attribution=info.attribution,
        settings={**info.settings, **settings},
        splits=written,
        columns=info.columns,
    )
    write_atomically(directory / MANIFEST_NAME, manifest.to_json().encode())
    return manifest


def _write_split(
    directory: Path, name: str, shards: Sequence[PackedShard], columns: Sequence[ColumnInfo]
) -> SplitInfo:
    """Write the table of a split, and its columns if there are any; return its entry."""
    counts = Counts()
    parts = []
    for number, shard in enumerate(shards):
        rows = shard.rows.copy()
        rows["shard"] = number
        parts.append(rows)
        of_rows = (rows["label"].tolist(), rows["group_id"].tolist())
        for num_captions, num_alternates, label, group_id in zip(
            shard.num_captions, shard.num_alternates, *of_rows, strict=True
        ):
            counts.add(
                num_captions=num_captions,
                num_alternates=num_alternates,
                label=label,
                group_id=group_id,
            )
    table = write_table(directory / f"{name}{TABLE_SUFFIX}", parts)
    split = replace(counts.split([shard.info for shard in shards]), table=table)
    if not columns:
        return split
    of_shards = [shard.columns for shard in shards if shard.columns is not None]
    written = write_columns(directory / f"{name}{COLUMNS_SUFFIX}", columns, of_shards)
    return replace(split, columns=written)


# ---- The order -----------------------------------------------------------------------------------


def keyed_order(num: int, *key: object) -> list[int]:
    """Return a permutation of range(num) that depends on the key alone, not on a library."""
    return sorted(range(num), key=lambda index: keyed_hash(*key, index))


def keyed_hash(*key: object) -> bytes:
    """Hash a key to bytes to sort by: the order of two keys depends on these two alone."""
    return hashlib.sha256("|".join(map(str, key)).encode()).digest()


def shard_name(split: str, number: int) -> str:
    """Return the name of a shard of a split."""
    return f"{split}-{number:06d}.tar"


# ---- A dataset in one process --------------------------------------------------------------------


def _write_splits(
    directory: Path,
    splits: Mapping[str, SampleSource],
    info: DatasetInfo,
    *,
    seed: int,
    samples_per_shard: int,
    max_pixels: int,
) -> None:
    tally = Tally(info.tokenizer, len(info.class_names), max_pixels, info.columns)
    written: dict[str, list[PackedShard]] = {}
    shown = (TextColumn("{task.description}", markup=False), *Progress.get_default_columns()[1:])
    with Progress(*shown, console=Console(stderr=True), transient=True) as progress:
        for split, source in splits.items():
            order = keyed_order(len(source), "order", seed, split)
            task = progress.add_task(f"packing {info.name}/{split}", total=len(order))
            written[split] = []
            for start in range(0, len(order), samples_per_shard):
                chosen = order[start : start + samples_per_shard]
                name = shard_name(split, len(written[split]))
                samples = (tally.check(source[i], split) for i in chosen)
                shard = write_shard(directory / name, name, samples, info.columns)
                written[split].append(shard)
                progress.advance(task, len(chosen))
            tally.identities.check_groups(split)
    settings = {"samples_per_shard": samples_per_shard, "seed": seed}
    write_manifest(directory, written, info, settings)


@contextlib.contextmanager
def replaced_directory(out: Path) -> Iterator[Path]:
    """Make a directory beside `out` that replaces it when the block ends without an error.

    An older dataset at `out` stays whole until then. Raises ValueError where `out` holds other
    files, or a dataset of pictures of the user.
    """
    if not is_free(out):
        _expect_own(out)
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


def _expect_own(out: Path) -> None:
    """Raise ValueError unless all that a directory holds was written by `write_dataset`."""
    if not is_dataset(out):
        raise ValueError(f"OUT: expected a new or empty directory or a dataset, got {out}")
    settings = json.loads((out / MANIFEST_NAME).read_bytes()).get("settings", {})
    for entry, command in ((INDEXED, "index"), (PACKED, "pack")):
        if entry in settings:
            raise ValueError(
                f"OUT: expected a new or empty directory, got {out} with a data set of m3i-fast "
                f"data {command}: name another directory, or remove it"
            )
    if foreign := sorted(path.name for path in out.iterdir() if not _OWN.fullmatch(path.name)):
        raise ValueError(
            f"OUT: expected a directory with nothing beside its data set, got {foreign[0]} in "
            f"{out}: move it, or name another directory"
        )


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
