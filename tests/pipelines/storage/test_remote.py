"""A split is opened from its URL by several ranks; what does not fit is refused before training."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from m3i_fast.cli.data import main
from m3i_fast.config.data import LoaderConfig
from m3i_fast.pipelines.batch_rows import TrainingRows
from m3i_fast.pipelines.dataset.manifest import MANIFEST_NAME, read_manifest
from m3i_fast.pipelines.dataset.sample_table import write_table
from m3i_fast.pipelines.sample_order.positions import StepLayout
from m3i_fast.pipelines.storage import remote as remote_module
from m3i_fast.pipelines.storage.dataset_copy import copy_table
from m3i_fast.pipelines.storage.objects import Bucket
from m3i_fast.pipelines.storage.remote import open_remote
from tests.pipelines.storage.packed import POLICY, contents, local_contents, table_of, write
from tests.shared.pipelines.s3_server import S3Server, slow


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("packed") / "data")


@pytest.fixture
def cfg(path: Path, url: str, tmp_path: Path) -> LoaderConfig:
    assert main(["push", str(path), url]) == 0
    return LoaderConfig(
        path=Path(url), batch_size=16, lanes=8, fetch_ahead=64, cache_dir=tmp_path / "cache"
    )


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_all_ranks_together_read_every_sample_once(
    path: Path, cfg: LoaderConfig, num_ranks: int, server: S3Server
) -> None:
    """Each sample of an epoch is read by one rank, with the bytes of the local shard."""
    opened = [
        open_remote(cfg, num_ranks=num_ranks, images_per_input=2, policy=POLICY)
        for _ in range(num_ranks)
    ]
    layout = StepLayout(batch_size=16, num_ranks=num_ranks, images_per_input=2)
    seen: list[np.ndarray] = []
    for start in range(0, 650, layout.samples_a_step):
        for rank, remote in enumerate(opened):
            positions = layout.positions(start, rank)
            samples = remote.order.samples(positions)
            remote.shards.expect(samples)
            places = remote.shards.locate(remote.table, samples)
            assert contents(remote.table, places, samples) == local_contents(path, samples)
            seen.append(samples[positions < 650])
    assert sorted(np.concatenate(seen).tolist()) == list(range(650))
    for remote in opened:
        remote.shards.close()


def test_batches_ahead_are_announced_once(cfg: LoaderConfig) -> None:
    remote = open_remote(cfg, policy=POLICY)
    rows = TrainingRows(
        remote.table,
        remote.shards,
        StepLayout(batch_size=16),
        rank=0,
        seed=0,
        start=0,
        order=remote.order.samples,
        batches_ahead=5,
    )
    for _ in range(30):
        next(rows)
        assert sum(clump.expected for clump in remote.shards._clumps.values()) == 5 * 16
    remote.shards.close()


def test_what_does_not_fit_is_refused_with_what_to_set(
    cfg: LoaderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"data.lanes: .*, 3, got 8; use 2 ranks, or --data.lanes"):
        open_remote(cfg, num_ranks=3, policy=POLICY)
    with pytest.raises(ValueError, match="data.buffer_gib: expected at least"):
        open_remote(replace(cfg, buffer_gib=1e-6), policy=POLICY)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="for 8 ranks of a node"):
        open_remote(replace(cfg, cache_gib=1e-3), num_ranks=8, policy=POLICY)
    with pytest.raises(ValueError, match="split: expected one of"):
        open_remote(replace(cfg, split="none"), policy=POLICY)
    with pytest.raises(FileNotFoundError, match=r"none/manifest.json: not found"):
        open_remote(replace(cfg, path=Path(f"{cfg.path}/none")), policy=POLICY)


@pytest.mark.parametrize("hashed_bytes", [1 << 26, 0])
def test_a_table_that_cannot_be_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, hashed_bytes: int
) -> None:
    monkeypatch.setattr(remote_module, "HASHED_BYTES", hashed_bytes)
    table, manifest = table_of(path), read_manifest(path)
    remote_module.check_rows("s3://a/b", table, manifest, "train")
    for row, column, value, fault in (
        (300, "shard", 0, r"row 300: expected a sample of shard 1 \(.*\), got shard 0"),
        (299, "shard", 1, r"row 299: expected a sample of shard 0 \(.*\), got shard 1"),
        (649, "offset", 100, "row 649: offset: expected a multiple of 512, got 100"),
        (0, "size", 1 << 30, "row 0: size: expected an end within the tar"),
    ):
        rows = np.array(table.rows)
        rows[column][row] = value
        with pytest.raises(ValueError, match=f"s3://a/b: table of split train: {fault}"):
            remote_module.check_rows("s3://a/b", replace(table, rows=rows), manifest, "train")


def test_rows_in_another_order_than_the_shards_are_refused_from_a_bucket(
    path: Path, cfg: LoaderConfig, tmp_path: Path
) -> None:
    copy = shutil.copytree(path, tmp_path / "copy")
    info = write_table(copy / "train.samples", [np.array(table_of(path).rows)[::-1]])
    manifest = read_manifest(path)
    split = replace(manifest.split("train"), table=info)
    (copy / MANIFEST_NAME).write_text(replace(manifest, splits={"train": split}).to_json())
    url = f"{cfg.path}/reversed"
    assert main(["push", str(copy), url]) == 0
    with pytest.raises(ValueError, match="row 0: expected a sample of shard 0 .*, got shard 2"):
        open_remote(replace(cfg, path=Path(url)), policy=POLICY)


def test_a_table_is_copied_once_by_all_who_want_it(
    path: Path, cfg: LoaderConfig, server: S3Server, tmp_path: Path
) -> None:
    server.clear()
    server.fault("train.samples", slow(0.3), 2)
    info = read_manifest(path).split("train").table
    bucket, copy = Bucket(cfg.path, POLICY), tmp_path / "copy"
    copy.mkdir()
    with ThreadPoolExecutor(3) as pool:
        copies = [pool.submit(copy_table, bucket, copy / "train.samples", info) for _ in range(3)]
    assert [done.result() for done in copies] == [None] * 3
    assert server.requests["GET train.samples"] == 1
    assert (copy / "train.samples").read_bytes() == (path / "train.samples").read_bytes()


def test_push_wants_a_url(path: Path) -> None:
    with pytest.raises(ValueError, match="URL: expected s3://, gs:// or https://, got elsewhere"):
        main(["push", str(path), "elsewhere"])
    assert len(table_of(path)) == 650
