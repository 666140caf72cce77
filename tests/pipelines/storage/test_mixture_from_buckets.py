"""Mixtures of data sets in buckets, behind https:// and in folders: order, bytes, room, resumes."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.dataset.pack import write_dataset
from m3i_fast.pipelines.loader import Loader
from m3i_fast.pipelines.opened.mixture import MAX_ID, MixedData, read_described
from m3i_fast.pipelines.opened.open_data import open_data
from m3i_fast.pipelines.sample_order import lanes
from m3i_fast.pipelines.storage import clumps, remote
from m3i_fast.pipelines.storage.objects import Bucket
from m3i_fast.pipelines.storage.remote import plan_remote
from m3i_fast.pipelines.storage.upload import push
from tests.pipelines.storage.packed import POLICY, table_of
from tests.shared.pipelines.data import encode_image, equal, info, sample, smooth_picture
from tests.shared.pipelines.s3_server import S3Server, slow

SIZES = (650, 290, 120)
WEIGHTS = (0.5, 0.3, 0.2)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three data sets; the pictures of no two of them are alike."""
    folder = tmp_path_factory.mktemp("members")

    def packed(number: int, size: int) -> Path:
        pictures = [encode_image(smooth_picture(40 * number + i, 8, 8)) for i in range(20)]
        samples = [sample(i, pictures[i % 20]) for i in range(size)]
        about = info(name=f"member {number}", class_names=("a", "b", f"c{number}"))
        return write_dataset(
            folder / str(number), {"train": samples}, about, seed=number, samples_per_shard=200
        )

    return [packed(number, size) for number, size in enumerate(SIZES)]


def parts(places: list[Path | str]) -> tuple[str, ...]:
    return tuple(f"{place}:train:{w}" for place, w in zip(places, WEIGHTS, strict=True))


@pytest.fixture
def local(paths: list[Path], tmp_path: Path) -> LoaderConfig:
    """All of them in folders."""
    return LoaderConfig(
        mixture=parts([*paths]),
        batch_size=16,
        global_views=ViewConfig(size=8),
        lanes=8,
        fetch_ahead=100,
        cache_dir=tmp_path / "cache",
        backend="torch",
        seed=3,
    )


def publish(url: str, server: S3Server) -> str:
    """Let everybody read a folder of a bucket; returns where a web server has it."""
    web = f"{server.address}/{url.removeprefix('s3://')}"
    signed = (
        "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request"  # moto checks none
    )
    headers = {"x-amz-acl": "public-read", "Authorization": signed}
    for name in Bucket(url, POLICY).list():
        allow = urllib.request.Request(f"{web}/{name}?acl", method="PUT", headers=headers)
        urllib.request.urlopen(allow).close()
    return web


def damage(path: Path, url: str, number: int) -> int:
    """Change a byte of a sample in the bucket of a data set; returns its id."""
    row = table_of(path).rows[number]
    bucket = Bucket(url, POLICY)
    shard = read_manifest(path).splits["train"].shards[row["shard"]].file
    content = bytearray(bucket.read(shard))
    content[int(row["offset"]) + 1] ^= 1
    bucket.put(shard, bytes(content))
    return int(row["sample_id"])


@pytest.fixture
def cfg(local: LoaderConfig, paths: list[Path], url: str, server: S3Server) -> LoaderConfig:
    """The first in a bucket, the second in a folder, the third behind a web server."""
    for number in (0, 2):
        push(paths[number], f"{url}/{number}")
    web = publish(f"{url}/2", server)
    server.clear()
    return replace(local, mixture=parts([f"{url}/0", paths[1], web]))


@pytest.fixture
def opened() -> Iterator[list[Loader]]:
    """Loaders that are closed at the end."""
    loaders: list[Loader] = []
    yield loaders
    for loader in loaders:
        loader.close()


def in_the_order_of(buckets: Loader, local: LoaderConfig) -> Loader:
    """A loader of the folders that takes the samples in the buckets' order."""
    loader = Loader(local, images_per_input=2)
    loader._open = replace(loader._open, lanes=buckets._open.lanes)
    return loader


def joined(batches: list[Batch]) -> list[torch.Tensor]:
    whole = [torch.cat(tensors) for tensors in zip(*(b.tensors() for b in batches), strict=True)]
    order = whole[-1].argsort()
    return [tensor[order] for tensor in whole]


def test_batches_equal_those_of_the_folders_by_the_weights(
    cfg: LoaderConfig, local: LoaderConfig, opened: list[Loader]
) -> None:
    """Bytes, labels and ids; after every input each data set is within 1 of its share; and each is
    passed over as a whole before a sample of it comes again."""
    loader = Loader(cfg, images_per_input=2)
    opened.append(loader)
    plain = in_the_order_of(loader, local)
    assert sorted(loader._open.lanes) == [0, 2]
    inputs: list[np.ndarray] = []
    taken: list[list[int]] = [[], [], []]
    for _ in range(100):
        batch = next(loader)
        assert equal(batch, next(plain))
        datasets, own = np.divmod(batch.sample_id.numpy(), MAX_ID)
        assert (datasets[::2] == datasets[1::2]).all()
        inputs.append(datasets[::2])
        for d, sample_id in zip(datasets.tolist(), own.tolist(), strict=True):
            taken[d].append(sample_id)
    counts = np.cumsum(np.concatenate(inputs)[:, None] == np.arange(3), axis=0)
    due = np.arange(1, len(counts) + 1)[:, None] * np.array([5, 3, 2])
    assert np.abs(10 * counts - due).max() <= 10
    for ids, size in zip(taken, SIZES, strict=True):
        assert len(ids) > size and sorted(ids[:size]) == list(range(size))


def test_any_ranks_batches_and_backends_take_the_same(
    cfg: LoaderConfig, opened: list[Loader]
) -> None:
    whole = Loader(replace(cfg, batch_size=32), images_per_input=2)
    opened.append(whole)
    expected = [next(whole) for _ in range(6)]
    for num_ranks, batch_size, accumulate in ((2, 16, 1), (4, 4, 2), (8, 4, 1)):
        ranks = [
            Loader(
                replace(cfg, batch_size=batch_size, backend="dali" if rank % 2 else "torch"),
                rank=rank,
                num_ranks=num_ranks,
                accumulate=accumulate,
                images_per_input=2,
            )
            for rank in range(num_ranks)
        ]
        opened += ranks
        for batch in expected:
            found = joined([next(loader) for loader in ranks for _ in range(accumulate)])
            for ours, theirs in zip(found, batch.tensors(), strict=True):
                assert torch.equal(ours, theirs)
        for loader in ranks:
            loader.close()


def test_a_run_goes_on_by_its_position_alone(cfg: LoaderConfig, opened: list[Loader]) -> None:
    """In other caches, on other ranks, with another batch; and other lanes are refused."""
    whole = Loader(replace(cfg, batch_size=2), images_per_input=2)
    opened.append(whole)
    state: dict[str, Any] | None = None
    rng = np.random.default_rng(0)
    for turn in range(5):
        num_ranks = int(rng.choice([1, 2, 4]))
        changed = replace(
            cfg,
            batch_size=2 * int(rng.integers(1, 5)),
            prefetch=int(rng.integers(1, 4)),
            fetch_ahead=int(rng.integers(1, 200)),
            cache_dir=cfg.cache_dir / str(turn % 2),
        )
        ranks = [
            Loader(changed, rank=rank, num_ranks=num_ranks, images_per_input=2)
            for rank in range(num_ranks)
        ]
        opened += ranks
        for loader in ranks if state is not None else ():
            loader.load_state_dict(state)
        for _ in range(int(rng.integers(1, 8))):
            found = joined([next(loader) for loader in ranks])
            expected = joined([next(whole) for _ in range(len(found[-1]) // 2)])
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        states = [json.loads(json.dumps(loader.state_dict())) for loader in ranks]
        assert all(other == states[0] for other in states)
        state = states[-1]
        assert state["samples"] == whole.samples
        for loader in ranks:
            loader.close()
    of_lanes = "1, mixed by 2; 0: lanes 8, window 1, images 2; 2: lanes 8, window 1, images 2"
    assert state is not None and state["order"] == of_lanes
    with pytest.raises(ValueError, match=r"order: expected '.*lanes 8.*got '.*lanes 4"):
        Loader(replace(cfg, lanes=4), images_per_input=2).load_state_dict(state)


def test_folders_alone_keep_their_order(local: LoaderConfig) -> None:
    """Runs on mixtures of folders go on: their state says what it said before."""
    assert Loader(local, images_per_input=2).state_dict()["order"] == "1, mixed by 2"


def test_a_corrupt_sample_is_replaced_by_one_of_its_own_data_set(
    cfg: LoaderConfig, local: LoaderConfig, paths: list[Path], tmp_path: Path, opened: list[Loader]
) -> None:
    """Alike on any ranks: its bytes were changed in the bucket after it was packed."""
    sample_id = damage(paths[0], str(cfg.members[0].path), 3)
    whole = Loader(replace(cfg, batch_size=32), images_per_input=2)
    ranks = [
        Loader(
            replace(cfg, batch_size=8, cache_dir=tmp_path / "other"),
            rank=rank,
            num_ranks=4,
            images_per_input=2,
            skipped_file=tmp_path / "skipped.jsonl",
        )
        for rank in range(4)
    ]
    opened += [whole, *ranks]
    plain = in_the_order_of(whole, replace(local, batch_size=32))
    differing = 0
    for _ in range(50):  # more than an epoch of the first
        batch, intact = next(whole), next(plain)
        found = joined([next(loader) for loader in ranks])
        assert all(torch.equal(a, b) for a, b in zip(found, batch.tensors(), strict=True))
        assert not (batch.sample_id == sample_id).any()
        changed = batch.sample_id != intact.sample_id
        assert (intact.sample_id[changed] == sample_id).all()
        assert (batch.sample_id // MAX_ID == intact.sample_id // MAX_ID).all()
        differing += int(changed.sum())
    assert differing >= 1
    files = sorted(tmp_path.glob("skipped*.jsonl"))
    told = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert told and {line["sample_id"] for line in told} == {sample_id}


def test_an_error_names_the_data_set_of_the_sample(
    cfg: LoaderConfig, paths: list[Path], url: str, server: S3Server, opened: list[Loader]
) -> None:
    sample_id = damage(paths[2], f"{url}/2", 0)
    web = publish(f"{url}/2", server)
    loader = Loader(replace(cfg, strict=True), images_per_input=2)
    opened.append(loader)
    told = rf"sample {2 * MAX_ID + sample_id} .*m3i-fast data verify --decode {web}$"
    with pytest.raises(RuntimeError, match=told):
        for _ in range(100):
            next(loader)


def held_bytes(cfg: LoaderConfig) -> int:
    """What the readers of the cache hold open now, its locks left out."""
    users = cfg.cache_dir / "clumps/users"
    held = 0
    for file in users.glob("*/*"):
        if file.name != "lock":
            with suppress(FileNotFoundError):  # let go of since it was listed
                held += file.stat().st_size
    return held


def test_the_room_is_that_of_all_data_sets_together(
    cfg: LoaderConfig, opened: list[Loader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is checked as a sum before the run, which then holds no more."""
    cfg = replace(cfg, lanes=2, batch_size=2, prefetch=1, fetch_ahead=16)
    described = read_described(cfg)
    assert isinstance(described, MixedData)
    plans = [
        plan_remote(
            cfg.members[number], images_per_input=2, mixture=described.mixture, dataset=number
        )
        for number in (0, 2)
    ]
    needed = [int(plan.needed_bytes().max()) for plan in plans]
    for name in ("buffer_gib", "cache_gib"):
        with pytest.raises(ValueError, match=f"data.{name}: expected at least .*data.lanes"):
            Loader(replace(cfg, **{name: 1e-9}), images_per_input=2)
    checked: list[int] = []
    monkeypatch.setattr(remote, "check_buffer", lambda room, **_: checked.append(room))
    loader = Loader(cfg, images_per_input=2)
    opened.append(loader)
    assert checked == [sum(needed)]
    most = 0
    for _ in range(700):
        next(loader)
        most = max(most, held_bytes(cfg))
    assert needed[0] < most <= sum(needed)


def test_reads_in_flight_are_those_of_all_data_sets(
    cfg: LoaderConfig, server: S3Server, opened: list[Loader]
) -> None:
    loader = Loader(replace(cfg, reads_in_flight=3, fetch_ahead=1_000), images_per_input=2)
    opened.append(loader)
    server.clear()
    server.fault(".tar", slow(0.05), 12)
    next(loader)
    loader.close()
    assert server.most_in_flight == 3


def test_lanes_have_to_fit_the_ranks_in_every_bucket(cfg: LoaderConfig) -> None:
    with pytest.raises(ValueError, match=r"s3://.*/0: data.lanes: .*ranks, 3, got 8"):
        Loader(cfg, num_ranks=3)
    with pytest.raises(ValueError, match="data.lanes: .*ranks, 2, got 1;"):
        open_data(replace(cfg, lanes=None), num_ranks=2)  # few clumps: one lane by itself


def test_lanes_that_a_mixture_is_told_fit_its_largest_data_set(
    cfg: LoaderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the small one that the ranks do not fit, whose lanes would be too few for the other."""
    monkeypatch.setattr(lanes, "_CLUMPS_A_LANE", 1)  # 6 and 1 lanes
    with pytest.raises(ValueError, match=r"ranks, 4, got .*; use 1 ranks, or --data.lanes 8,"):
        open_data(replace(cfg, lanes=None), num_ranks=4)


def test_a_mixture_is_described_from_its_urls(cfg: LoaderConfig, local: LoaderConfig) -> None:
    described = read_described(cfg)
    assert isinstance(described, MixedData)
    assert described.class_names == ("a", "b", "c0", "c1", "c2")
    assert described.digest == read_described(local).digest
    missing = replace(cfg, mixture=(*cfg.mixture, f"{cfg.mixture_parts[0].path}/none:train:1"))
    with pytest.raises(FileNotFoundError, match="none/manifest.json: not found"):
        read_described(missing)


def test_closed_it_holds_nothing_and_goes_on(cfg: LoaderConfig, opened: list[Loader]) -> None:
    whole, loader = Loader(cfg, images_per_input=2), Loader(cfg, images_per_input=2)
    opened += [whole, loader]
    for _ in range(3):
        assert equal(next(loader), next(whole))
    users = cfg.cache_dir / "clumps/users"
    before = len(list(users.iterdir()))
    loader.close()
    assert len(list(users.iterdir())) == before - 2  # of the two that lie in buckets
    assert equal(next(loader), next(whole))


def test_ctrl_c_while_it_is_closed_leaves_no_clump_behind(
    cfg: LoaderConfig, opened: list[Loader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The threads, which all data sets share, are stopped by the first of them."""
    whole = Loader(cfg, images_per_input=2)
    loader = Loader(replace(cfg, cache_dir=cfg.cache_dir / "own"), images_per_input=2)
    opened += [whole, loader]
    assert equal(next(loader), next(whole))

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(clumps, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loader.close()
    assert not list((cfg.cache_dir / "own/clumps/users").iterdir())
    for _ in range(5):
        assert equal(next(loader), next(whole))
