"""What a run on a bucket logs of its reads is what the store's server has seen."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from m3i_fast.config import TrainConfig
from m3i_fast.engine.trainer import Trainer
from m3i_fast.observe.metrics import read_curves, read_jsonl
from m3i_fast.observe.sinks.prometheus import exported
from m3i_fast.report.run.curves import NAMES, curves
from tests.engine.run.bucket_work import train
from tests.shared.engine.small_run import small_run
from tests.shared.ranks import start_ranks

if TYPE_CHECKING:
    from tests.shared.pipelines.s3_server import S3Server

COUNTS = ("read_gib", "requests", "retries", "cache_hits", "cache_gib", "wait_s")


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    pytest.importorskip("obstore")
    pytest.importorskip("moto")
    from tests.shared.pipelines.s3_server import S3Server, s3_environment

    started = S3Server()
    with s3_environment(started.address):
        make = urllib.request.Request(f"{started.address}/reads", method="PUT")
        urllib.request.urlopen(make).close()
        yield started
    started.close()


def on_bucket(dataset: Path, cache: Path, **changes: object) -> TrainConfig:
    cfg = small_run(dataset, num_steps=40, num_threads=1, log_every=4, checkpoint_every=40)
    data = replace(cfg.data, path=Path("s3://reads/set"), cache_dir=cache, lanes=2, **changes)
    return replace(cfg, data=data)


def totals(run: Path) -> dict[str, float]:
    """Sums of all logged rows, each of which has all counts."""
    rows = read_jsonl(run / "metrics.jsonl")
    return {name: sum(row[f"bucket/{name}"] for row in rows) for name in COUNTS}


@pytest.mark.distributed
def test_all_ranks_reads_are_logged_and_faults_are_counted(
    dataset: Path, server: S3Server, tmp_path: Path
) -> None:
    """Several epochs: every clump is read, and later found, before the last row."""
    from m3i_fast.pipelines.storage.upload import push
    from tests.shared.pipelines.s3_server import cut, refuse

    push(dataset, "s3://reads/set")
    server.clear()
    server.fault(".tar", refuse("503 Slow Down", "SlowDown"), 3)
    server.fault(".tar", cut, 2)
    cfg = on_bucket(dataset, tmp_path / "cache", batch_size=4)
    start_ranks(train, (2, cfg, tmp_path / "run"), 2)
    found = totals(tmp_path / "run")
    asked = sum(n for name, n in server.requests.items() if name.startswith("GET train-"))
    assert found["requests"] == asked > 5
    assert found["retries"] == 5
    assert found["read_gib"] * 2**30 == server.sent_bytes(".tar") > 0
    assert found["wait_s"] > 0
    server.clear()  # another run, the same cache
    Trainer(on_bucket(dataset, tmp_path / "cache"), tmp_path / "again").train()
    again = totals(tmp_path / "again")
    assert (again["read_gib"], again["requests"], again["retries"]) == (0, 0, 0)
    assert again["cache_hits"] > 0 and again["cache_gib"] > 0
    logged = read_curves(tmp_path / "again" / "metrics.jsonl")
    assert len(curves(logged, "bucket")) == len(COUNTS)
    assert {f"bucket/{name}" for name in COUNTS} <= NAMES.keys()


def test_a_run_on_a_folder_logs_no_reads(dataset: Path, tmp_path: Path) -> None:
    cfg = small_run(dataset, num_steps=2, log_every=1, checkpoint_every=2)
    Trainer(cfg, tmp_path / "run").train()
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 2 and not [name for row in rows for name in row if "bucket" in name]


def test_prometheus_has_the_reads_in_its_units() -> None:
    found = {name: exported(f"bucket/{name}") for name in COUNTS}
    assert found["read_gib"] == ("m3i_bucket_read_bytes", None, "", 2.0**30)
    assert found["wait_s"] == ("m3i_bucket_wait_seconds", None, "", 1.0)
    assert found["retries"] == ("m3i_bucket_retries", None, "", 1.0)
