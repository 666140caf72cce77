"""Small data sets for the pipeline's tests, packed by the packer itself, and an S3 server.

What packs is imported by the fixtures: where DALI or Pillow is not installed, a conftest that does
not import would end the whole session.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from m3i_fast.config.data import LoaderConfig
    from tests.shared.pipelines.data import Packer
    from tests.shared.pipelines.s3_server import S3Server


@pytest.fixture(scope="session")
def fifty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 pictures of 40 x 56 in 13 shards; every fifth lacks a caption, every seventh a label."""
    from tests.shared.pipelines.data import encode_image, pack, sample, smooth_picture

    samples = [
        sample(
            i,
            encode_image(smooth_picture(i, 40, 56)),
            **({"captions": ()} if i % 5 == 0 else {}),
            **({"label": -1} if i % 7 == 0 else {}),
        )
        for i in range(50)
    ]
    return pack(tmp_path_factory.mktemp("fifty") / "data", samples)


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 pictures with 0 to 3 captions, in 13 shards; every third lacks a label."""
    from tests.shared.pipelines.data import (
        encode_image,
        pack,
        sample,
        several_captions,
        smooth_picture,
    )

    samples = [
        sample(
            i,
            encode_image(smooth_picture(i, 20, 28)),
            captions=several_captions(i),
            label=-1 if i % 3 == 0 else i % 3,
        )
        for i in range(50)
    ]
    return pack(tmp_path_factory.mktemp("mixture") / "data", samples)


@pytest.fixture
def packer(tmp_path: Path) -> Packer:
    """Pack samples into a fresh directory, all in one shard."""
    from tests.shared.pipelines.data import pack

    return lambda samples: pack(tmp_path / "data", samples, samples_per_shard=len(samples))


@pytest.fixture
def cfg(fifty: Path) -> LoaderConfig:
    """12 batches of 4 an epoch, every random op in use."""
    from m3i_fast.config.data import LoaderConfig
    from tests.shared.pipelines.data import EVERYTHING

    return LoaderConfig(
        path=fifty,
        batch_size=4,
        global_views=EVERYTHING,
        local_views=replace(EVERYTHING, size=8, count=3, scale=(0.05, 0.3)),
        seed=5,
    )


# ---- The S3 server, and a fresh bucket of each test ---------------------------------------------


@pytest.fixture(scope="session")
def started_server() -> Iterator[S3Server]:
    pytest.importorskip("obstore")
    pytest.importorskip("moto")
    from tests.shared.pipelines.s3_server import S3Server, s3_environment

    server = S3Server()
    with s3_environment(server.address):
        yield server
    server.close()


@pytest.fixture
def server(started_server: S3Server) -> S3Server:
    """The server without faults, its counts at 0."""
    started_server.clear()
    return started_server


@pytest.fixture
def url(server: S3Server, request: pytest.FixtureRequest) -> str:
    """A folder in a bucket of the test's own."""
    bucket = f"bucket-{abs(hash(request.node.nodeid)):x}"
    make = urllib.request.Request(f"{server.address}/{bucket}", method="PUT")
    urllib.request.urlopen(make).close()
    server.clear()
    return f"s3://{bucket}/some/set"
