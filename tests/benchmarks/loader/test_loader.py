"""The loader's peers do the work that ours does; all are timed, with what the host spends."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.benchmarks.loader import main as loader
from m3i_fast.benchmarks.loader import measuring
from m3i_fast.benchmarks.loader.bucket import in_bucket
from m3i_fast.benchmarks.loader.decoders import DECODERS, DecodeAlone
from m3i_fast.benchmarks.loader.main import local_views, with_views
from m3i_fast.benchmarks.loader.measuring import (
    Statistics,
    expect_same,
    look,
    spent,
    wait_until_idle,
)
from m3i_fast.benchmarks.loader.peers import PEERS, Peer
from m3i_fast.benchmarks.loader.work import (
    PILLOW,
    TENSORS,
    StoredSamples,
    Views,
    Work,
    picture_of,
)
from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.sources import synthetic
from m3i_fast.recipes import recipes

PLAIN = ViewConfig(size=32, jitter_probability=0.0, gray_probability=0.0)
BURN = "import time\nwhile time.process_time() < 0.4: pass\nprint(flush=True)\ntime.sleep(60)"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "shards"
    return synthetic.build(out, num_samples=16, size_hw=(60, 80), samples_per_shard=4)


def work_of(shards: Path, **changes: object) -> Work:
    cfg = LoaderConfig(path=shards, batch_size=4, num_threads=2, global_views=PLAIN)
    cfg = replace(cfg, **changes)  # type: ignore[arg-type]
    return Work.of(cfg, shuffle_buffer=8, device_id=None)


def _sample(shards: Path) -> dict[str, bytes]:
    numbers = {name: np.array([7], dtype=np.int64).tobytes() for name in ("cls", "sid", "gid")}
    tokens = np.array([5, 6], dtype=np.int32).tobytes()
    stored = StoredSamples(work_of(shards).shards)
    return {"jpg": picture_of(stored[0]), "tok": tokens, **numbers}


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_peers_view_is_its_box_resized_by_pillow(flip: float, shards: Path) -> None:
    sample, view = _sample(shards), replace(PLAIN, flip_probability=flip)
    *found, boxes, size, token_ids, num_tokens, label, _, _ = Views((view,), PILLOW, 4)(sample)
    assert len(found) == 2 and size.tolist() == [60.0, 80.0]
    assert (token_ids.tolist(), num_tokens, label) == ([5, 6, 0, 0], 2, 7)
    image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
    for tensor, (top, left, height, width, flipped) in zip(found, boxes.tolist(), strict=True):
        cut = image.crop((left, top, left + width, top + height)).resize((32, 32), Image.BICUBIC)
        expected = torch.from_numpy(np.array(cut)).permute(2, 0, 1)
        assert flipped == flip
        assert torch.equal(tensor, expected.flip(2) if flip else expected)
        assert 0.3 * 0.9 <= width * height / 4800 <= 1.0


def test_tensors_give_about_what_pillow_gives(shards: Path) -> None:
    """The same crop of the same picture: another decoder's rounding, another resampling's."""
    sample, found = _sample(shards), {}
    for kind in (PILLOW, TENSORS):
        torch.manual_seed(3)
        found[kind] = Views((replace(PLAIN, flip_probability=0.0),), kind, 4)(sample)
    assert torch.equal(found[PILLOW][2], found[TENSORS][2])  # boxes
    difference = found[PILLOW][0].float() - found[TENSORS][0].float()
    assert difference.abs().mean() < 2.0


def test_colours_change_as_often_as_the_recipe_says(shards: Path) -> None:
    sample = _sample(shards)
    always = ViewConfig(size=32, count=1, gray_probability=1.0, blur_probability=1.0)
    for kind in (PILLOW, TENSORS):
        view = Views((always,), kind, 4)(sample)[0]
        assert torch.equal(view[0], view[1]) and torch.equal(view[1], view[2])
        coloured = Views((replace(always, gray_probability=0.0),), kind, 4)(sample)[0]
        assert not torch.equal(coloured[0], coloured[2])
        inverted = replace(PLAIN, count=1, solarize_probability=1.0)
        assert int(Views((inverted,), kind, 4)(sample)[0].max()) <= 128


def test_samples_are_read_by_number_in_any_process(shards: Path) -> None:
    stored = StoredSamples(work_of(shards).shards)
    import webdataset

    theirs = list(webdataset.WebDataset(list(map(str, stored.shards)), shardshuffle=False))
    assert len(stored) == len(theirs) == 16
    for ours, other in zip([stored[i] for i in range(16)], theirs, strict=True):
        assert ours == {name: other[name] for name in ours} and {"jpg", "sid"} <= ours.keys()
    again = pickle.loads(pickle.dumps(stored))
    assert again[11] == stored[11]


@pytest.mark.parametrize("name", PEERS)
def test_each_peer_loads_every_sample_as_ours_does(name: str, shards: Path) -> None:
    if PEERS[name].absence:
        pytest.skip(PEERS[name].absence)
    data = LoaderConfig(
        path=shards,
        batch_size=4,
        num_threads=1 if name == "Grain" else 2,  # a process takes seconds to start
        global_views=PLAIN,
        local_views=replace(PLAIN, count=2, size=16, blur_probability=0.5, jitter_probability=0.5),
    )
    samples = dict(_ids(shards))
    batches = PEERS[name].batches(Work.of(data, shuffle_buffer=8, device_id=None))
    seen: dict[int, int] = {}
    for _ in range(24):
        *views, boxes, size, tokens, num_tokens, label, sample_id, group_id = next(batches)
        assert [list(v.shape) for v in views] == 2 * [[4, 3, 32, 32]] + 2 * [[4, 3, 16, 16]]
        assert {v.dtype for v in views} == {torch.uint8}
        assert boxes.shape == (4, 4, 5) and size.tolist() == 4 * [[60.0, 80.0]]
        assert (boxes[..., 0] + boxes[..., 2] <= 60).all() and (boxes[..., 2] > 1).all()
        assert len(tokens) == len(num_tokens) == len(group_id) == 4
        seen |= dict(zip(sample_id.tolist(), label.tolist(), strict=True))
    assert seen == samples
    if hasattr(batches, "close"):
        batches.close()


def _ids(shards: Path) -> Iterator[tuple[int, int]]:
    stored = StoredSamples(work_of(shards).shards)
    for i in range(len(stored)):
        sample = stored[i]
        sample_id, label = (int(np.frombuffer(sample[n], np.int64)[0]) for n in ("sid", "cls"))
        yield sample_id, label


def test_a_peer_that_is_not_installed_is_named() -> None:
    absent = Peer(iter, "no_such_package.inner", lambda _: 1)  # type: ignore[arg-type]
    assert "no_such_package.inner is not installed: pip install 'm3i-fast[bench-data]'" in (
        absent.absence
    )


def _views(level: float, num_images: int = 64, size: int = 8) -> Iterator[list[torch.Tensor]]:
    rng = torch.Generator().manual_seed(int(level))
    while True:
        noise = 20 * torch.randn(num_images, 3, size, size, generator=rng)
        yield [(noise + level).clamp(0, 255).to(torch.uint8)]


def _look(level: float, **kwargs: int) -> Statistics:
    return look(_views(level, **kwargs), 64)


def test_other_work_is_not_timed() -> None:
    ours = _look(120.0)
    assert ours.bytes_per_image == 3 * 8 * 8
    expect_same(ours, _look(121.0), "as ours")
    with pytest.raises(RuntimeError, match="brighter: expected views of mean 0.4.*got 0.5"):
        expect_same(ours, _look(130.0), "brighter")
    with pytest.raises(RuntimeError, match=r"small: expected tensors of \[\[64, 3, 8, 8\]\], got"):
        expect_same(ours, _look(120.0, size=4), "small")


def test_what_grandchildren_spend_counts(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(3_000_000))
    before = spent()
    script = f"open({str(tmp_path / 'file')!r}, 'rb').read()\n{BURN}"
    command = ["sh", "-c", f'"{sys.executable}" -c "$0"; true', script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        after = spent()
        os.killpg(child.pid, signal.SIGKILL)
    assert 0.35 <= after["cpu_s"] - before["cpu_s"] < 5.0
    assert 3e6 <= after["read_bytes"] - before["read_bytes"] < 2e7


def test_a_window_waits_for_the_work_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    burn = BURN.partition("time.sleep")[0]
    script = f"print(flush=True)\n{burn}\nimport sys; sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdin is not None
        child.stdout.readline()
        wait_until_idle()
        os.set_blocking(child.stdout.fileno(), False)
        assert child.stdout.read() == b"\n"  # written after its work
        child.stdin.close()
    monkeypatch.setattr(measuring, "IDLE_LIMIT_S", 0.3)
    with (
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child,
        pytest.raises(RuntimeError, match="got one at work; leave it out by --peers"),
    ):
        try:
            wait_until_idle()
        finally:
            child.kill()


def test_decoders_decode_the_same_picture(shards: Path) -> None:
    from m3i_fast.benchmarks.loader.work import decode_pillow, decode_torchvision

    encoded = StoredSamples(work_of(shards).shards).encoded(3)
    assert len(encoded) == 3
    ours = torch.from_numpy(np.array(decode_pillow(encoded[0]))).permute(2, 0, 1).float()
    assert (ours - decode_torchvision(encoded[0]).float()).abs().mean() < 2.0
    for name, decoder in DECODERS.items():
        assert decoder.is_installed, name
        done = next(DecodeAlone(decoder.make(encoded, 2)))
        assert done == []
        broken = decoder.make([b"\xff\xd8 no picture"], 1)
        if name != "decode, nvImageCodec":  # which returns None of what it cannot decode
            with pytest.raises((RuntimeError, OSError)):
                broken()


def test_what_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.num-threads: expected at most 4, the shards, since"):
        PEERS["webdataset"].batches(work_of(shards, num_threads=5))
    with pytest.raises(ValueError, match=r"--peers: expected some of .*got \['DALY'\]"):
        loader.Config(peers=("Grain", "DALY"))
    indexed = Path(shutil.copytree(shards, tmp_path / "indexed")) / "manifest.json"
    raw = json.loads(indexed.read_text())
    indexed.write_text(json.dumps(raw | {"settings": {"indexed": {}}}))
    with pytest.raises(ValueError, match="--data.path: expected shards of `m3i-fast data pack`"):
        work_of(indexed.parent)
    missing = loader.parse(["demo", "--data.path", str(tmp_path / "none")])
    with pytest.raises(FileNotFoundError, match="--data.path: no shards at .*--synthetic-data"):
        loader.shards_of(missing, tmp_path)
    (tmp_path / "mine").write_bytes(b"no directory that shards could be written to")
    file = loader.parse(["demo", "--data.path", str(tmp_path / "mine")])
    with pytest.raises(FileNotFoundError, match="m3i-fast data pack .*mine .*mine-packed"):
        read_manifest(loader.shards_of(file, tmp_path))


def test_shards_are_copied_to_memory_and_removed(
    shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loader, "MEMORY", tmp_path)
    with ExitStack() as stack:
        copy = loader.placed(shards, "memory", stack)
        assert copy.is_relative_to(tmp_path) and read_manifest(copy) == read_manifest(shards)
        assert loader.placed(shards, "page_cache", stack) == shards
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 9}))
    with ExitStack() as stack, pytest.raises(OSError, match="--sources memory: .* free .* got 9;"):
        loader.placed(shards, "memory", stack)


def test_views_of_the_rows() -> None:
    demo, vit = recipes()["demo"]().data, recipes()["m3i_vit_b"]().data
    assert local_views(demo) is demo.local_views
    found = local_views(vit)
    assert (found.count, found.size, found.scale) == (8, 96, (0.05, 0.32))
    one, whole, local = (with_views(vit, views) for views in ("one", "global", "local"))  # type: ignore[arg-type]
    assert (one.global_views.count, one.local_views) == (1, None)
    assert (whole.global_views.count, whole.local_views) == (2, None)
    assert local.local_views == found


def test_rows_are_measured_and_recorded(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ledger, "results_dir", lambda: tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    absent = replace(PEERS["SPDL"], package="no_such_package")
    monkeypatch.setitem(PEERS, "SPDL", absent)
    options = "--windows 3 --window-seconds 0.1 --check-images 32 --data.batch-size 8 --device cpu"
    peers = ["--peers", "torchvision, tensors", "SPDL", "DALI's operators"]
    rows_asked = ["--views", "one", "local", "--shuffle-buffer", "8"]
    loader.main(["demo", "--data.path", str(shards), *options.split(), *peers, *rows_asked])
    written = list(ledger.read_rows("loader", folder=tmp_path))
    assert written[1]["config"]["data"]["local_views"]["count"] == 2
    rows = [row["figures"] for row in written]
    assert [row["global_views"] for row in rows] == ["1 x 64", "2 x 64"]
    assert [row["local_views"] for row in rows] == ["none", "2 x 32"]
    names = {"m3i_fast", "m3i_fast, torch", "torchvision, tensors", "DALI's operators", *DECODERS}
    for row in rows:
        rates = {name: rate["median"] for name, rate in row["images_per_s"].items()}
        assert rates.keys() == row["timings"].keys() == names
        for name, rate in rates.items():
            slower = row["times_slower_than_ours"][name]
            assert slower == pytest.approx(rates["m3i_fast"] / rate)
        floor = row["floor"]["decoder"]
        assert rates[floor] == max(rates[name] for name in DECODERS)
        cpu_s, read = row["cpu_s_per_image"], row["read_bytes_per_image"]
        assert min(cpu_s.values()) >= 0.0
        assert cpu_s["torchvision, tensors"] > cpu_s["decode, Pillow"] / 2
        assert read["torchvision, tensors"] > 1000  # a picture's bytes
        means = [found["mean"] for found in row["statistics"].values()]
        assert len(means) == 4 and max(means) - min(means) < 0.1
        assert row["left_out"].keys() == {"SPDL"}
    small = 2 * 4 + 24 * 4 + 4 * 8  # image_size, token ids, numbers
    assert rows[0]["host_bytes_per_image"] == pytest.approx(3 * 64**2 + 5 * 4 + small, abs=300)
    printed = capsys.readouterr().out
    assert "2 x 64 + 2 x 32 " in printed and "decode, nvImageCodec" in printed
    assert "left out: SPDL: no_such_package is not installed" in " ".join(printed.split())


def test_a_bucket_is_read_again_in_every_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = synthetic.build(
        tmp_path / "set", num_samples=160, size_hw=(40, 40), samples_per_shard=4
    )
    monkeypatch.setattr(ledger, "results_dir", lambda: tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    options = "--windows 3 --window-seconds 0.1 --check-images 32 --data.prefetch 1 --device cpu"
    peers = ["--peers", "torchvision, tensors", "webdataset", "DALI's operators"]
    asked = ["--sources", "bucket", "--views", "one", "--data.num-threads", "1"]
    command = ["demo", "--data.path", str(small), *options.split(), *peers, *asked]
    with pytest.raises(ValueError, match="--sources bucket: expected shards of .* 3 times what"):
        loader.main([*command, "--data.batch-size", "64"])
    loader.main([*command, "--data.batch-size", "2"])
    (written,) = ledger.read_rows("loader", folder=tmp_path)
    row = written["figures"]
    assert written["config"]["data"]["lanes"] == 1
    assert row["source"] == "bucket" and row["left_out"] == {
        "DALI's operators": "it reads files alone"
    }
    assert row["images_per_s"].keys() >= {"m3i_fast", "torchvision, tensors", "webdataset"}
    stored = StoredSamples(work_of(small).shards).encoded(160)
    mean = sum(map(len, stored)) / len(stored)
    assert row["read_bytes_per_image"]["m3i_fast"] > mean / 2  # also on disk, from its cache
    assert "1 x 64, bucket" in capsys.readouterr().out
    assert not measuring.NOT_COUNTED


def test_samples_of_a_bucket_are_those_of_the_files(shards: Path) -> None:
    with in_bucket(LoaderConfig(path=shards, batch_size=1, prefetch=1), turnover=0) as (ours, url):
        assert str(ours.path).startswith("s3:") and ours.cache_gib < 1e-3
        files = StoredSamples(work_of(shards).shards)
        objects = StoredSamples(work_of(shards).shards, url)
        assert [files[i] for i in range(16)] == [objects[i] for i in range(16)]
