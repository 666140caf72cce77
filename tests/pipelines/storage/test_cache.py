"""The shared cache: its bound, files in use, several processes, and processes that are killed."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from m3i_fast.pipelines.storage.cache import CacheFull, SharedCache

SIZE = 10_000
PROCESS = """
import random, sys
from pathlib import Path
from m3i_fast.pipelines.storage.cache import SharedCache

cache = SharedCache(Path(sys.argv[1]), int(sys.argv[2]))
rng = random.Random(int(sys.argv[3]))
for _ in range(150):
    number = rng.randrange(12)
    content = bytes([number]) * 10_000
    path = cache.take(str(number), 10_000)
    if path is None:
        path = cache.write(str(number), 10_000, [content])
    assert path.read_bytes() == content
    with cache._locked():  # so that nothing is counted that is gone at the end of the count
        files = [f for f in Path(sys.argv[1]).rglob("*") if f.name.split(".")[0].isdigit()]
        used = len({f.stat().st_ino for f in files}) * 10_000
    assert used <= int(sys.argv[2]), used
    cache.release(str(number))
cache.close()
"""
KILLED = """
import sys, time
from pathlib import Path
from m3i_fast.pipelines.storage.cache import SharedCache

cache = SharedCache(Path(sys.argv[1]), 100_000)
cache.write("whole", 10_000, [b"w" * 5_000] * 2)

def fetch():
    print("fetching", flush=True)
    time.sleep(600)
    yield b""

cache.write("half", 10_000, fetch())
"""


def put(cache: SharedCache, name: str) -> Path:
    return cache.write(name, SIZE, [name[:1].encode() * SIZE])


def num_bytes(folder: Path) -> int:
    """Bytes on disk: two links to one file count once."""
    files = [f.stat() for f in folder.rglob("*") if f.is_file() and f.name not in ("lock", "size")]
    return sum({found.st_ino: found.st_size for found in files}.values())


def test_files_used_longest_ago_make_room(tmp_path: Path) -> None:
    cache = SharedCache(tmp_path, 5 * SIZE)
    for i in range(5):
        put(cache, f"{i}")
        cache.release(f"{i}")
    assert cache.take("0", SIZE) is not None  # used again, and so the newest
    cache.release("0")
    for i in range(5, 8):
        put(cache, f"{i}")
        cache.release(f"{i}")
        assert num_bytes(tmp_path) <= 5 * SIZE
    kept = sorted(path.name for path in (tmp_path / "files").iterdir())
    assert "0" in kept and "7" in kept and "1" not in kept and "2" not in kept
    for name in kept:
        path = cache.take(name, SIZE)
        assert path is not None and path.read_bytes() == name.encode() * SIZE


def test_a_file_in_use_stays_whatever_others_need(tmp_path: Path) -> None:
    one, other = SharedCache(tmp_path, 3 * SIZE), SharedCache(tmp_path, 3 * SIZE)
    used = [put(one, name) for name in "abc"]
    with pytest.raises(CacheFull, match=r"30000 of 30000 are in use by 2 processes"):
        put(other, "d")
    assert [path.read_bytes()[:1] for path in used] == [b"a", b"b", b"c"]
    one.release("b")
    put(other, "d")
    assert one.take("b", SIZE) is None and num_bytes(tmp_path) == 3 * SIZE
    one.close()
    other.release("d")
    for name in "efg":
        put(other, name)
        assert num_bytes(tmp_path) <= 3 * SIZE


def test_a_fetch_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = SharedCache(tmp_path, 3 * SIZE)

    def fail() -> Iterator[bytes]:
        yield b"a"
        raise ConnectionError("from the test")

    with pytest.raises(ConnectionError):
        cache.write("a", SIZE, fail())
    with pytest.raises(ValueError, match="a: expected 10000 bytes, got 3"):
        cache.write("a", SIZE, [b"ab", b"c"])
    assert cache.take("a", SIZE) is None and num_bytes(tmp_path) == 0
    assert (tmp_path / "size").read_text() == "0"
    put(cache, "a")


def test_a_disk_that_is_full_bounds_the_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that was used longest ago makes room for the next one, where no disk does."""
    cache = SharedCache(tmp_path / "cache", 10_000)

    def full() -> Iterator[bytes]:
        yield b"x" * 50
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("a", "b"):
        cache.write(name, 100, [b"x" * 100])
        cache.release(name)
    with pytest.raises(CacheFull, match="No space left on device"):
        cache.write("c", 100, full())
    assert cache.limit_bytes == 200 and "--data.cache-dir" in caplog.text
    cache.write("c", 100, [b"c" * 100])
    assert cache.take("a", 100) is None and cache.take("c", 100) is not None
    cache.close()


def test_a_file_of_another_size_is_not_taken(tmp_path: Path) -> None:
    """A disk that lost power may keep the name of a file without its end."""
    cache = SharedCache(tmp_path, 3 * SIZE)
    put(cache, "a")
    cache.release("a")
    (tmp_path / "files/a").write_bytes(b"a")
    assert cache.take("a", SIZE) is None
    assert put(cache, "a").stat().st_size == SIZE


def test_processes_share_one_cache_within_its_bound(tmp_path: Path) -> None:
    limit = 5 * SIZE
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, tmp_path, str(limit), str(seed)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(3)
    ]
    for run in runs:
        assert run.communicate(timeout=300)[1] == "" and run.returncode == 0
    assert num_bytes(tmp_path) <= limit and not list((tmp_path / "users").iterdir())


def test_a_process_killed_in_a_fetch_leaves_nothing_half(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None and run.stdout.readline() == "fetching\n"
    assert num_bytes(tmp_path) == 2 * SIZE
    run.send_signal(signal.SIGKILL)
    run.wait()
    cache = SharedCache(tmp_path, 100_000)
    assert num_bytes(tmp_path) == SIZE and (tmp_path / "size").read_text() == "10000"
    assert len(list((tmp_path / "users").iterdir())) == 1
    assert cache.take("half", SIZE) is None
    whole = cache.take("whole", SIZE)
    assert whole is not None and whole.read_bytes() == b"w" * SIZE
