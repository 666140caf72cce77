"""Requests that get no answer are given up: by who made them, and at the interpreter's end."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import pytest

from m3i_fast.pipelines.storage.objects import Bucket
from m3i_fast.pipelines.storage.requests import DaemonPool, Stop
from m3i_fast.pipelines.storage.upload import push
from tests.pipelines.storage.packed import write
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
