"""The pictures that are searched: those of a packed data set, or the files in a folder.

Legend: N pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from m3i_fast.config.data import MAX_PIXELS
from m3i_fast.durable_files import what_is_at
from m3i_fast.pipelines.dataset.annotations import captions
from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer
from m3i_fast.pipelines.dataset.directory import check_split
from m3i_fast.pipelines.dataset.files import DatasetFiles, check_sizes
from m3i_fast.pipelines.dataset.manifest import TOKENS_MEMBER, is_dataset
from m3i_fast.pipelines.dataset.pictures import FORMATS, decode_pixels, stored_size
from m3i_fast.pipelines.dataset.sample_table import BAD, NO_CRC, SampleTable, checksum
from m3i_fast.pipelines.packing.conversion import convert
from m3i_fast.pipelines.packing.items import Listing, SourceOptions
from m3i_fast.pipelines.packing.readers.guess import make_reader, resolve
from m3i_fast.pipelines.storage.objects import url_of
from m3i_fast.pipelines.storage.remote_files import opened_files
from m3i_fast.pipelines.tar_members import sample_files
from m3i_fast.pipelines.text_captions import caption_in

READ_AS_FOLDER = ("folder", "imagefolder")


class About(NamedTuple):
    """What is known of a picture beside its label."""

    name: str
    captions: tuple[str, ...]


class Pictures(Protocol):
    """Pictures by their row, read in any order and by any thread."""

    name: str
    digest: str
    """Of what the pictures are: it changes with any of them."""
    class_names: tuple[str, ...]
    label: NDArray[np.int64]  # [N], -1: none
    has_captions: bool
    notes: Sequence[str]
    """What was found or left out, for the user to read."""

    def read(self, row: int) -> bytes:
        """Return the encoded picture; raises OSError or ValueError where it cannot be read."""

    def about(self, row: int) -> About:
        """Return name and captions; raises as `read`."""


@contextmanager
def open_pictures(path: Path, split: str | None, cache_dir: Path) -> Iterator[Pictures]:
    """Yield the pictures of a packed data set, in a folder or a bucket, or those in a folder.

    split: one of them; None: all. cache_dir: for what is copied of a bucket. Raises
    FileNotFoundError where there is nothing at `path`, and ValueError where there are no pictures,
    no such split, or files that do not fit together.
    """
    if url_of(path) is None and not path.exists():
        raise FileNotFoundError(
            f"--data: expected a packed data set or a folder of pictures, got {what_is_at(path)}"
        )
    if url_of(path) is not None or is_dataset(path):
        with opened_files(path, cache_dir) as files:
            yield PackedPictures(files, split)
    else:
        yield FolderPictures(path, split)


class PackedPictures:
    """The pictures of a packed data set, split by split; its `BAD` samples are left out."""

    def __init__(self, files: DatasetFiles, split: str | None) -> None:
        manifest = files.manifest
        names = sorted(manifest.splits) if split is None else [split]
        for name in names:
            check_sizes(files, manifest.split(name))
            check_split(files, name)
        self._files, self._splits = files, names
        self._tables = [SampleTable.open(files.folder, manifest, name) for name in names]
        good = [np.flatnonzero((table.rows["flags"] & BAD) == 0) for table in self._tables]
        self._number = np.concatenate(good)  # [N], in its split's table
        self._split = np.repeat(np.arange(len(names)), list(map(len, good)))  # [N]
        labels = [t.rows["label"][of] for t, of in zip(self._tables, good, strict=True)]
        self.label = np.concatenate(labels).astype(np.int64)
        self.name, self.class_names = manifest.name, manifest.class_names
        self.digest = hashlib.sha256("|".join([manifest.digest, *names]).encode()).hexdigest()
        splits = [manifest.split(name) for name in names]
        self.has_captions = any(info.num_captions for info in splits)
        num_bad = sum(info.num_bad for info in splits)
        self.notes: Sequence[str] = (
            [f"{num_bad:,} samples are marked as bad and left out"] if num_bad else []
        )
        is_decoded = self.has_captions and manifest.caption_member == TOKENS_MEMBER
        self._tokenizer = Tokenizer.from_info(manifest.tokenizer) if is_decoded else None

    def read(self, row: int) -> bytes:
        """Read a sample, compare it with its checksum, and return its picture."""
        _, parts = self._sample(row)
        for extension in FORMATS:
            if extension in parts:
                return parts[extension]
        raise ValueError(f"{self._place(row)}: expected a picture, got {', '.join(parts)}")

    def about(self, row: int) -> About:
        """Return split and sample id, and the captions: of token ids what they decode to."""
        if not self.has_captions:
            return About(self._place(row), ())
        _, parts = self._sample(row)
        return About(self._place(row), tuple(self._captions(parts)))

    def _sample(self, row: int) -> tuple[str, dict[str, bytes]]:
        table = self._tables[self._split[row]]
        rows = table.at(self._number[row : row + 1])
        (content,) = self._files.samples(table, rows)
        if not rows["flags"][0] & NO_CRC and checksum(content) != rows["crc32c"][0]:
            raise ValueError(
                f"{self._place(row)}: the bytes are not those that were packed; "
                f"{self._files.restore}"
            )
        return sample_files(content)

    def _captions(self, parts: dict[str, bytes]) -> Iterator[str]:
        if self._tokenizer is not None:
            tokens, lengths = (parts.get(name) for name in (captions.TOKENS, captions.LENGTHS))
            yield from map(self._tokenizer.decode, captions.separate(tokens, lengths))
            return
        member, _, field = self._files.manifest.caption_member.partition(":")
        if caption := caption_in(parts.get(member, b""), field):
            yield caption

    def _place(self, row: int) -> str:
        split = self._split[row]
        sample_id = self._tables[split].rows["sample_id"][self._number[row]]
        return f"{self._splits[split]}, sample {sample_id}"


class FolderPictures:
    """Files of pictures below a folder, with a class each where its folders look like classes."""

    def __init__(self, path: Path, split: str | None) -> None:
        self._reader, listing = _listed(path)
        splits = sorted({item.split for item in listing.items})
        if split is not None and split not in splits:
            raise ValueError(f"--split: expected one of {splits}, got {split!r}")
        self._items = [item for item in listing.items if split in (None, item.split)]
        self.name, self.class_names = path.resolve().name, listing.class_names
        self.label = np.array([item.label for item in self._items], np.int64)
        self.has_captions = False
        stamps = [[item.name, *item.stamp, item.label] for item in self._items]
        self.digest = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
        refused = [f"{file}: {reason}" for file, reason, _ in listing.refusals]
        self.notes: Sequence[str] = [*listing.notes, *_some(refused, "left out")]

    def read(self, row: int) -> bytes:
        """Read a file."""
        return self._reader.read(self._items[row].place)

    def about(self, row: int) -> About:
        """Return the file's name below the folder."""
        return About(self._items[row].name, ())


def _listed(path: Path) -> tuple[Any, Listing]:
    """Return the reader of a folder and what it holds; ValueError where that is no pictures."""
    try:
        options, why = resolve(SourceOptions(path=path, kind="auto"))
    except ValueError as error:
        raise ValueError(f"--data: {str(error).removeprefix('SOURCE: ')}") from None
    if options.kind not in READ_AS_FOLDER:
        raise ValueError(
            f"--data: expected a packed data set or a folder of pictures, got {path} ({why}): pack "
            f"it first, by m3i-fast data pack {path} DIR"
        )
    reader = make_reader(options)
    listing = reader.list()
    if not listing.items:
        refused = [f"{file}: {reason}" for file, reason, _ in listing.refusals]
        said = "; ".join(_some(refused, "left out"))
        raise ValueError(f"--data: expected pictures below {path}, got none: {said}")
    return reader, listing


def _some(lines: Sequence[str], what: str) -> list[str]:
    """Return the first of many lines under their number."""
    if not lines:
        return []
    more = ", ..." if len(lines) > 3 else ""
    return [f"{len(lines):,} {what}: {'; '.join(lines[:3])}{more}"]


def decode(content: bytes) -> NDArray[np.uint8]:
    """Decode a picture to [height, width, 3], upright, with the pixels that `Transform` has.

    Kinds that shards do not hold (GIF, BMP, TIFF, ...) are converted first, as packing does. Raises
    ValueError for what is no picture, is damaged, or has more than MAX_PIXELS pixels, which its
    header tells before anything is decoded.
    """
    try:
        _, height, width = stored_size(lambda at, count: content[at : at + count])
    except ValueError:
        content = convert(content, max_pixels=MAX_PIXELS).content
    else:
        if height * width > MAX_PIXELS:
            raise ValueError(
                f"expected a picture of at most {MAX_PIXELS:,} pixels, got {height} x {width} = "
                f"{height * width:,}"
            )
    return decode_pixels(content, MAX_PIXELS)
