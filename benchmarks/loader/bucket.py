"""Shards in a bucket: moto's S3 server on loopback, a process of its own that is not counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from socket import socket
from tempfile import TemporaryDirectory
from unittest import mock

from m3i_fast.benchmarks.loader import measuring
from m3i_fast.config.data import LoaderConfig
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.optional_imports import require
from m3i_fast.pipelines.storage.upload import push

BUCKET = "m3i-bench"
TURNOVER = 3
"""Samples of the shards for one that is held: fewer would be read from the cache mostly."""
_STARTED_S = 60.0
_PUBLIC = {
    "Version": "2012-10-17",
    "Statement": [
        {
            "Effect": "Allow",
            "Principal": "*",
            "Action": "s3:GetObject",
            "Resource": f"arn:aws:s3:::{BUCKET}/*",
        }
    ],
}


@contextmanager
def in_bucket(
    data: LoaderConfig, *, turnover: int = TURNOVER
) -> Iterator[tuple[LoaderConfig, str]]:
    """Serve the shards of a folder from a bucket; yield our config and the shards' http address.

    Our loader's cache holds what it needs at once and no more, so that every epoch is read from
    the bucket. turnover: how many times as many samples the shards have at least. Raises ValueError
    for fewer, ImportError without moto.
    """
    data = _with_least_cache(data, turnover)
    with ExitStack() as stack:
        host, port = stack.enter_context(_server())
        address = f"http://{host}:{port}"
        environment = {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": address,
            "NO_PROXY": host,
        }
        stack.enter_context(mock.patch.dict(os.environ, environment))
        _put(host, port, f"/{BUCKET}")
        _put(host, port, f"/{BUCKET}?policy", json.dumps(_PUBLIC))
        url = f"s3://{BUCKET}/shards"
        push(data.path, url)
        cache = stack.enter_context(TemporaryDirectory(prefix="m3i-bench-"))
        yield replace(data, path=Path(url), cache_dir=Path(cache)), f"{address}/{BUCKET}/shards"


def _with_least_cache(data: LoaderConfig, turnover: int) -> LoaderConfig:
    """Return the config with the smallest cache that a rank with one lane can read through."""
    shards = read_manifest(data.path).split(data.split).shards
    num_samples = sum(shard.num_samples for shard in shards)
    num_bytes = sum(shard.num_bytes for shard in shards)
    clump = max(shard.num_samples for shard in shards)
    # Kept for the batches that are prepared, fetched ahead, and a clump at either end.
    held = (2 * data.prefetch + 8) * data.batch_size + 2 * data.batch_size + 2 * clump
    if num_samples < turnover * held:
        raise ValueError(
            f"--sources bucket: expected at least {turnover * held} samples, {turnover} times what "
            f"the loader holds at once, got {num_samples}; raise --num-pictures, or lower "
            "--data.batch-size"
        )
    return replace(
        data,
        lanes=1,
        fetch_ahead=2 * data.batch_size,
        cache_gib=held * num_bytes / num_samples / 2**30,
    )


@contextmanager
def _server() -> Iterator[tuple[str, int]]:
    """Run moto's server until the end; yield its host and port."""
    require("moto.server", extra="bench-data")
    host = "127.0.0.1"
    with socket() as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        measuring.NOT_COUNTED.add(str(process.pid))
        try:
            _wait_for(process, host, port)
            yield host, port
        finally:
            process.kill()
            process.wait()
            measuring.NOT_COUNTED.discard(str(process.pid))


def _put(host: str, port: int, path: str, body: str = "") -> None:
    connection = HTTPConnection(host, port, timeout=_STARTED_S)
    connection.request("PUT", path, body)
    answer = connection.getresponse()
    told = answer.read().decode()
    connection.close()
    if answer.status >= 300:
        raise RuntimeError(f"moto's server: PUT {path}: got {answer.status}: {told}")


def _wait_for(process: subprocess.Popen[bytes], host: str, port: int) -> None:
    begun = time.monotonic()
    while True:
        try:
            connection = HTTPConnection(host, port, timeout=5)
            connection.request("GET", "/")
            connection.getresponse().read()
            connection.close()
            return
        except OSError as error:
            if process.poll() is not None or time.monotonic() - begun > _STARTED_S:
                raise RuntimeError(
                    f"moto's server: expected an answer at {host}:{port}, got {error}; it starts "
                    "with: python -m moto.server"
                ) from error
        time.sleep(0.1)
