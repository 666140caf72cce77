"""Batches that come from a bucket are those of the same shards in a folder, bit for bit."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from m3i_fast.config.data import BackendName, LoaderConfig, ViewConfig
from m3i_fast.pipelines import loader as loader_module
from m3i_fast.pipelines.dataset.pack import write_dataset
from m3i_fast.pipelines.dataset.sample_table import split_digest
from m3i_fast.pipelines.loader import Loader, evaluation_batches
from m3i_fast.pipelines.opened.open_few import open_few
from m3i_fast.pipelines.storage.remote import folder_at
from m3i_fast.pipelines.storage.upload import push
from m3i_fast.pipelines.threads import Placement
from m3i_fast.report.data.gather import pictures_of
from tests.pipelines.storage.packed import write
from tests.shared.pipelines.data import encode_image, equal, info, sample, smooth_picture
from tests.shared.pipelines.s3_server import S3Server, cut, refuse, slow


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("packed") / "data")


@pytest.fixture
def cfg(path: Path, url: str, server: S3Server, tmp_path: Path) -> LoaderConfig:
    push(path, url)
    server.clear()
    return LoaderConfig(
        path=Path(url),
        batch_size=16,
        global_views=ViewConfig(size=8),
        lanes=8,
        fetch_ahead=100,
        cache_dir=tmp_path / "cache",
        backend="torch",
    )


def in_the_order_of(remote: Loader, path: Path, cfg: LoaderConfig, **ranks: int) -> Loader:
    """A loader of the folder that takes the samples in the bucket's order."""
    loader = Loader(replace(cfg, path=path), images_per_input=2, **ranks)
    loader._open = replace(loader._open, lanes=remote._open.lanes)
    return loader


def in_use(cfg: LoaderConfig) -> list[Path | threading.Thread]:
    """What a reader of the bucket holds: its folder in the cache, and its threads."""
    threads = [t for t in threading.enumerate() if t.name.startswith("m3i-fetch")]
    for thread in threads:
        thread.join(1)
    users = cfg.cache_dir.expanduser() / "clumps/users"
    return [*users.iterdir(), *(t for t in threads if t.is_alive())]


@pytest.mark.parametrize("rank", [0, 1])
def test_batches_equal_those_of_the_folder(
    path: Path, cfg: LoaderConfig, server: S3Server, rank: int
) -> None:
    remote = Loader(cfg, rank=rank, num_ranks=2, images_per_input=2)
    local = in_the_order_of(remote, path, cfg, rank=rank, num_ranks=2)
    server.fault(".tar", refuse("503 Slow Down", "SlowDown"), 2)
    server.fault(".tar", cut, 2)
    for _ in range(45):  # more than two epochs
        assert equal(next(remote), next(local))
    state = remote.state_dict()
    assert state["order"].endswith("lanes 8, window 1, images 2")
    remote.close()
    assert not in_use(cfg)
    assert equal(next(remote), next(local))  # closed, it goes on
    remote.close()
    assert not in_use(cfg)


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_after_an_error_the_next_batch_is_that_which_failed(
    path: Path, cfg: LoaderConfig, server: S3Server, backend: BackendName
) -> None:
    """In a notebook, where the cell is run again."""
    remote = Loader(replace(cfg, backend=backend, prefetch=3), images_per_input=2)
    local = in_the_order_of(remote, path, cfg)
    # More than the clumps that are fetched ahead, which are tried again at their turn.
    server.fault(".tar", refuse("403 Forbidden", "AccessDenied"), 20)
    failures, batches = 0, 0
    while batches < 40:
        try:
            batch = next(remote)
        except PermissionError:
            failures += 1
            assert remote.samples == 16 * batches and not in_use(cfg)
        else:
            assert equal(batch, next(local))
            batches += 1
    assert failures
    remote.close()


def test_a_run_goes_on_with_other_ranks_and_batches(path: Path, cfg: LoaderConfig) -> None:
    whole = Loader(cfg, images_per_input=2)
    ids = [next(whole).sample_id.numpy() for _ in range(12)]
    whole.close()
    taken = Loader(cfg, images_per_input=2)
    for _ in range(4):
        next(taken)
    state = taken.state_dict()
    taken.close()
    parts = [
        Loader(replace(cfg, batch_size=4), rank=rank, num_ranks=4, images_per_input=2)
        for rank in range(4)
    ]
    for loader in parts:
        loader.load_state_dict(state)
    for step in range(4, 12):
        batches = [next(loader) for loader in parts]
        positions = np.concatenate([batch.position.numpy() for batch in batches])
        found = np.concatenate([batch.sample_id.numpy() for batch in batches])
        assert (found[np.argsort(positions)] == ids[step]).all()
    for loader in parts:
        loader.close()
    other = Loader(replace(cfg, lanes=4), images_per_input=2)
    with pytest.raises(ValueError, match="order: expected .*lanes 8.*got .*lanes 4"):
        other.load_state_dict(state)


def test_an_evaluation_reads_through_the_cache_of_the_run(
    path: Path, cfg: LoaderConfig, server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its folder, its limits and its reads at the same time; the default folder is not made."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cfg = replace(
        cfg, buffer_gib=0.01, cache_gib=0.01, reads_in_flight=2
    )  # too few for 1,920 lanes
    options = {"image_size": 8, "batch_size": 100, "backend": "torch"}
    server.fault(".tar", slow(0.05), 4)
    remote = list(evaluation_batches(cfg.path, "train", bucket_fields_of=cfg, **options))
    assert server.most_in_flight == 2 and not in_use(cfg)
    stopped = evaluation_batches(cfg.path, "train", bucket_fields_of=cfg, **options)
    next(stopped)
    stopped.close()
    assert not in_use(cfg) and not (tmp_path / "home").exists()
    local = list(evaluation_batches(path, "train", **options))
    assert len(remote) == len(local) == 7
    assert all(equal(*pair) for pair in zip(remote, local, strict=True))
    for name in ("buffer_gib", "cache_gib"):
        less = replace(cfg, **{name: 1e-9})
        with pytest.raises(ValueError, match=f"data.{name}: expected at least"):
            evaluation_batches(cfg.path, "train", bucket_fields_of=less, **options)


def test_without_a_run_the_default_cache_is_used(
    cfg: LoaderConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    next(evaluation_batches(cfg.path, "train", image_size=8, batch_size=10, backend="torch"))
    assert (tmp_path / "home/.cache/m3i-fast/clumps/files").is_dir()


def test_splits_of_one_data_set_share_a_cache(
    cfg: LoaderConfig, url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each has a shard 0, and neither is taken for a damaged copy of the other."""
    pictures = [encode_image(smooth_picture(i, 8, 8)) for i in range(20)]
    splits = {
        "train": [sample(i, pictures[i]) for i in range(10)],
        "heldout": [sample(i, pictures[i]) for i in range(10, 20)],
    }
    path = write_dataset(tmp_path / "two", splits, info(), seed=0, samples_per_shard=10)
    push(path, f"{url}/two")
    options = {"image_size": 8, "batch_size": 10, "backend": "torch"}
    for _ in range(2):
        for split in splits:
            remote = evaluation_batches(Path(f"{url}/two"), split, bucket_fields_of=cfg, **options)
            local = evaluation_batches(path, split, **options)
            assert all(equal(*pair) for pair in zip(remote, local, strict=True))
    assert "is damaged" not in caplog.text
    assert len(list((cfg.cache_dir / "clumps/files").iterdir())) == 2


def test_pictures_and_a_digest_are_those_of_the_folder(path: Path, cfg: LoaderConfig) -> None:
    assert split_digest(folder_at(cfg), "train") == split_digest(path, "train")
    ids = [0, 7, 30]
    opened = [open_few(replace(cfg, path=place)) for place in (cfg.path, path)]
    ours, theirs = (pictures_of(data, ids, cfg.max_pixels) for data in opened)
    opened[0].shards.close()
    assert list(ours) == list(theirs) and set(ours) == set(ids)
    for sample_id, picture in ours.items():
        assert np.array_equal(picture, theirs[sample_id])


def test_threads_that_fetch_run_on_the_cores_of_the_loader(
    cfg: LoaderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("needs two cores")
    placement = Placement(frozenset(allowed[1:2]), "")
    monkeypatch.setattr(loader_module, "place_loader", lambda *_: placement)
    before = set(threading.enumerate())
    remote = Loader(cfg)
    next(remote)
    started = set(threading.enumerate()) - before
    fetching = [t for t in started if t.name.startswith("m3i-fetch")]
    cores = [os.sched_getaffinity(t.native_id) for t in fetching if t.native_id]
    assert cores and all(each == placement.cores for each in cores)
    remote.close()
