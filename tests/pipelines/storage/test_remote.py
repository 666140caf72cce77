"""A split is opened from its URL by several ranks; what does not fit is refused before training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from m3i_fast.cli.data import main
from m3i_fast.config.data import LoaderConfig
from m3i_fast.pipelines.batch_rows import TrainingRows
from m3i_fast.pipelines.order import StepLayout
from m3i_fast.pipelines.storage.remote import open_remote
from tests.pipelines.storage.packed import POLICY, contents, local_contents, table_of, write
from tests.shared.pipelines.s3_server import S3Server


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


def test_push_wants_a_url(path: Path) -> None:
    with pytest.raises(ValueError, match="URL: expected s3://, gs:// or https://, got elsewhere"):
        main(["push", str(path), "elsewhere"])
    assert len(table_of(path)) == 650
