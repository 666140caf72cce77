"""Requests that get no answer are given up: by who made them, and at the interpreter's end."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.packing import job
from m3i_fast.pipelines.packing.bucket_output import BucketOutput
from m3i_fast.pipelines.packing.shard_task import finished
from m3i_fast.pipelines.storage.dataset_copy import copy_description
from m3i_fast.pipelines.storage.objects import Bucket
from m3i_fast.pipelines.storage.remote_files import RemoteFiles
from m3i_fast.pipelines.storage.requests import DaemonPool, Stop
from m3i_fast.pipelines.storage.upload import push
from tests.pipelines.storage.packed import table_of, write
from tests.shared.pipelines.s3_server import S3Server, silent

PROMPT_S = 20  # a request may take 60 s


@pytest.fixture
def silence(server: S3Server) -> Iterator[threading.Event]:
    """An event that ends the silence of a server which does not answer."""
    end = threading.Event()
    yield end
    end.set()


def wait_for_requests(server: S3Server, number: int) -> None:
    while server.in_flight < number:
        time.sleep(0.01)


def test_a_stop_ends_the_requests_in_flight_and_all_later_ones(
    server: S3Server, url: str, silence: threading.Event
) -> None:
    bucket, stop = Bucket(url), Stop()
    bucket.put("object", bytes(100))
    server.fault("object", silent(silence), 3)
    with ThreadPoolExecutor(3) as pool:
        reads = [pool.submit(bucket.read_range, "object", 0, 9, stop=stop) for _ in range(3)]
        wait_for_requests(server, 3)
        stop.set()
        for read in reads:
            with pytest.raises(ConnectionError, match="object bytes 0 to 8: stopped"):
                read.result(PROMPT_S)
    server.clear()
    with pytest.raises(ConnectionError, match="stopped, since its reader was closed"):
        bucket.read_range("object", 0, 9, stop=stop)
    assert not server.requests
    assert bytes(bucket.read_range("object", 0, 9, stop=Stop())) == bytes(9)


def copy(url: str, path: Path, cache: Path) -> None:
    copy_description(Bucket(url), cache, "train")


def read_samples(url: str, path: Path, cache: Path) -> None:
    table = table_of(path)
    files = RemoteFiles(Bucket(url), path, read_manifest(path), None)
    list(files.samples(table, table.rows))


def upload(url: str, path: Path, cache: Path) -> None:
    push(path, f"{url}/again")


def read_records(url: str, path: Path, cache: Path) -> None:
    out = BucketOutput.at(url, cache)
    tasks: list[Any] = [SimpleNamespace(out=out, record_file="train.samples") for _ in range(3)]
    job._of_earlier_starts(tasks, finished, out)


@pytest.mark.parametrize(
    ("work", "silent_file"),
    [
        (copy, ".samples"),
        (read_samples, ".tar"),
        (upload, "again/train-000000.tar"),
        (read_records, ".samples"),
    ],
)
def test_ctrl_c_does_not_wait_for_a_server_that_is_silent(
    server: S3Server,
    url: str,
    silence: threading.Event,
    tmp_path: Path,
    work: Callable[[str, Path, Path], None],
    silent_file: str,
) -> None:
    path = write(tmp_path / "data")
    push(path, url)
    server.fault(silent_file, silent(silence), 100)
    main = threading.main_thread().ident
    assert main == threading.get_ident()

    def interrupt() -> None:
        wait_for_requests(server, 1)
        time.sleep(0.1)
        signal.pthread_kill(main, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    presser = threading.Thread(target=interrupt)
    # Else the test would wait as long as the requests may take, and pass.
    late = threading.Timer(PROMPT_S, silence.set)
    try:
        presser.start()
        late.start()
        with pytest.raises(KeyboardInterrupt):
            work(url, path, tmp_path / "cache")
        presser.join()
    finally:
        signal.signal(signal.SIGINT, before)
        late.cancel()
    assert not silence.is_set()


FORKED = """
import os, sys
from m3i_fast.pipelines.storage.objects import Bucket

bucket = Bucket(sys.argv[1])
bucket.put("object", b"abc")
if (child := os.fork()) == 0:
    bucket.read("object")
    os._exit(7)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), bucket.read("object"))
"""


def test_a_forked_process_is_told_that_it_cannot_read(tmp_path: Path) -> None:
    """obstore's own threads are not in it, and a request would wait for them for ever."""
    words = [sys.executable, "-c", FORKED, str(tmp_path)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert ended.stdout == "1 b'abc'\n", ended.stderr
    assert "which had read from object storage: start it by multiprocessing's spawn" in ended.stderr


def test_a_stop_that_is_set_makes_no_request() -> None:
    stop = Stop()
    stop.set()

    async def request() -> None:
        raise AssertionError("made")

    made: list[bool] = []
    with pytest.raises(CancelledError):
        stop.run(lambda: made.append(True) or request())
    assert not made


PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from m3i_fast.config.data import LoaderConfig
from m3i_fast.pipelines.storage.remote import open_remote

url, cache, is_closed = sys.argv[1:]
remote = open_remote(LoaderConfig(path=Path(url), cache_dir=Path(cache), cache_gib=1, lanes=4))
remote.shards.expect(np.arange(600))
input()
if is_closed == "True":
    remote.shards.close()
raise ArithmeticError("the loss is not finite")
"""


@pytest.mark.parametrize("is_closed", [False, True])
def test_a_run_that_ends_does_not_wait_for_a_server_that_is_silent(
    server: S3Server, url: str, silence: threading.Event, tmp_path: Path, is_closed: bool
) -> None:
    push(write(tmp_path / "data"), url)
    server.fault(".tar", silent(silence), 100)
    words = [sys.executable, "-c", PROGRAM, url, str(tmp_path / "cache"), str(is_closed)]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while server.in_flight < 4 and process.poll() is None:
                time.sleep(0.01)
            _, told = process.communicate("\n", timeout=PROMPT_S)
        finally:
            process.kill()
    assert process.returncode == 1
    assert told.strip().endswith("ArithmeticError: the loss is not finite"), told
    assert "Exception ignored" not in told and "Fatal" not in told


def test_a_pool_makes_calls_in_their_order_until_it_is_closed() -> None:
    pool, begun, end, made = DaemonPool(1, "test"), threading.Event(), threading.Event(), []

    def hold() -> None:
        begun.set()
        end.wait()

    results = [pool.submit(lambda i=i: made.append(i) or 6 // i) for i in (3, 2, 1)]
    assert [result.result() for result in results] == [2, 3, 6] and made == [3, 2, 1]
    with pytest.raises(ZeroDivisionError):
        pool.submit(lambda: 1 // 0).result()
    holding = pool.submit(hold)
    begun.wait()
    waiting = pool.submit(made.append, 0)
    pool.close()
    end.set()
    assert holding.result() is None
    with pytest.raises(CancelledError):
        waiting.result()
    assert made == [3, 2, 1]
    (thread,) = pool._threads
    thread.join()  # which ends, since the pool is closed
