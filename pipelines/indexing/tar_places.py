"""Where tars lie that are to be indexed: in a folder, or in a bucket, of which each is copied."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from m3i_fast.pipelines.dataset.files import LocalFile, OpenFile
from m3i_fast.pipelines.packing.items import printable
from m3i_fast.pipelines.packing.readers.tars import COMPRESSED
from m3i_fast.pipelines.storage.dataset_copy import copy_object
from m3i_fast.pipelines.storage.objects import PIECE, Bucket, ObjectInfo
from m3i_fast.pipelines.storage.remote_files import RemoteFile

MOST_NAMED = 5  # compressed tars in a text
COPY = ".tar.copied"  # what the name of a copy ends with


class Tar(Protocol):
    """One tar, of which each process has a copy of this object."""

    @property
    def name(self) -> str:
        """Name in its folder or below its URL."""

    @property
    def place(self) -> str:
        """Path or URL, as errors name it."""

    def stamp(self) -> tuple[object, ...]:
        """Return what tells that its bytes are others, without reading them."""

    def local(self, folder: Path) -> AbstractContextManager[Path]:
        """Yield it as a file of this machine; a copy lies in `folder`, and is removed."""


class Tars(Protocol):
    """Some tars of one folder or URL."""

    def tar(self, name: str) -> Tar:
        """Return a tar by its name."""

    def num_bytes(self, name: str) -> int:
        """Return the size of a tar."""

    def open(self, name: str) -> OpenFile:
        """Open a tar, of which the beginning is read."""

    def shards_in(self, out: Path) -> str | None:
        """Return what the manifest in `out` says of where they lie; None: beside it."""


@dataclass(frozen=True, slots=True)
class LocalTar:
    """A tar in a folder."""

    root: Path
    name: str

    @property
    def place(self) -> str:
        """Return the path."""
        return str(self.root / self.name)

    def stamp(self) -> tuple[object, ...]:
        """Return size and time of the last change."""
        status = (self.root / self.name).stat()
        return status.st_size, status.st_mtime_ns

    def local(self, folder: Path) -> AbstractContextManager[Path]:
        """Yield the file itself."""
        return nullcontext(self.root / self.name)


@dataclass(frozen=True, slots=True)
class TarFolder:
    """The tars of a folder."""

    root: Path

    def tar(self, name: str) -> LocalTar:
        """Return a tar by its name."""
        return LocalTar(self.root, name)

    def num_bytes(self, name: str) -> int:
        """Return the size of a tar."""
        return (self.root / name).stat().st_size

    def open(self, name: str) -> LocalFile:
        """Open a tar."""
        return LocalFile(self.root / name)

    def shards_in(self, out: Path) -> str | None:
        """Return the folder, unless it is `out`."""
        root = self.root.resolve()
        return None if out.resolve() == root else str(root)


@dataclass(frozen=True, slots=True)
class RemoteTar:
    """A tar in a bucket, which is copied while it is indexed."""

    url: str
    name: str
    info: ObjectInfo

    @property
    def place(self) -> str:
        """Return the URL."""
        return f"{self.url}/{self.name}"

    def stamp(self) -> tuple[object, ...]:
        """Return size and ETag."""
        return self.info.size, self.info.etag

    @contextmanager
    def local(self, folder: Path) -> Iterator[Path]:
        """Yield a copy.

        Raises as `Bucket.read_range`, also where the object has changed since it was listed.
        """
        file = folder / f".{secrets.token_hex(8)}{COPY}"
        try:
            copy_object(Bucket(self.url), self.name, self.info, file)
            yield file
        finally:
            file.unlink(missing_ok=True)


class BucketTars:
    """The tars below a URL that fit a pattern; is_beside: the index will lie with them.

    Raises as `Bucket`, and ValueError where nothing fits, or for a web server.
    """

    def __init__(self, url: str, patterns: Sequence[str], *, is_beside: bool) -> None:
        if url.startswith("http"):
            raise ValueError(
                f"DIR: expected a folder, s3:// or gs://, got {url}: a web server lists no objects"
            )
        self.url, self.is_beside = url, is_beside
        self._bucket = Bucket(url)
        there = self._bucket.list()
        self._infos = {
            name: there[name] for name in _matching(there, map(_expression, patterns), (".tar",))
        }
        wanted = [_expression(each) for pattern in patterns for each in with_compressed(pattern)]
        self.compressed = _matching(there, wanted, COMPRESSED)
        if not self._infos:
            got = told_compressed(self.compressed) or "none"
            raise ValueError(f"{url}: expected tars ({', '.join(patterns)}), got {got}")

    @property
    def names(self) -> list[str]:
        """Names of the tars, sorted."""
        return list(self._infos)

    def tar(self, name: str) -> RemoteTar:
        """Return a tar by its name."""
        return RemoteTar(self.url, name, self._infos[name])

    def num_bytes(self, name: str) -> int:
        """Return the size of a tar."""
        return self._infos[name].size

    def open(self, name: str) -> RemoteFile:
        """Open a tar, of which the first samples are read by one request."""
        return RemoteFile(self._bucket, name, self._infos[name], window=PIECE)

    def shards_in(self, out: Path) -> str | None:
        """Return the URL, unless the index is written beside the tars."""
        return None if self.is_beside else self.url


def with_compressed(pattern: str) -> list[str]:
    """Return the patterns of the compressed tars beside the tars of a pattern."""
    if not pattern.endswith(".tar"):
        return [pattern]
    return [pattern.removesuffix(".tar") + ending for ending in COMPRESSED]


def told_compressed(names: Sequence[str]) -> str:
    """Say how many compressed tars are not indexed, and what reads them; none: an empty text."""
    if not names:
        return ""
    named = ", ".join(map(printable, names[:MOST_NAMED]))
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return (
        f"{len(names)} compressed ({named}{more}), in which no sample can be read by itself: "
        "m3i-fast data pack reads those of a folder"
    )


def _matching(
    names: Iterable[str], wanted: Iterable[re.Pattern[str]], endings: tuple[str, ...]
) -> list[str]:
    """Return the names that fit an expression and have one of the endings, sorted."""
    expressions = list(wanted)
    return [
        name
        for name in sorted(names)
        if name.endswith(endings)
        and not any(part.startswith(".") for part in name.split("/"))
        and any(expression.fullmatch(name) for expression in expressions)
    ]


def _expression(pattern: str) -> re.Pattern[str]:
    """Return what matches the names that a pattern of `Path.glob` does."""
    if pattern.startswith("/") or ".." in pattern.split("/") or "://" in pattern:
        raise ValueError(f"--tars: expected a pattern below the URL, got {pattern!r}")
    parts = re.split(r"(\*\*/|\*|\?|\[[^]]+\])", pattern)
    return re.compile("".join(_WILD.get(part) or _plain(part) for part in parts))


_WILD = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}


def _plain(part: str) -> str:
    """Return the expression of a set of characters, or of what stands for itself."""
    if part.startswith("[") and part.endswith("]") and len(part) > 2:
        return part.replace("\\", r"\\").replace("[!", "[^", 1)
    return re.escape(part)
