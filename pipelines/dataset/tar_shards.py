"""Reading of shards without DALI: their index, the tar headers it points to, and their contents."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from m3i_fast.pipelines.dataset import alternates
from m3i_fast.pipelines.dataset.manifest import ShardInfo
from m3i_fast.pipelines.dataset.pictures import FORMATS, Read, check_header

TAR_BLOCK = 512
INTEGERS = ("cls", "sid", "gid")  # label, sample id and group id: an int64 each
FIRST_BYTES = 1024  # of a picture, which mostly hold its header
INDEX_VERSION = "v1.2"  # of DALI's wds2idx


class Component(NamedTuple):
    """The index's entry of one file of a sample."""

    extension: str
    offset: int  # of its content in the tar
    size: int
    name: str  # in the tar


class Member(NamedTuple):
    """The content of one file of a sample."""

    name: str
    content: bytes


IndexRow = tuple[Component, ...]  # of one sample


def read_index(path: Path, shard: ShardInfo) -> list[IndexRow]:
    """Read the index of a shard: the components of every sample, in order.

    Raises ValueError naming the first sample that lacks a component, has one twice or of a wrong
    size, or lies outside of the tar. DALI does not check an index: a wrong one ends its process by
    a segmentation fault.
    """
    file = path / shard.index_file
    text = file.read_bytes().decode("utf-8", "replace")
    header, *rows = text.removesuffix("\n").split("\n")
    if (header, len(rows)) != (f"{INDEX_VERSION} {shard.num_samples}", shard.num_samples):
        raise ValueError(
            f"{file}: expected '{INDEX_VERSION} {shard.num_samples}' and as many rows (manifest), "
            f"got {header[:40]!r} and {len(rows)} rows"
        )
    index = []
    for number, row in enumerate(rows, 1):
        parsed = _parse(row)
        if parsed is None:
            raise ValueError(
                f"{file}: row {number}: expected EXTENSION OFFSET SIZE NAME of each component, "
                f"got {row[:80]!r}"
            )
        fault = _row_fault(parsed, shard.num_bytes)
        if fault is not None:
            raise ValueError(f"{file}: {fault}")
        index.append(parsed)
    return index


def _parse(row: str) -> IndexRow | None:
    columns = row.split()  # extension, offset, size and name of each component
    numbers = "".join(columns[1::4] + columns[2::4])
    if not columns or len(columns) % 4 or not (numbers.isascii() and numbers.isdecimal()):
        return None
    offsets, sizes = (map(int, columns[i::4]) for i in (1, 2))
    return tuple(map(Component, columns[::4], offsets, sizes, columns[3::4]))


def _row_fault(row: IndexRow, tar_bytes: int) -> str | None:
    """Return what is wrong with the row of a sample, expected and got; None: nothing."""
    name = row[0].name.removesuffix(f".{row[0].extension}")
    fault = _extensions_fault(tuple(component.extension for component in row))
    if fault is not None:
        return f"sample {name}: {fault}"
    for extension, offset, size, file in row:
        if file != f"{name}.{extension}":
            return f"sample {name}: expected {name}.{extension}, got {file}"
        if offset % TAR_BLOCK or not TAR_BLOCK <= offset <= offset + size <= tar_bytes:
            return (
                f"{file}: expected content at a multiple of {TAR_BLOCK} within the {tar_bytes} "
                f"bytes of the tar, got {size} bytes at {offset}"
            )
        if extension in INTEGERS and size != 8:
            return f"{file}: expected 8 bytes, got {size}"
    return None


@lru_cache(maxsize=1024)  # a dataset has few combinations and many samples
def _extensions_fault(extensions: tuple[str, ...]) -> str | None:
    got = f"got {', '.join(extensions)}"
    if sum(extension in FORMATS for extension in extensions) != 1:
        return f"expected one image ({' or '.join(FORMATS)}), {got}"
    missing = [name for name in INTEGERS if name not in extensions]
    if missing:
        return f"expected a component {missing[0]}, {got}"
    if (alternates.PICTURES in extensions) != (alternates.SIZES in extensions):
        return f"expected {alternates.PICTURES} and {alternates.SIZES} or neither, {got}"
    if len(set(extensions)) < len(extensions):
        return f"expected each component once, {got}"
    return None


def check_tar(path: Path, shard: ShardInfo, index: list[IndexRow], max_pixels: int) -> None:
    """Compare the index of a shard with the tar, and read the headers of its pictures.

    Reads the tar header of each component and the first bytes of each picture. Raises ValueError
    naming the first component that differs from the index, or is not the picture it should be.
    """
    file = path / shard.file
    tar = os.open(file, os.O_RDONLY)
    try:
        for row in index:
            for component in row:
                try:
                    _check_tar_header(tar, component)
                    _check_pictures(tar, component, row, max_pixels)
                except ValueError as error:
                    raise ValueError(f"{file}: {component.name}: {error}") from error
    finally:
        os.close(tar)


def _check_pictures(tar: int, component: Component, row: IndexRow, max_pixels: int) -> None:
    """Check the headers of the pictures in a component of a sample, if it holds any."""
    if component.extension in FORMATS:
        check_header(_reader(tar, component), component.extension, max_pixels)
    elif component.extension == alternates.PICTURES:
        extension = next(other.extension for other in row if other.extension in FORMATS)
        stored = next(other for other in row if other.extension == alternates.SIZES)
        sizes = os.pread(tar, stored.size, stored.offset)
        for start, size in alternates.places(sizes, component.size):
            one = component._replace(offset=component.offset + start, size=size)
            check_header(_reader(tar, one), extension, max_pixels)


def _check_tar_header(tar: int, component: Component) -> None:
    """Raise ValueError where the tar's header of a component differs from the index."""
    header = os.pread(tar, TAR_BLOCK, component.offset - TAR_BLOCK)
    name, kind = header[:100].rstrip(b"\0"), header[156:157]
    try:
        size = int(header[124:136].strip(b"\0 "), 8)
    except ValueError:
        raise ValueError(
            f"expected a file's header at {component.offset - TAR_BLOCK} of the tar, got none"
        ) from None
    expected = component.name.encode()
    # A name that a plain header cannot hold is in an extended header before it.
    is_named = name == expected or len(expected) > 100 or not expected.isascii()
    if not is_named or size != component.size or kind not in (b"0", b"\0"):
        raise ValueError(
            f"expected a file of {component.size} bytes at {component.offset} of the tar, got "
            f"{name.decode('utf-8', 'replace')!r} of {size} bytes and type {kind!r}"
        )


def _reader(tar: int, component: Component) -> Read:
    """Return a function that reads from a component.

    Its first bytes are read at once, since parsing a header takes many small reads.
    """
    first = os.pread(tar, min(component.size, FIRST_BYTES), component.offset)

    def read(offset: int, count: int) -> bytes:
        count = max(min(count, component.size - offset), 0)
        if offset + count <= len(first):
            return first[offset : offset + count]
        return os.pread(tar, count, component.offset + offset)

    return read


def members(
    path: Path, shard: ShardInfo, extensions: Collection[str]
) -> Iterator[dict[str, Member]]:
    """Yield {extension: member} of every sample of a shard in order; other extensions are skipped.

    Raises as `read_index`.
    """
    index = read_index(path, shard)
    with (path / shard.file).open("rb") as file:
        for row in index:
            sample = {}
            for component in row:
                if component.extension in extensions:
                    file.seek(component.offset)
                    sample[component.extension] = Member(component.name, file.read(component.size))
            yield sample
