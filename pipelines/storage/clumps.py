"""Shards in object storage: clumps of coming samples are fetched into local files by a pool."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from m3i_fast.pipelines.dataset.sample_table import BAD, NO_CRC, Rows, SampleTable, checksum
from m3i_fast.pipelines.sample_order.lanes import CLUMP_SAMPLES, Clumps
from m3i_fast.pipelines.storage.cache import CacheFull, SharedCache
from m3i_fast.pipelines.storage.objects import PIECE, Bucket, ObjectInfo
from m3i_fast.pipelines.storage.read_pool import ReadPool
from m3i_fast.pipelines.storage.requests import Stop
from m3i_fast.pipelines.storage.shards import BucketReads

logger = logging.getLogger(__name__)

TOLD_WAIT_S = 1.0
"""Waits for a fetch that are longer are logged."""
_CLOSE_S = 1.0  # a write to the disk that takes longer ends by itself
_WAIT_FOR_ROOM_S = 30.0  # while batches that are being read give their clumps back
_GIB = 2**30


@dataclass
class FetchCounts:
    """Count what a reader has read from object storage, and what was waited for it."""

    fetches: int = 0
    fetched_bytes: int = 0
    fetch_s: float = 0.0  # of all reads, which overlap
    cache_hits: int = 0  # clumps that lay in the cache already
    cached_bytes: int = 0  # of these
    waits: int = 0
    wait_s: float = 0.0


@dataclass(slots=True)
class _Clump:
    """A clump in use: its file once that is there, and where it begins in its shard."""

    file: Future[tuple[str, int]]
    expected: int = 0  # samples that are announced and not yet located
    used_at: int = 0  # number of the batch that used it last


class BucketShards:
    """Finds samples in local copies of their clumps; `expect` has these fetched beforehand.

    bucket: where the shards lie, as the manifest names them. shard_sizes: samples of each of them,
    in the order of the table. cache: of the node. identity: tells this data set from others in the
    cache. pool: threads that may be those of other data sets as well. kept_batches: a clump is
    given back that so many later batches did not use: those that a backend still reads, and one
    round of the lanes.

    Threads start with the first samples, and after `close` again. At most `PIECE` bytes of each
    read are in memory. Sizes and ETags of all shards are remembered when it is made, and compared
    at each read. Raises as `Bucket` does, ValueError where a shard has another size than the
    manifest says.
    """

    def __init__(
        self,
        bucket: Bucket,
        table: SampleTable,
        shard_sizes: list[int],
        shard_bytes: list[int],
        cache: SharedCache,
        *,
        identity: str,
        pool: ReadPool,
        kept_batches: int = 128,
    ) -> None:
        self.counts = FetchCounts()
        self._bucket, self._table, self._cache = bucket, table, cache
        self._around = Clumps(shard_sizes)
        self._kept_batches = kept_batches
        self._key = hashlib.sha256(f"{bucket.url} {identity}".encode()).hexdigest()[:12]
        self._infos = self._checked_infos(shard_bytes)
        self._pool = pool
        self._is_started = False
        self._stop = Stop()  # of what was begun since the last start
        self._lock = threading.Lock()  # of the counts
        self._clumps: OrderedDict[int, _Clump] = OrderedDict()  # by first sample; used last: last
        self._batch = 0

    def _checked_infos(self, shard_bytes: list[int]) -> dict[str, ObjectInfo]:
        files = list(self._table.shard_files)
        infos = self._bucket.infos(files)
        for file, num_bytes in zip(files, shard_bytes, strict=True):
            if infos[file].size != num_bytes:
                raise ValueError(
                    f"{self._bucket.url}/{file}: expected {num_bytes} bytes (manifest), got "
                    f"{infos[file].size}; upload the data again (m3i-fast data push)"
                )
        return infos

    def expect(self, samples: NDArray[np.int64]) -> None:
        """Announce samples that will be located, in the order of their turn: [N] rows."""
        shards, firsts, ends = self._around.around(samples)
        _, index, counts = np.unique(firsts, return_index=True, return_counts=True)
        by_turn = np.argsort(index)
        for i, count in zip(index[by_turn].tolist(), counts[by_turn].tolist(), strict=True):
            clump = self._clump(int(shards[i]), int(firsts[i]), int(ends[i]), in_pool=True)
            clump.expected += count

    def expect_no_more(self) -> None:
        """Forget what was announced, since a run goes on elsewhere."""
        for first, clump in list(self._clumps.items()):
            clump.expected = 0
            if clump.file.cancel():
                del self._clumps[first]

    def locate(self, table: SampleTable, samples: NDArray[np.int64]) -> list[tuple[str, int]]:
        """Return (path of a local file, offset in it) of each sample of a batch.

        Waits for what is not fetched yet; a sample that nobody expected is fetched now. The files
        stay for `kept_batches` further calls. samples: [B] rows of the table. Raises as `Bucket`
        does, and CacheFull where the cache has no room.
        """
        shards, firsts, ends = self._around.around(samples)
        found: dict[int, tuple[str, int]] = {}
        self._batch += 1
        distinct, index, counts = np.unique(firsts, return_index=True, return_counts=True)
        for first, i, count in zip(distinct.tolist(), index.tolist(), counts.tolist(), strict=True):
            clump = self._clump(int(shards[i]), first, int(ends[i]), in_pool=False)
            found[first] = self._wait(clump, first)
            clump.expected = max(clump.expected - count, 0)
            clump.used_at = self._batch
            self._clumps.move_to_end(first)
        self._give_back()
        offsets = np.asarray(table.rows)["offset"][samples].tolist()
        return [
            (found[first][0], offset - found[first][1])
            for first, offset in zip(firsts.tolist(), offsets, strict=True)
        ]

    def reads(self) -> BucketReads:
        """Return what was read so far, as `Shards` does."""
        with self._lock:
            return BucketReads(
                read_bytes=self.counts.fetched_bytes,
                requests=self._bucket.counts.ranges,
                retries=self._bucket.counts.retries,
                cache_hits=self.counts.cache_hits,
                cache_bytes=self.counts.cached_bytes,
                wait_s=self.counts.wait_s,
            )

    def close(self) -> None:
        """Stop fetching, and give all clumps back to the cache; the next samples start it again."""
        self._stop.set()
        try:
            self._await_fetches()
        finally:  # Ctrl-C ends that wait, and no clump is to be left without a file
            self._clumps.clear()
            self._cache.close()

    def _await_fetches(self) -> None:
        """Wait, not for long, for the fetches that were given up, and log what was read."""
        if self._is_started:
            self._is_started = False
            files = [clump.file for clump in self._clumps.values()]
            self._pool.stop()
            wait([file for file in files if not file.cancelled()], timeout=_CLOSE_S)
            counts = self.counts
            logger.info(
                "%s: %d reads of %.1f MB in %.1f s, %d more clumps were in the cache; %d waits for "
                "samples took %.1f s",
                self._bucket.url,
                counts.fetches,
                counts.fetched_bytes / 1e6,
                counts.fetch_s,
                counts.cache_hits,
                counts.waits,
                counts.wait_s,
            )

    def _start(self) -> None:
        """Begin to use the cache, after a start or `close`."""
        if not self._is_started:
            self._is_started = True
            self._cache.open()
            self._stop = Stop()

    def _clump(self, shard: int, first: int, end: int, *, in_pool: bool) -> _Clump:
        """Return the clump of a first sample; a new one is fetched."""
        self._start()
        clump = self._clumps.get(first)
        expected = clump.expected if clump is not None else 0
        if clump is not None and clump.file.done() and clump.file.exception() is not None:
            clump = None  # nobody needed it until now: it is tried again
        if clump is None:
            if in_pool:
                file = self._pool.submit(self._fetch, shard, first, end, self._stop)
            else:
                begin, file = time.monotonic(), Future()
                file.set_result(self._fetch(shard, first, end, self._stop))
                self._count_wait(time.monotonic() - begin)
            clump = _Clump(file=file, expected=expected, used_at=self._batch)
            self._clumps[first] = clump
        return clump

    def _wait(self, clump: _Clump, first: int) -> tuple[str, int]:
        """Return the file of a clump; a long wait for it is logged."""
        if clump.file.done():
            return self._result(clump, first)
        begin = time.monotonic()
        while True:
            try:
                clump.file.result(timeout=30.0)
            except NotYet:
                if not clump.file.done():
                    logger.warning(
                        "waiting for samples from %s for %.0f s", self._bucket.url,
                        time.monotonic() - begin,
                    )  # fmt: skip
                    continue
            except Exception:
                logger.debug("a fetch failed, and its error follows")
            break
        self._count_wait(time.monotonic() - begin)
        return self._result(clump, first)

    def _count_wait(self, waited: float) -> None:
        """Count a wait of so many seconds; a long one is logged."""
        self.counts.waits += 1
        self.counts.wait_s += waited
        if waited > TOLD_WAIT_S:
            logger.info(
                "waited %.1f s for samples from %s; --data.fetch-ahead and --data.reads-in-flight "
                "fetch more beforehand",
                waited,
                self._bucket.url,
            )

    def _result(self, clump: _Clump, first: int) -> tuple[str, int]:
        try:
            return clump.file.result()
        except Exception:
            self._clumps.pop(first, None)
            self.expect_no_more()  # a run that ends here is not to wait for the rest
            raise

    def _fetch(self, shard: int, first: int, end: int, stop: Stop) -> tuple[str, int]:
        """Have the bytes of a clump in a local file; return its path and where it begins."""
        rows = np.asarray(self._table.rows)[first:end]
        begin = int(rows["offset"].min())
        num_bytes = int((rows["offset"] + rows["size"]).max()) - begin
        file = self._table.shard_files[shard]
        name = f"{self._key}-{shard:x}-{first:x}"
        path = self._cache.take(name, num_bytes)
        if path is not None and not _is_whole(path, rows, begin):
            logger.warning(
                "%s: the copy of samples %d to %d of %s/%s is damaged and is fetched again; check "
                "the disk",
                *(self._cache.folder, first, end - 1, self._bucket.url, file),
            )
            self._cache.drop(name)
            path = None
        if path is not None:
            with self._lock:
                self.counts.cache_hits += 1
                self.counts.cached_bytes += num_bytes
            return str(path), begin

        def read() -> Iterator[memoryview]:
            for at in range(begin, begin + num_bytes, PIECE):
                started = time.monotonic()
                piece = self._bucket.read_range(
                    file,
                    at,
                    min(at + PIECE, begin + num_bytes),
                    expected=self._infos[file],
                    stop=stop,
                )
                with self._lock:
                    self.counts.fetched_bytes += len(piece)
                    self.counts.fetch_s += time.monotonic() - started
                yield piece
            with self._lock:
                self.counts.fetches += 1

        waited_from = time.monotonic()
        while True:
            try:
                return str(self._cache.write(name, num_bytes, read())), begin
            except CacheFull as error:
                # Room comes as batches are read; where none does, more is in use than fits.
                if stop.is_set() or time.monotonic() - waited_from > _WAIT_FOR_ROOM_S:
                    raise CacheFull(
                        f"{error}; raise data.cache_gib, or lower data.lanes"
                    ) from error
            stop.wait(0.05)

    def _give_back(self) -> None:
        """Release the clumps that no batch needs any more."""
        while self._clumps:
            first, clump = next(iter(self._clumps.items()))
            if clump.used_at + self._kept_batches >= self._batch:
                break
            if clump.expected or not clump.file.done():
                clump.used_at = self._batch
                self._clumps.move_to_end(first)
                continue
            del self._clumps[first]
            if clump.file.exception() is None:
                self._cache.release(Path(clump.file.result()[0]).name)


def _is_whole(path: Path, rows: Rows, begin: int) -> bool:
    """Return whether a file, which has its shard's bytes from `begin` on, has these rows' CRC."""
    with path.open("rb") as file:
        for row in rows[(rows["flags"] & (BAD | NO_CRC)) == 0]:
            content = os.pread(file.fileno(), int(row["size"]), int(row["offset"]) - begin)
            if checksum(content) != row["crc32c"]:
                return False
    return True


def needed_bytes(
    shard_sizes: list[int],
    shard_bytes: list[int],
    *,
    density: NDArray[np.float64],  # [L]
    window: int,
    num_ranks: int,
    passing: int,
    windows_a_lane: int = 1,
) -> NDArray[np.int64]:  # [num_ranks]
    """Return the bytes of clumps that each rank holds: its lanes' windows, and those that pass by.

    density: which part of each lane's groups is of this data set; the number of ranks divides that
    of the lanes. passing: samples of a rank, of all data sets that are mixed, whose clumps are
    fetched ahead or not given back yet. windows_a_lane: 2 for the end of an epoch, where all lanes
    go on to another window at once.
    """
    means = [size / count for count, size in zip(shard_sizes, shard_bytes, strict=True)]
    clump = max(
        min(count, CLUMP_SAMPLES) * mean for count, mean in zip(shard_sizes, means, strict=True)
    )
    num_clumps = sum(-(-n // CLUMP_SAMPLES) for n in shard_sizes)
    of_rank = density.reshape(-1, num_ranks)  # lane l is of rank l mod R
    held = (of_rank > 0).sum(0) * window * windows_a_lane
    held = held + np.ceil(passing * of_rank.mean(0) * num_clumps / sum(shard_sizes))
    clumps = np.minimum(held, num_clumps)
    return np.rint(clumps * clump).astype(np.int64)


def check_buffer(
    needed: int, *, at_epoch_end: int, buffer_gib: float, cache_gib: float, ranks_a_node: int
) -> None:
    """Raise ValueError, with what to set, where the clumps of the ranks have no room.

    needed, at_epoch_end: bytes of a rank, at an even pace and where all lanes change clumps.
    """
    gib = math.ceil(100 * needed / _GIB) / 100  # so that the number in an error is enough
    if needed > buffer_gib * _GIB:
        raise ValueError(
            f"data.buffer_gib: expected at least {gib:.2f}, the clumps that a rank holds open, got "
            f"{buffer_gib:g}; raise it, or lower data.lanes (another order of the samples), "
            "data.clumps_a_window or data.fetch_ahead"
        )
    node_gib = math.ceil(100 * ranks_a_node * at_epoch_end / _GIB) / 100
    if ranks_a_node * at_epoch_end > cache_gib * _GIB:
        raise ValueError(
            f"data.cache_gib: expected at least {node_gib:.2f} for {ranks_a_node} ranks "
            f"of a node at the end of an epoch, got {cache_gib:g}; raise it, or lower data.lanes "
            "(another order of the samples), data.clumps_a_window or data.fetch_ahead"
        )
