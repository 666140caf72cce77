"""The S3 server of these tests, and a fresh bucket of each."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.shared.pipelines.s3_server import S3Server


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
