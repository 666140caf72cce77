"""Features lie in files: cached by what they depend on, resumed, alike for any number of ranks."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from m3i_fast.engine.parallel.ranks import World
from m3i_fast.measuring import features
from m3i_fast.measuring.encoders.encoder import EncoderSettings
from m3i_fast.measuring.encoders.opening import open_encoder
from m3i_fast.measuring.features import (
    ExtractionSettings,
    SplitFeatures,
    extract,
    feature_folder,
    num_rows,
)
from m3i_fast.measuring.source import Source, SourceSettings, read_source
from tests.measuring.pictures import clip_folder, image_folder, picture

ONE = World(torch.device("cpu"))
OPENED = EncoderSettings(device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "PIECE_ROWS", 5)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Eighteen pictures, of which one is broken, with captions, of which some are equal."""
    rows = ["file,caption,caption2,label"]
    for i in range(18):
        picture((10 * i, 80, 200), i).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,picture {i // 2},{'another' if i % 3 else ''},{'ab'[i % 2]}")
    (tmp_path / "7.png").write_bytes((tmp_path / "7.png").read_bytes()[:90])
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    return read_source(
        SourceSettings(
            path=tmp_path / "table.csv",
            caption_columns=("caption", "caption2"),
            label_column="label",
            split="train",
            cache_dir=tmp_path / "cache",
        )
    )


class Counting:
    """An encoder that counts what it is asked for."""

    def __init__(self, spec: str) -> None:
        self.encoder = open_encoder(spec, OPENED)
        self.pictures, self.texts = 0, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.encoder, name)

    def encode_pictures(self, pictures: Tensor) -> dict[str, Tensor]:
        self.pictures += len(pictures)
        return self.encoder.encode_pictures(pictures)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        self.texts += len(texts)
        return self.encoder.encode_texts(texts)


@pytest.fixture
def encoder(tmp_path: Path) -> Counting:
    return Counting(f"open_clip:{clip_folder(tmp_path / 'clip')}")


def settings_of(tmp_path: Path, name: str = "cache", workers: int = 0) -> ExtractionSettings:
    return ExtractionSettings(cache_dir=tmp_path / name, batch_size=3, workers=workers)


def run(
    encoder: Counting, source: Source, settings: ExtractionSettings, world: World = ONE
) -> SplitFeatures:
    return extract(encoder, source, source.measured, world, settings)  # type: ignore[arg-type]


def test_rows_are_those_of_the_pictures_and_captions(
    encoder: Counting, source: Source, tmp_path: Path
) -> None:
    found = run(encoder, source, settings_of(tmp_path))
    valid = found.column("valid")
    assert np.flatnonzero(~valid).tolist() == [7]
    assert list(found.faults) == ["7.png"] and "corrupt" in found.faults["7.png"]
    assert found.column("label").tolist() == [-1 if i == 7 else i % 2 for i in range(18)]
    caption_row = found.column("caption_row")
    assert 7 not in caption_row
    kept = [i for i, row in enumerate(source.measured.caption_row) if row != 7]
    texts = [source.measured.captions[i] for i in kept]
    assert len(set(texts)) < len(texts) == len(caption_row)
    expected = encoder.encoder.encode_texts(texts)
    rows = np.arange(len(texts))
    np.testing.assert_allclose(found.rows("text")[rows], expected, atol=1e-5)
    same = [i for i, text in enumerate(texts) if text == "another"]
    assert len(np.unique(found.rows("text")[np.array(same)], axis=0)) == 1  # bit for bit
    for row in (0, 6, 17):
        opened = Image.open(tmp_path / f"{row}.png")
        one = encoder.encoder.encode_pictures(encoder.encoder.transform(opened)[None])
        for name in found.names:
            np.testing.assert_allclose(found.rows(name)[row : row + 1], one[name], atol=1e-5)
    assert not found.rows("mean_1")[7:8].any()
    assert len(np.unique(found.column("picture"), axis=0)) == 18


def test_a_second_start_computes_nothing(encoder: Counting, source: Source, tmp_path: Path) -> None:
    run(encoder, source, settings_of(tmp_path))
    assert (encoder.pictures, encoder.texts) == (17, 10)  # nine texts and "another"
    run(encoder, source, settings_of(tmp_path))
    assert (encoder.pictures, encoder.texts) == (17, 10)
    other = replace(source, digest="0")
    folders = {
        feature_folder(encoder, one, source.measured, settings_of(tmp_path))  # type: ignore[arg-type]
        for one in (source, other)
    }
    assert len(folders) == 2


def test_a_killed_start_goes_on_at_its_pieces(
    encoder: Counting, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(encoder, source, settings_of(tmp_path, "whole"))
    encoder.pictures = 0

    def stop(pictures: Tensor) -> dict[str, Tensor]:
        if encoder.pictures >= 7:
            raise KeyboardInterrupt
        encoder.pictures += len(pictures)
        return encoder.encoder.encode_pictures(pictures)

    monkeypatch.setattr(encoder, "encode_pictures", stop)
    with pytest.raises(KeyboardInterrupt):
        run(encoder, source, settings_of(tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(features, "PIECE_ROWS", 5)
    assert encoder.pictures == 7
    again = run(encoder, source, settings_of(tmp_path))
    assert encoder.pictures == 7 + 12  # the first piece of five was whole
    assert_same(whole, again)
    assert not [*again.folder.parent.glob("*.pieces")]


def test_two_ranks_write_the_files_of_one(
    encoder: Counting, source: Source, tmp_path: Path
) -> None:
    alone = run(encoder, source, settings_of(tmp_path, "alone", workers=2))
    encoder.pictures = 0
    for rank in (1, 0):  # the first joins the pieces of both
        world = World(torch.device("cpu"), rank=rank, size=2)
        both = run(encoder, source, settings_of(tmp_path, "both"), world)
    assert encoder.pictures == 17
    assert_same(alone, both)


def test_a_rank_that_sees_no_other_says_so(
    encoder: Counting, source: Source, tmp_path: Path
) -> None:
    world = World(torch.device("cpu"), rank=0, size=2)
    with pytest.raises(ValueError, match="--cache-dir: expected a folder that all ranks see"):
        run(encoder, source, settings_of(tmp_path), world)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_fails_stops_and_is_not_kept(
    workers: int, encoder: Counting, source: Source, tmp_path: Path
) -> None:
    (tmp_path / "12.png").rename(tmp_path / "away")
    with pytest.raises(OSError, match="12.png: cannot be read: No such file.*start again"):
        run(encoder, source, settings_of(tmp_path, workers=workers))
    (tmp_path / "away").rename(tmp_path / "12.png")
    assert list(run(encoder, source, settings_of(tmp_path)).faults) == ["7.png"]


def test_broken_pictures_alone_are_refused(encoder: Counting, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", each=2)
    for file in folder.rglob("*.png"):
        file.write_bytes(file.read_bytes()[:80])
    broken = read_source(SourceSettings(path=folder, cache_dir=tmp_path / "cache"))
    with pytest.raises(ValueError, match="heldout: expected a picture that can be decoded, got no"):
        run(encoder, broken, settings_of(tmp_path))


def test_features_that_are_not_finite_are_refused(
    encoder: Counting, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(pictures: Tensor) -> dict[str, Tensor]:
        return {"mean_1": torch.full((len(pictures), 3), torch.nan)}

    monkeypatch.setattr(encoder, "encode_pictures", broken)
    with pytest.raises(ValueError, match="mean_1: expected finite features, got NaN"):
        run(encoder, source, settings_of(tmp_path))


def test_texts_that_are_not_finite_are_refused(
    encoder: Counting, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        encoder, "encode_texts", lambda texts: torch.full((len(texts), 3), torch.inf)
    )
    with pytest.raises(ValueError, match="text: expected finite features, got NaN"):
        run(encoder, source, settings_of(tmp_path))


def assert_same(first: SplitFeatures, second: SplitFeatures) -> None:
    files = sorted(file.name for file in first.folder.iterdir())
    assert files == sorted(file.name for file in second.folder.iterdir())
    assert len(files) == 16
    for name in files:
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes(), name
    shutil.rmtree(second.folder)


def test_a_second_start_waits_for_the_first(
    encoder: Counting, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at once: the second begins within the first, waits, and computes nothing."""
    others: list[Thread] = []
    found: list[SplitFeatures] = []

    def second() -> None:
        found.append(run(encoder, source, settings_of(tmp_path)))

    def encode(pictures: Tensor) -> dict[str, Tensor]:
        if not others:
            others.append(Thread(target=second))
            others[0].start()
            others[0].join(0.5)  # long enough to have begun, were nothing to wait for
        encoder.pictures += len(pictures)
        return encoder.encoder.encode_pictures(pictures)

    monkeypatch.setattr(encoder, "encode_pictures", encode)
    run(encoder, source, settings_of(tmp_path))
    others[0].join()
    assert encoder.pictures == 17 and len(found) == 1


def test_progress_ends_at_the_rows_of_the_rank(
    encoder: Counting, source: Source, tmp_path: Path
) -> None:
    """Eighteen rows in pieces of five: 5 + 5 of the first of two ranks, 5 + 3 of the second."""
    starts = (("new", 2, (1, 1, 0)), ("new", 2, (1, 0)), ("of one", 1, (0,)))
    for name, size, ranks in starts:  # in pieces that are not there, are, and of a whole
        for rank in ranks:
            world = World(torch.device("cpu"), rank=rank, size=size)
            done: list[int] = []
            settings = settings_of(tmp_path, name)
            extract(encoder, source, source.measured, world, settings, done.append)  # type: ignore[arg-type]
            assert sum(done) == num_rows(source.measured, world)
    assert [num_rows(source.measured, World(ONE.device, rank=r, size=2)) for r in (0, 1)] == [10, 8]


def test_an_array_of_a_piece_is_read_once(
    encoder: Counting, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for that which the widths are told by, of the first piece."""
    read: list[str] = []
    original = np.lib.npyio.NpzFile.__getitem__

    def counted(self: np.lib.npyio.NpzFile, key: str) -> object:
        read.append(key)
        return original(self, key)

    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", counted)
    run(encoder, source, settings_of(tmp_path))
    assert read.count("mean_1") == 4 + 1 and read.count("mean_4") == 4 + 1
