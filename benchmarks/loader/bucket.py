"""Shards in a bucket: moto's S3 server on loopback, a process of its own that is not counted."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

from m3i_fast.benchmarks.loader import measuring
from m3i_fast.config.data import LoaderConfig
from m3i_fast.pipelines.optional_imports import require
from m3i_fast.pipelines.sample_order.lanes import CLUMP_SAMPLES
from m3i_fast.pipelines.storage.remote import plan_remote
from m3i_fast.pipelines.storage.upload import push

BUCKET, HOST = "m3i-bench", "127.0.0.1"
TURNOVER = 3
"""Bytes of the shards for one that is held: fewer would be read from the cache mostly."""
_REQUEST_S = 60.0
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
# It ends with the process that reads its port and holds its standard input, however that ends.
_SERVE = f"""
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer({HOST!r}, 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def in_bucket(
    data: LoaderConfig, *, turnover: float = TURNOVER
) -> Iterator[tuple[LoaderConfig, str]]:
    """Serve the shards of a folder from a bucket; yield our config and the shards' http address.

    Our loader's cache holds what it needs at once and no more, so that every epoch is read from
    the bucket. turnover: how many times as many bytes the shards have at least. Raises ValueError
    for fewer, ImportError without moto.
    """
    with ExitStack() as stack:
        port = stack.enter_context(_server())
        stack.enter_context(mock.patch.dict(os.environ, _environment(port), clear=True))
        _put(port, f"/{BUCKET}")
        _put(port, f"/{BUCKET}?policy", json.dumps(_PUBLIC))
        url = f"s3://{BUCKET}/shards"
        push(data.path, url)
        cache = stack.enter_context(TemporaryDirectory(prefix="m3i-bench-"))
        data = replace(data, path=Path(url), cache_dir=Path(cache))
        yield _with_least_cache(data, turnover), f"http://{HOST}:{port}/{BUCKET}/shards"


def _environment(port: int) -> dict[str, str]:
    """Return this process's variables with those of the server's store, and of no other one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return kept | {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{HOST}:{port}",
        "NO_PROXY": HOST,
        "no_proxy": HOST,
    }


def _with_least_cache(data: LoaderConfig, turnover: float) -> LoaderConfig:
    """Return the config with one lane and the smallest cache that it can be read through."""
    data = replace(data, lanes=1, fetch_ahead=2 * data.batch_size)
    plan = plan_remote(data)
    num_bytes = sum(plan.shard_bytes)
    clump = max(  # a part of one is kept at either end
        num_bytes * min(CLUMP_SAMPLES / num_samples, 1)
        for num_bytes, num_samples in zip(plan.shard_bytes, plan.shard_sizes, strict=True)
    )
    held = int(plan.needed_bytes()[0]) + 2 * math.ceil(clump)
    if num_bytes < turnover * held:
        raise ValueError(
            f"--sources bucket: expected shards of {turnover * held / 1e6:.1f} MB, {turnover} "
            f"times what the loader holds at once, got {num_bytes / 1e6:.1f} MB; raise "
            "--num-pictures, or lower --data.batch-size"
        )
    return replace(data, cache_gib=held / 2**30)


@contextmanager
def _server() -> Iterator[int]:
    """Run moto's server until the end; yield its port."""
    require("moto.server", extra="bench-data")
    with subprocess.Popen(
        [sys.executable, "-c", _SERVE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        measuring.NOT_COUNTED.add(str(process.pid))
        try:
            said = process.stdout.readline().strip()
            if not said:
                raise RuntimeError(
                    "moto's server: expected its port, got no answer; see what `python -m "
                    "moto.server` says"
                )
            yield int(said)
        finally:
            process.kill()
            measuring.NOT_COUNTED.discard(str(process.pid))


def _put(port: int, path: str, body: str = "") -> None:
    connection = HTTPConnection(HOST, port, timeout=_REQUEST_S)
    connection.request("PUT", path, body)
    answer = connection.getresponse()
    told = answer.read().decode()
    connection.close()
    if answer.status >= 300:
        raise RuntimeError(f"moto's server: PUT {path}: got {answer.status}: {told}")
