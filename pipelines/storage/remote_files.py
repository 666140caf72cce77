"""A data set in object storage for who inspects it: a shard is read once, or samples alone."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path

from m3i_fast.durable_files import make_directories
from m3i_fast.pipelines.dataset.annotations.columns import ColumnsInfo
from m3i_fast.pipelines.dataset.files import DatasetFiles, LocalFiles
from m3i_fast.pipelines.dataset.manifest import (
    INDEXED,
    Manifest,
    SplitInfo,
    TableInfo,
    file_fault,
    index_command,
    read_manifest,
)
from m3i_fast.pipelines.dataset.sample_table import Rows, SampleTable
from m3i_fast.pipelines.storage.cache import is_left_over
from m3i_fast.pipelines.storage.dataset_copy import copy_manifest, copy_table
from m3i_fast.pipelines.storage.objects import PIECE, Bucket, ObjectInfo, url_of
from m3i_fast.pipelines.storage.requests import Stop, request_pool

PIECES_AHEAD = 4  # of PIECE bytes, read at the same time and held in memory
SAMPLES_AHEAD = 32
_INSPECTED = "inspected-"  # begin of the name of a folder with copies for one process
WINDOW = 1 << 17  # bytes read at once of an object that is read here and there


class RemoteFile:
    """An object that is read here and there: what follows a place is read with it."""

    def __init__(
        self, bucket: Bucket, name: str, info: ObjectInfo, *, window: int = WINDOW
    ) -> None:
        """window: bytes that are read at once."""
        self._bucket, self._name, self._info = bucket, name, info
        self._ahead = window
        self._start, self._window = 0, memoryview(b"")

    def pread(self, count: int, offset: int, /) -> bytes:
        """Read a range; raises as `Bucket.read_range`, also where the object has changed."""
        end = min(offset + count, self._info.size)
        if end <= offset:
            return b""
        if not self._start <= offset <= end <= self._start + len(self._window):
            ahead = min(max(end, offset + self._ahead), self._info.size)
            self._window = self._bucket.read_range(self._name, offset, ahead, expected=self._info)
            self._start = offset
        return bytes(self._window[offset - self._start : end - self._start])

    def close(self) -> None:
        """Forget what was read."""
        self._window = memoryview(b"")


class RemoteStream:
    """An object that is read from begin to end, piece by piece and ahead of its reader."""

    def __init__(self, bucket: Bucket, name: str, info: ObjectInfo) -> None:
        self._bucket, self._name, self._info = bucket, name, info
        self._stop = Stop()
        self._pool = ThreadPoolExecutor(PIECES_AHEAD, "object-reader")
        self._pieces: dict[int, Future[memoryview]] = {}

    def pread(self, count: int, offset: int, /) -> bytes:
        """Read a range; what lies before its piece is forgotten. Raises as `RemoteFile.pread`."""
        end = min(offset + count, self._info.size)
        for number in [n for n in self._pieces if n < offset // PIECE]:
            del self._pieces[number]
        parts = []
        while offset < end:
            number, start = divmod(offset, PIECE)
            part = self._piece(number)[start : start + end - offset]
            parts.append(part)
            offset += len(part)
        return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)

    def _piece(self, number: int) -> memoryview:
        last = -(-self._info.size // PIECE)
        for ahead in range(number, min(number + PIECES_AHEAD, last)):
            if ahead not in self._pieces:
                self._pieces[ahead] = self._pool.submit(self._read, ahead)
        return self._pieces[number].result()

    def _read(self, number: int) -> memoryview:
        begin = number * PIECE
        end = min(begin + PIECE, self._info.size)
        return self._bucket.read_range(self._name, begin, end, expected=self._info, stop=self._stop)

    def close(self) -> None:
        """Stop reading ahead."""
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pieces.clear()


class RemoteFiles:
    """A data set whose shards lie under a URL.

    bucket: of the shards. folder: of the manifest, and of tables or their copies. described_by: the
    bucket of manifest and tables; None: `folder` is theirs. Sizes and ETags of all objects are
    remembered at first, and compared at each read.
    """

    def __init__(
        self, bucket: Bucket, folder: Path, manifest: Manifest, described_by: Bucket | None
    ) -> None:
        self.manifest, self.folder = manifest, folder
        self.place = described_by.url if described_by else str(folder)
        self._bucket, self._described_by = bucket, described_by

    @property
    def restore(self) -> str:
        """Return what to do where objects are missing or damaged."""
        if INDEXED in self.manifest.settings:
            command = index_command(self.folder, self.manifest, self._bucket.url)
            return f"copy them again from where they came, or index them as they are now: {command}"
        return f"upload the data again (m3i-fast data push DIR {self._bucket.url})"

    def name(self, shard_file: str) -> str:
        """Return the URL of a shard."""
        return f"{self._bucket.url}/{shard_file}"

    @cached_property
    def _infos(self) -> dict[str, ObjectInfo]:
        files = [s.file for split in self.manifest.splits.values() for s in split.shards]
        return self._bucket.found(files)

    def faults(self, split: SplitInfo) -> Iterator[tuple[str, OSError | ValueError]]:
        """Yield what is wrong with the table or its copy, and with sizes of shards."""
        for table in split.tables:
            if (error := self._table_fault(table)) is not None:
                yield table.file, error
        for shard in split.shards:
            info, name = self._infos.get(shard.file), self.name(shard.file)
            if info is None:
                said = f"{name}: expected a shard, got none; {self.restore}"
                yield shard.file, FileNotFoundError(said)
            elif info.size != shard.num_bytes:
                expected = f"expected {shard.num_bytes} bytes, got {info.size}"
                yield shard.file, ValueError(f"{name}: {expected}; {self.restore}")

    def _table_fault(self, table: TableInfo | ColumnsInfo) -> OSError | ValueError | None:
        """Return what is wrong with a table, which is copied where it lies in a bucket."""
        file = self.folder / table.file
        if self._described_by is None:
            return file_fault(file, table.num_bytes, self.restore)
        try:
            copy_table(self._described_by, file, table)
        except (FileNotFoundError, ValueError) as error:
            return error
        return None

    def open(self, shard_file: str, *, is_whole: bool) -> RemoteFile | RemoteStream:
        """Open a shard."""
        kind = RemoteStream if is_whole else RemoteFile
        return kind(self._bucket, shard_file, self._infos[shard_file])

    def samples(self, table: SampleTable, rows: Rows) -> Iterator[bytes]:
        """Yield the bytes of samples, each read by one request."""

        def read(file: str, offset: int, size: int, stop: Stop) -> bytes:
            info = self._infos[file]
            end = min(offset + size, info.size)
            return bytes(self._bucket.read_range(file, offset, end, expected=info, stop=stop))

        waiting: deque[Future[bytes]] = deque()
        with request_pool(SAMPLES_AHEAD, "sample-reader") as (pool, stop):
            for row in rows:
                place = (int(row["offset"]), int(row["size"]))
                waiting.append(pool.submit(read, table.shard_files[row["shard"]], *place, stop))
                if len(waiting) > SAMPLES_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()


@contextmanager
def opened_files(path: Path, cache_dir: Path, *, anew: bool = False) -> Iterator[DatasetFiles]:
    """Yield the files of a data set in a folder or under a URL, or of an index of tars there.

    cache_dir: for copies of manifest and tables. anew: these are read again, and not kept. Raises
    as `read_manifest` and `Bucket`.
    """
    url = url_of(path)
    if url is None:
        manifest = read_manifest(path)
        if manifest.shards_url is None:
            yield LocalFiles(path)
        else:
            yield RemoteFiles(Bucket(manifest.shards_url), path, manifest, None)
        return
    bucket, cache_dir = Bucket(url), cache_dir.expanduser()
    if not anew:
        yield RemoteFiles(bucket, *copy_manifest(bucket, cache_dir), bucket)
        return
    with _own_folder(cache_dir) as folder:
        yield RemoteFiles(bucket, *copy_manifest(bucket, folder), bucket)


@contextmanager
def _own_folder(cache_dir: Path) -> Iterator[Path]:
    """Yield a folder that goes at the end, and remove those of processes that were killed."""
    make_directories(cache_dir)
    with ExitStack() as at_end:
        alone = os.open(cache_dir, os.O_RDONLY)
        try:
            fcntl.flock(alone, fcntl.LOCK_EX)  # so that none is half made while one is looked for
            for other in cache_dir.glob(f"{_INSPECTED}*"):
                if is_left_over(other):
                    shutil.rmtree(other, ignore_errors=True)
            made = tempfile.TemporaryDirectory(prefix=_INSPECTED, dir=cache_dir)
            folder = Path(at_end.enter_context(made))
            lock = at_end.enter_context((folder / "lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        finally:
            os.close(alone)
        yield folder
