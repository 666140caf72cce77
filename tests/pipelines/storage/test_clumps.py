"""Samples of shards in a bucket: the bytes are those of the local shards, whatever goes wrong."""

from __future__ import annotations

import threading
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from stat import S_ISREG
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from m3i_fast.config.data import LoaderConfig
from m3i_fast.pipelines.sample_order.lanes import LaneOrder
from m3i_fast.pipelines.sample_order.positions import StepLayout
from m3i_fast.pipelines.storage import clumps
from m3i_fast.pipelines.storage.cache import CacheFull, SharedCache
from m3i_fast.pipelines.storage.clumps import BucketShards, check_buffer, needed_bytes
from m3i_fast.pipelines.storage.objects import Bucket
from m3i_fast.pipelines.storage.remote import RemotePlan
from m3i_fast.pipelines.storage.shards import BucketReads
from m3i_fast.pipelines.storage.upload import push
from tests.pipelines.storage.packed import (
    NUM_CLUMPS,
    POLICY,
    contents,
    local_contents,
    readers,
    sizes,
    table_of,
    write,
)
from tests.shared.pipelines.s3_server import S3Server, cut, refuse, slow

ROOM = 1 << 30


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("packed") / "data")


@pytest.fixture
def pushed(path: Path, url: str, server: S3Server) -> str:
    push(path, url)
    server.clear()
    return url


def tar_reads(server: S3Server) -> int:
    return sum(n for name, n in server.requests.items() if name.startswith("GET train"))


def used_bytes(folder: Path) -> int:
    """Bytes of the clumps below a folder, of which fetching threads rename and remove some."""
    found: dict[int, int] = {}  # by inode, as a clump may have several names
    for file in folder.rglob("*-*"):
        with suppress(FileNotFoundError):
            stat = file.stat()
            if S_ISREG(stat.st_mode):
                found[stat.st_ino] = stat.st_size
    return sum(found.values())


def follow(shards: BucketShards, path: Path, *, batches: int = 60, ahead: int = 4) -> None:
    """Read batches in the order of lanes, and compare every sample with the local shards."""
    order = LaneOrder(sizes(path), seed=0, lanes=4)
    table = table_of(path)
    rows = order.samples(np.arange((batches + ahead) * 32)).reshape(-1, 32)
    for batch in rows[:ahead]:
        shards.expect(batch)
    for i in range(batches):
        shards.expect(rows[i + ahead])
        places = shards.locate(table, rows[i])
        assert contents(table, places, rows[i]) == local_contents(path, rows[i])


def test_two_epochs_equal_local_reads_with_one_read_a_clump(
    path: Path, pushed: str, server: S3Server, tmp_path: Path
) -> None:
    shards = readers(path, pushed, SharedCache(tmp_path, ROOM), reads_in_flight=3)
    follow(shards, path)
    shards.close()
    assert tar_reads(server) == shards.counts.fetches == NUM_CLUMPS
    assert 1 <= server.most_in_flight <= 3
    rows = table_of(path).rows
    num_bytes = int(rows["size"].sum())
    assert shards.reads() == BucketReads(
        read_bytes=num_bytes, requests=NUM_CLUMPS, wait_s=shards.counts.wait_s
    )
    again = readers(path, pushed, SharedCache(tmp_path, ROOM))  # another run, the same cache
    follow(again, path)
    assert again.reads() == BucketReads(
        cache_hits=NUM_CLUMPS, cache_bytes=num_bytes, wait_s=again.counts.wait_s
    )
    again.close()


def test_a_small_cache_is_kept_to_its_bound(
    path: Path, pushed: str, server: S3Server, tmp_path: Path
) -> None:
    table = table_of(path)
    largest = 128 * int(table.rows["size"].max())
    limit = 5 * largest
    shards = readers(path, pushed, SharedCache(tmp_path, limit), kept_batches=2)
    order = LaneOrder(sizes(path), seed=0, lanes=1).samples(np.arange(1_300)).reshape(-1, 26)
    for batch, coming in zip(order, [*order[1:], order[0]], strict=True):
        shards.expect(coming)
        places = shards.locate(table, batch)
        assert contents(table, places, batch) == local_contents(path, batch)
        assert used_bytes(tmp_path) <= limit
    assert shards.counts.fetches > NUM_CLUMPS  # some were removed, and fetched again
    shards.close()


def test_what_is_expected_is_kept_until_its_turn(path: Path, pushed: str, tmp_path: Path) -> None:
    shards = readers(path, pushed, SharedCache(tmp_path, ROOM), kept_batches=1)
    table = table_of(path)
    shards.expect(np.array([0]))
    for _ in range(5):
        shards.locate(table, np.array([600]))
    shards.locate(table, np.array([0]))
    assert (shards.counts.fetches, shards.counts.cache_hits) == (2, 0)
    for _ in range(5):
        shards.locate(table, np.array([600]))
    shards.locate(table, np.array([0]))  # it was given back, and still lay in the cache
    assert (shards.counts.fetches, shards.counts.cache_hits) == (2, 1)
    shards.close()


@pytest.mark.parametrize(
    ("fault", "retries"),
    [(refuse("503 Slow Down", "SlowDown"), 6), (cut, 6), (slow(0.3), 0)],
    ids=["503", "cut", "slow"],
)
def test_passing_faults_change_no_byte_and_are_counted(
    path: Path, pushed: str, server: S3Server, tmp_path: Path, fault: object, retries: int
) -> None:
    shards = readers(path, pushed, SharedCache(tmp_path, ROOM))
    server.fault(".tar", fault, 6)
    follow(shards, path, batches=20)
    shards.close()
    assert shards.reads().retries == retries
    assert shards.reads().requests == tar_reads(server)


def test_a_wait_is_counted_and_told(
    path: Path,
    pushed: str,
    server: S3Server,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clumps, "TOLD_WAIT_S", 0.1)
    caplog.set_level("INFO")
    shards = readers(path, pushed, SharedCache(tmp_path, ROOM))
    server.fault(".tar", slow(0.5), 1)
    shards.expect(np.arange(5))
    shards.locate(table_of(path), np.arange(5))
    assert shards.counts.waits == 1 and shards.counts.wait_s > 0
    assert f"s for samples from {pushed}; --data.fetch-ahead" in caplog.text
    shards.close()


def test_a_lasting_fault_is_told_where_the_samples_are_needed(
    path: Path, pushed: str, server: S3Server, tmp_path: Path
) -> None:
    hasty = replace(POLICY, give_up_s=0.2)
    shards = readers(path, pushed, SharedCache(tmp_path, ROOM), policy=hasty)
    table, samples = table_of(path), np.arange(3)
    for fault, kind, told in (
        (refuse("503 Slow Down", "SlowDown"), ConnectionError, "SlowDown"),
        (refuse("403 Forbidden", "ExpiredToken"), PermissionError, "ExpiredToken"),
    ):
        server.fault(".tar", fault, 100)
        shards.expect(samples)
        with pytest.raises(kind, match=rf"train.*\.tar bytes 0 to \d+.*{told}"):
            shards.locate(table, samples)
        server.clear()
    places = shards.locate(table, samples)  # the store is well again
    assert contents(table, places, samples) == local_contents(path, samples)
    shards.close()


def test_closing_stops_retries_and_the_next_sample_starts_again(
    path: Path, pushed: str, server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    patient = replace(POLICY, first_wait_s=100.0, longest_wait_s=100.0)
    shards = readers(path, pushed, SharedCache(tmp_path, ROOM), policy=patient)
    table, samples = table_of(path), np.arange(3)
    server.fault(".tar", refuse("503 Slow Down", "SlowDown"), 1)
    shards.expect(samples)
    while not tar_reads(server):
        threading.Event().wait(0.01)
    shards.close()
    for thread in threading.enumerate():
        if thread.name.startswith("m3i-fetch"):
            thread.join(10)
            assert not thread.is_alive()
    assert not list((tmp_path / "users").iterdir()) and (tmp_path / "size").read_text() == "0"
    places = shards.locate(table, samples)
    assert contents(table, places, samples) == local_contents(path, samples)
    shards.close()
    shards.close()
    assert f"{pushed}: 1 reads of" in caplog.text and "0 waits for samples" in caplog.text


def test_a_clump_is_read_in_pieces(
    path: Path, pushed: str, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clumps, "PIECE", 100_000)
    shards = readers(path, pushed, SharedCache(tmp_path, ROOM))
    table, samples = table_of(path), np.arange(300, 428)
    server.fault(".tar", cut, 1)
    places = shards.locate(table, samples)
    assert contents(table, places, samples) == local_contents(path, samples)
    num_bytes = int(table.rows["size"][samples].sum())
    assert tar_reads(server) == -(-num_bytes // 100_000) + 1 > 3
    assert (shards.counts.fetches, shards.counts.fetched_bytes) == (1, num_bytes)
    shards.close()


def test_a_damaged_copy_is_fetched_again(
    path: Path, pushed: str, server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table, samples = table_of(path), np.array([300, 427, 430])
    for fetches, hits in ((2, 0), (1, 1), (0, 2)):
        shards = readers(path, pushed, SharedCache(tmp_path, ROOM))
        places = shards.locate(table, samples)
        assert contents(table, places, samples) == local_contents(path, samples)
        assert (shards.counts.fetches, shards.counts.cache_hits) == (fetches, hits)
        shards.close()
        if fetches == 2:
            damaged = tmp_path / "files" / Path(places[0][0]).name
            content = bytearray(damaged.read_bytes())
            content[5_000] ^= 4
            damaged.write_bytes(content)
    file = table.shard_files[1]
    assert f"samples 300 to 427 of {pushed}/{file} is damaged" in caplog.text


def test_a_fetch_that_failed_beforehand_keeps_what_was_expected(
    path: Path, pushed: str, server: S3Server, tmp_path: Path
) -> None:
    shards = readers(path, pushed, SharedCache(tmp_path, ROOM))
    server.fault(".tar", refuse("403 Forbidden", "AccessDenied"), 1)
    shards.expect(np.arange(5))
    wait([shards._clumps[0].file])
    shards.expect(np.arange(5, 8))
    assert shards._clumps[0].expected == 8
    shards.locate(table_of(path), np.arange(5))
    assert shards._clumps[0].expected == 3
    shards.close()


def test_changed_and_missing_shards_are_named(
    path: Path, pushed: str, server: S3Server, tmp_path: Path
) -> None:
    shards = readers(path, pushed, SharedCache(tmp_path / "a", ROOM))
    table, bucket = table_of(path), Bucket(pushed, POLICY)
    file = table.shard_files[1]
    content = bucket.read(file)
    bucket.put(file, content[:-1] + b"x")
    with pytest.raises(ValueError, match=f"{file}: changed while it was read"):
        shards.locate(table, np.array([300]))
    shards.close()
    bucket.put(file, content[:-1])
    with pytest.raises(ValueError, match=rf"{file}: expected {len(content)} bytes \(manifest\)"):
        readers(path, pushed, SharedCache(tmp_path / "b", ROOM))
    bucket._obs.delete(bucket._store, file)
    with pytest.raises(FileNotFoundError, match=f"{file}: expected an object, got none"):
        readers(path, pushed, SharedCache(tmp_path / "b", ROOM))


def test_more_in_use_than_fits_is_an_error(
    path: Path, pushed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clumps, "_WAIT_FOR_ROOM_S", 0.2)
    table = table_of(path)
    limit = 130 * int(table.rows["size"].max())
    shards = readers(path, pushed, SharedCache(tmp_path, limit))
    assert issubclass(CacheFull, OSError)  # which the command line prints without a traceback
    with pytest.raises(CacheFull, match=r"in use by 1 processes; raise data.cache_gib"):
        shards.locate(table, np.array([0, 130, 260, 310]))
    shards.close()


def test_room_for_the_open_clumps_is_checked_before_training() -> None:
    gib = 2**30
    counts, sizes_ = [1_280] * 1_000, [1_280 * 110_000] * 1_000  # 14 MB a clump
    for num_ranks, expected in ((1, 1_920), (8, 240)):
        of_ranks = needed_bytes(
            counts,
            sizes_,
            density=np.ones(1_920),
            window=1,
            num_ranks=num_ranks,
            passing=1_280,
        )
        needed = (expected + 10) * 128 * 110_000
        assert of_ranks.tolist() == [needed] * num_ranks
    check_buffer(needed, at_epoch_end=needed, buffer_gib=4, cache_gib=30, ranks_a_node=8)
    with pytest.raises(ValueError, match=r"data.buffer_gib: expected at least 3.28.*got 3;"):
        check_buffer(needed, at_epoch_end=needed, buffer_gib=3, cache_gib=64, ranks_a_node=8)
    with pytest.raises(ValueError, match=r"data.cache_gib: expected at least 26.23 for 8 ranks"):
        check_buffer(needed, at_epoch_end=needed, buffer_gib=4, cache_gib=26, ranks_a_node=8)
    few = needed_bytes([300], [300 * gib], density=np.ones(64), window=4, num_ranks=1, passing=128)
    assert few[0] == 3 * 128 * gib  # never more clumps than there are
    small = needed_bytes(
        [4] * 100, [4_000] * 100, density=np.ones(1), window=1, num_ranks=1, passing=40
    )
    assert small[0] == (1 + 10) * 4_000  # a shard of four samples is a clump


def most_held(order: LaneOrder, plan: RemotePlan, num_steps: int) -> int:
    """The most samples in clumps that the first rank holds, from `expect` to their last batch's."""
    batch_size = plan.cfg.batch_size
    layout = StepLayout(batch_size=batch_size, num_ranks=plan.num_ranks)
    ahead, kept = -(-plan.cfg.fetch_ahead // batch_size), plan.kept_batches
    held = np.zeros(num_steps + ahead + kept + 2, np.int64)
    until: dict[int, int] = {}
    for step in range(num_steps + ahead):
        samples = order.samples(layout.positions(step * layout.samples_a_step, 0))
        _, firsts, ends = order.clumps.around(samples)
        for first, end in np.unique(np.stack([firsts, ends]), axis=1).T.tolist():
            begin = max(step - ahead, until.get(first, -1) + 1, 0)
            held[begin : step + kept + 1] += end - first
            until[first] = step + kept
    return int(held[:num_steps].max())


@pytest.mark.parametrize("batch_size", [64, 1_024])
def test_the_room_is_that_of_the_order_of_the_lanes(batch_size: int) -> None:
    """Within an epoch, and where lanes change their clumps at its end.

    How many of a rank's 30 lanes pass a clump at once varies by a tenth.
    """
    counts = np.random.default_rng(0).integers(800, 1_300, 1_000).tolist()
    order = LaneOrder(counts, seed=0, lanes=240)
    shards = [SimpleNamespace(num_samples=n, num_bytes=n) for n in counts]
    cfg = LoaderConfig(batch_size=batch_size, fetch_ahead=1_280)
    manifest: Any = SimpleNamespace(split=lambda _: SimpleNamespace(shards=shards))
    bucket: Any = None
    plan = RemotePlan(
        cfg=cfg, bucket=bucket, path=Path(), manifest=manifest, order=order, num_ranks=8
    )
    epoch = sum(counts) // (8 * batch_size)
    for windows, num_steps in ((1, epoch // 2), (2, epoch + 100)):
        room = int(plan.needed_bytes(windows_a_lane=windows)[0])  # of a byte a sample
        assert 0.75 * room < most_held(order, plan, num_steps) < 1.12 * room
