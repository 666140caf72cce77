"""The files in a tar or in a range of one, read by tarfile and checked to lie within it."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

# A key goes up to the first dot of the name's last part, as in webdataset.
NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)


class Part(NamedTuple):
    """A file of a sample."""

    extension: str  # in lower case
    offset: int  # of its content, in the tar or range
    size: int


OF_ONE_FILE = {"path", "linkpath", "size", "hdrcharset"}  # what an extended header says of it
MOST_HEADER_BYTES = 1 << 24  # of one that holds a long name or other extended fields


class Readable(Protocol):
    def read(self, count: int = -1, /) -> bytes: ...
    def seek(self, offset: int, whence: int = 0, /) -> int: ...
    def tell(self) -> int: ...


class Range:
    """A range of an open file, of which headers are read and nothing else.

    pread: reads (count, offset) of the file.
    """

    def __init__(self, pread: Callable[[int, int], bytes], start: int, size: int) -> None:
        self._pread, self._start, self._size = pread, start, size
        self._place = 0

    def read(self, count: int = -1, /) -> bytes:
        """Read up to `count` bytes, -1: all that are left.

        Raises ValueError for many: the size in a corrupt header is not allocated.
        """
        left = max(self._size - self._place, 0)
        count = left if count < 0 else min(count, left)
        if count > MOST_HEADER_BYTES:
            raise ValueError(f"expected a header of at most {MOST_HEADER_BYTES} bytes, got {count}")
        found = self._pread(count, self._start + self._place)
        self._place += len(found)
        return found

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move to a byte of the range."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(base + offset, 0)
        return self._place

    def tell(self) -> int:
        """Return the place in the range."""
        return self._place


class Stream:
    """A decompressed file, of which no more than a header is read at once.

    expect: called with the bytes that were decompressed.
    """

    def __init__(self, opened: Readable, expect: Callable[[int], None]) -> None:
        self._opened, self._expect = opened, expect
        self.seek, self.tell = opened.seek, opened.tell

    def read(self, count: int = -1, /) -> bytes:
        """Read up to `count` bytes; raises ValueError for many, as `Range.read`."""
        if not 0 <= count <= MOST_HEADER_BYTES:
            raise ValueError(f"expected a header of at most {MOST_HEADER_BYTES} bytes, got {count}")
        self._expect(self._opened.tell())
        return self._opened.read(count)


def tar_members(opened: Readable, num_bytes: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Yield (member, end of its padding) of a tar of `num_bytes`, or of a range of members.

    Raises ValueError where it is cut off or damaged. What follows the last member is not looked at:
    tarfile takes any header that it does not understand for the end.
    """
    end = 0
    try:
        tar = tarfile.open(fileobj=opened, mode="r:", errors="surrogateescape")  # type: ignore[call-overload]
    except Exception as error:  # tarfile raises several types on corrupt headers
        raise ValueError(f"expected an uncompressed tar, got other bytes: {error}") from error
    with tar:
        while True:
            try:
                member = tar.next()
            except Exception as error:
                raise ValueError(f"damaged or cut off at byte {end}: {error}") from error
            if member is None:
                return
            # A corrupt header may be one of a file of any size, also below 0.
            is_whole = end <= member.offset < member.offset_data <= tar.offset <= num_bytes
            if not is_whole or member.size < 0 or member.issparse():
                raise ValueError(
                    f"damaged or cut off at byte {end}: expected a file that ends within "
                    f"{num_bytes} bytes, got {member.size} bytes at {member.offset_data}"
                )
            if told := OF_ONE_FILE & tar.pax_headers.keys():
                raise ValueError(
                    f"damaged at byte {member.offset}: expected a {min(told)!r} of one file, got "
                    "one of all that follow (a global header), which their own bytes do not tell"
                )
            end = tar.offset
            tar.members.clear()  # it keeps all of them
            yield member, end


def whole_tar_members(opened: Readable, num_bytes: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Yield (member, end) as `tar_members`; raises ValueError also for a wrong end of the tar.

    What follows the last member has to be zeros, at least a block of them: after other bytes, as
    of a second tar, there may be samples that nothing would tell of.
    """
    end = 0
    for member, end in tar_members(opened, num_bytes):
        yield member, end
    opened.seek(end)
    block = opened.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise ValueError(f"cut off at byte {end}: expected the end mark of a tar, got none")
    while block:
        if block.strip(b"\0"):
            raise ValueError(f"damaged at byte {end}: expected a header or the end of the tar")
        block = opened.read(1 << 20)


def sample_parts(opened: Readable, num_bytes: int) -> tuple[str, list[Part]]:
    """Find the files of the one sample that fills a range: (its key, them in order).

    Raises ValueError where the range holds no or other files, or not whole ones.
    """
    key, parts, last = None, list[Part](), 0
    for member, end in tar_members(opened, num_bytes):
        match = NAME.fullmatch(member.name)
        if match is None or not member.isreg() or key not in (None, match[1]):
            raise ValueError(f"expected the files of one sample, got {member.name!r} among them")
        key = match[1]
        extension = match[2].lower()
        if extension in [part.extension for part in parts]:
            raise ValueError(f"{key}: expected each file once, got two of {extension}")
        parts.append(Part(extension, member.offset_data, member.size))
        last = end
    if key is None or last != num_bytes:
        raise ValueError(f"expected the files of a sample in {num_bytes} bytes, got {last} of them")
    return key, parts


def sample_files(content: bytes) -> tuple[str, dict[str, bytes]]:
    """Return (key, content by extension) of the sample of these bytes; raises as `sample_parts`."""
    key, parts = sample_parts(io.BytesIO(content), len(content))
    return key, {extension: content[at : at + size] for extension, at, size in parts}
