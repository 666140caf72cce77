"""The loader's peers do the work that ours does; all are timed, and their processor time told."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.benchmarks.loader import main as loader
from m3i_fast.benchmarks.loader import other_loaders as loader_peers
from m3i_fast.benchmarks.loader.main import Statistics, cpu_seconds, expect_same, local_views, look
from m3i_fast.benchmarks.loader.other_loaders import DECODERS, PILLOW, TENSORS, DecodeAlone, Views
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


def _sample(shards: Path) -> dict[str, bytes]:
    cfg = LoaderConfig(path=shards)
    numbers = {name: np.array([7], dtype=np.int64).tobytes() for name in ("cls", "sid", "gid")}
    tokens = np.array([5, 6], dtype=np.int32).tobytes()
    return {"jpg": loader_peers.read_encoded(cfg, 1)[0], "tok": tokens, **numbers}


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


def _views(level: float, num_images: int = 64, size: int = 8) -> Iterator[list[torch.Tensor]]:
    rng = torch.Generator().manual_seed(int(level))
    while True:
        noise = 20 * torch.randn(num_images, 3, size, size, generator=rng)
        yield [(noise + level).clamp(0, 255).to(torch.uint8)]


def _look(level: float, **kwargs: int) -> Statistics:
    return look(_views(level, **kwargs), 64)


def test_other_work_is_not_timed() -> None:
    ours = _look(120.0)
    expect_same(ours, _look(121.0), "as ours")
    with pytest.raises(RuntimeError, match="brighter: expected views of mean 0.4.*got 0.5"):
        expect_same(ours, _look(130.0), "brighter")
    with pytest.raises(RuntimeError, match=r"small: expected tensors of \[\[64, 3, 8, 8\]\], got"):
        expect_same(ours, _look(120.0, size=4), "small")


def test_processor_time_of_grandchildren_counts() -> None:
    before = cpu_seconds()
    command = ["sh", "-c", f'"{sys.executable}" -c "$0"; true', BURN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        spent = cpu_seconds() - before
        os.killpg(child.pid, signal.SIGKILL)
    assert 0.35 <= spent < 5.0


def test_decoders_decode_the_same_picture(shards: Path) -> None:
    encoded = loader_peers.read_encoded(LoaderConfig(path=shards), 3)
    assert len(encoded) == 3
    pillow, torchvision = (decode(encoded[0]) for decode in DECODERS.values())
    theirs = torch.from_numpy(np.array(pillow)).permute(2, 0, 1).float()  # type: ignore[arg-type]
    assert (theirs - torchvision.float()).abs().mean() < 2.0  # type: ignore[attr-defined]
    done: list[bytes] = []
    alone = DecodeAlone(encoded, done.append, 2)
    next(alone)
    alone.close()
    assert sorted(done) == sorted(encoded)


def test_what_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.num_threads: expected at most 4, the shards of"):
        loader_peers.peer(LoaderConfig(path=shards, num_threads=5), PILLOW)
    missing = loader.parse(["demo", "--data.path", str(tmp_path / "none")])
    with pytest.raises(FileNotFoundError, match="--data.path: no shards at .*--synthetic-data"):
        loader.shards_of(missing, tmp_path)
    (tmp_path / "mine").write_bytes(b"no directory that shards could be written to")
    file = loader.parse(["demo", "--data.path", str(tmp_path / "mine")])
    with pytest.raises(FileNotFoundError, match="make a new one: .* NEW_DIRECTORY"):
        read_manifest(loader.shards_of(file, tmp_path))


def test_local_views_are_the_recipes_or_dinos() -> None:
    demo, vit = recipes()["demo"]().data, recipes()["m3i_vit_b"]().data
    assert local_views(demo) is demo.local_views
    found = local_views(vit)
    assert (found.count, found.size, found.scale) == (8, 96, (0.05, 0.32))


def test_two_rows_are_measured_and_recorded(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ledger, "results_dir", lambda: tmp_path)
    options = "--windows 3 --window-seconds 0.15 --check-images 32 --data.batch-size 8 --device cpu"
    loader.main(
        [
            "demo",
            "--data.path",
            str(shards),
            *options.split(),
        ]
    )
    written = list(ledger.read_rows("loader", folder=tmp_path))
    views = [row["config"]["data"]["local_views"] for row in written]
    assert views[0] is None and views[1]["count"] == 2
    assert len({row["config_hash"] for row in written}) == 2
    rows = [row["figures"] for row in written]
    assert [row["local_views"] for row in rows] == ["none", "2 x 32"]
    names = {"m3i_fast", PILLOW, TENSORS, *DECODERS}
    for row in rows:
        rates = {name: rate["median"] for name, rate in row["images_per_s"].items()}
        assert rates.keys() == row["timings"].keys() == names
        for name, rate in rates.items():
            slower = row["times_slower_than_ours"][name]
            assert slower == pytest.approx(rates["m3i_fast"] / rate)
        floor = row["floor"]["decoder"]
        assert rates[floor] == max(rates[name] for name in DECODERS)
        cpu_s = row["cpu_s_per_image"]
        assert min(cpu_s.values()) >= 0.0 and cpu_s[PILLOW] > cpu_s["decode, Pillow"] / 2
        means = [found["mean"] for found in row["statistics"].values()]
        assert len(means) == 3 and max(means) - min(means) < 0.1
    printed = capsys.readouterr().out
    assert "2 x 64 + 2 x 32" in printed and "decode, torchvision" in printed
