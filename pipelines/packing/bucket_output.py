"""A bucket that a data set is packed into: each shard is uploaded when it is done.

State lies in the bucket too, so that any machine goes on with a pack. On this one there are, in a
folder of the cache that the URL names, the shard that each process writes, at the end the tables,
and what has to be spooled of the source.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from m3i_fast.durable_files import make_directories
from m3i_fast.pipelines.dataset.manifest import (
    MANIFEST_NAME,
    Manifest,
    is_dataset,
    read_manifest,
)
from m3i_fast.pipelines.packing.output import LOCK, SPOOLED, STATE, NewFile, alone
from m3i_fast.pipelines.storage.objects import Bucket, folder_of
from m3i_fast.pipelines.storage.requests import Stop
from m3i_fast.pipelines.storage.upload import UPLOAD_POLICY, File, send, send_folder

logger = logging.getLogger(__name__)


@lru_cache(maxsize=4)
def _bucket(url: str) -> Bucket:
    return Bucket(url, UPLOAD_POLICY)


@dataclass(frozen=True, slots=True)
class BucketOutput:
    """A data set under a URL, and the local folder of what is on its way there."""

    url: str
    folder: Path

    @classmethod
    def at(cls, url: str, cache_dir: Path) -> BucketOutput:
        """Return the output of a URL; ValueError for a web server, which lists no objects."""
        if url.startswith("http"):
            raise ValueError(
                f"DIR: expected a folder, s3:// or gs://, got {url}: a web server lists no "
                "objects, by which a killed pack goes on; pack into a folder, and upload that "
                f"with: m3i-fast data push DIR {url}"
            )
        return cls(url, folder_of(url, cache_dir, "packing"))

    @property
    def place(self) -> str:
        """Return the URL."""
        return self.url

    @property
    def spool(self) -> Path:
        """Return the local folder."""
        return self.folder

    @property
    def is_shared(self) -> bool:
        """Return True: all machines reach the bucket."""
        return True

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold a lock of this machine.

        On two machines the same pack writes the same bytes twice, and another one is refused by the
        settings that the first has created.
        """
        with alone(self.folder, self.url, "packed"):
            self._remove_unfinished()
            yield

    def _remove_unfinished(self) -> None:
        for file in self.folder.iterdir():
            if file.is_dir():
                shutil.rmtree(file)
            elif file.name not in (LOCK, *SPOOLED):
                file.unlink(missing_ok=True)

    def check_free(self, source: Path) -> None:
        """Refuse other objects below the URL."""
        there = self.sizes()
        if there and self.manifest() is None:
            if not any(name.startswith(f"{STATE}/") for name in there):
                raise ValueError(
                    f"DIR: expected no objects, or a data set or a pack begun, got "
                    f"{', '.join(sorted(there)[:3])} below {self.url}: name another URL"
                )

    def manifest(self) -> Manifest | None:
        """Read the manifest, by way of a local file."""
        content = self.read(MANIFEST_NAME)
        if content is None:
            return None
        with tempfile.TemporaryDirectory() as name:
            Path(name, MANIFEST_NAME).write_bytes(content)
            if not is_dataset(Path(name)):
                return None
            try:
                return read_manifest(Path(name))
            except ValueError as error:
                raise ValueError(f"{self.url}/{MANIFEST_NAME}: {error}") from error

    def sizes(self) -> dict[str, int]:
        """List the objects, a thousand a request."""
        return {name: info.size for name, info in _bucket(self.url).list().items()}

    @contextlib.contextmanager
    def written(self, name: str) -> Iterator[NewFile]:
        """Yield a local file, which is uploaded and removed.

        An object with the same digest is kept: a start that was killed had sent it, and not yet
        noted that.
        """
        make_directories(self.folder)
        new = NewFile(self.folder / f"{name}.{secrets.token_hex(4)}")
        try:
            yield new
            file = File(name, new.path, new.path.stat().st_size, new.sha256)
            send(_bucket(self.url), file, may_be_there=True)
        finally:
            new.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def described(self) -> Iterator[Path]:
        """Yield a local folder, whose files are uploaded, the manifest last."""
        folder = self.folder / "described"
        make_directories(folder)
        yield folder
        send_folder(_bucket(self.url), folder)

    def write(self, name: str, content: bytes) -> None:
        """Write an object."""
        _bucket(self.url).put(name, content, sha256=hashlib.sha256(content).hexdigest())

    def create(self, name: str, content: bytes) -> None:
        """Write an object, unless a pack of another machine has."""
        if not _bucket(self.url).create(name, content) and self.read(name) != content:
            raise ValueError(
                f"DIR: {self.url}: another pack was begun there at the same time: start again to "
                "see what differs, or name another URL"
            )

    def read(self, name: str, stop: Stop | None = None) -> bytes | None:
        """Read an object."""
        try:
            return _bucket(self.url).read(name, stop=stop)
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        """Remove an object."""
        _bucket(self.url).remove([name])

    def tidy(self, *, is_whole: bool) -> None:
        """Remove the state of a pack that is whole; of another one what can be made again here."""
        if is_whole:
            try:
                _bucket(self.url).remove([n for n in self.sizes() if n.startswith(f"{STATE}/")])
            except PermissionError as error:  # the data set is whole all the same
                logger.warning(
                    "%s/%s/ is left, which nothing reads any more: %s", self.url, STATE, error
                )
        self._remove_unfinished()
        if is_whole or not any((self.folder / name).exists() for name in SPOOLED):
            shutil.rmtree(self.folder)
