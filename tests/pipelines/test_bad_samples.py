"""Samples that are marked as bad, or turn out to be: what takes their place, and who is told."""

from __future__ import annotations

import json
import logging
import shutil
import struct
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m3i_fast.config.data import LoaderConfig
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.dataset.sample_table import BAD, NO_CRC, ROW, write_table
from m3i_fast.pipelines.graph import dali_backend
from m3i_fast.pipelines.loader import Loader, evaluation_batches
from tests.shared.pipelines.data import (
    EVERYTHING,
    edit_manifest,
    encode_image,
    equal,
    pack,
    repack,
    sample,
    smooth_picture,
    take,
)

JPEG = encode_image(smooth_picture(0, 80, 90), "JPEG", quality=95)
Change = Callable[[bytearray, int], None]  # (the shard, where the sample begins)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "data"
    return pack(path, [sample(i, JPEG) for i in range(24)], samples_per_shard=6)


@pytest.fixture
def path(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "data"))


def config(path: Path, **changes: Any) -> LoaderConfig:
    return replace(LoaderConfig(path=path, batch_size=6, global_views=EVERYTHING), **changes)


def spoil(path: Path, sample_id: int, change: Change) -> None:
    """Damage a sample where it lies; after it was opened, which looks at headers."""
    table = np.fromfile(path / "train.samples", ROW)
    (index,) = np.flatnonzero(table["sample_id"] == sample_id)
    shard = path / read_manifest(path).splits["train"].shards[table[index]["shard"]].file
    content = bytearray(shard.read_bytes())
    change(content, int(table[index]["offset"]))
    shard.write_bytes(content)


def rewrite(path: Path, change: Callable[[Any], None]) -> None:
    """Change the table, with a digest that is right."""
    table = np.fromfile(path / "train.samples", ROW)
    change(table)
    made = asdict(write_table(path / "train.samples", [table]))
    edit_manifest(path, lambda raw: raw["splits"]["train"].update(table=made))


def without_checksums(path: Path) -> None:
    """As of data of a format before tables."""

    def forget(table: Any) -> None:
        table["flags"] |= NO_CRC

    rewrite(path, forget)


def no_header(content: bytearray, start: int) -> None:
    content[start + 512 : start + 522] = b"no picture"


def other_member(content: bytearray, start: int) -> None:
    content[start + 1] ^= 1  # of its name, which the header's checksum covers


def one_bit(content: bytearray, start: int) -> None:
    content[start + 512 + len(JPEG) // 2] ^= 1  # of entropy-coded pixels, which decode all the same


DAMAGE = {
    "checksum": (one_bit, True, r"expected bytes of CRC-32C \d+, got \d+"),
    "picture": (
        no_header,
        False,
        "expected JPEG, PNG or WebP data|expected PNG, JPEG or WebP data",
    ),
    "tar": (other_member, False, "tar"),
}


@pytest.mark.parametrize("backend", ["dali", "torch"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_strict_names_the_sample_and_the_file(path: Path, kind: str, backend: str) -> None:
    change, has_checksums, message = DAMAGE[kind]
    if not has_checksums:
        without_checksums(path)
    loader = Loader(config(path, strict=True, backend=backend))
    whole = {"image_size": 8, "batch_size": 7, "backend": backend}
    one_pass = evaluation_batches(path, "train", **whole)  # type: ignore[arg-type]
    spoil(path, 5, change)
    told = rf"corrupt sample 5 at position \d+ in {path}/train-\d+.tar: .*({message}).*"
    with pytest.raises(RuntimeError, match=f"{told}m3i-fast data verify --decode {path}"):
        take(loader, 4)
    with pytest.raises(RuntimeError, match=f"{told}m3i-fast data verify --decode {path}"):
        list(one_pass)


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_a_picture_that_breaks_off_is_named(tmp_path: Path, backend: str) -> None:
    """Its header is whole and its bytes are those that the table knows: only decoding tells."""
    path = pack(tmp_path / "data", [sample(i, JPEG) for i in range(5)], samples_per_shard=5)
    half = JPEG[: len(JPEG) // 2]
    repack(path, lambda i, found: found | ({"jpg": half} if i == 1 else {}))
    with pytest.raises(RuntimeError, match="corrupt sample 1 at position .*train-000000.tar"):
        next(Loader(config(path, batch_size=5, strict=True, backend=backend)))
    batch = next(Loader(config(path, batch_size=5, backend=backend)))
    assert set(batch.sample_id.tolist()) <= {0, 2, 3, 4}


def png_header(height: int, width: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", width, height) + bytes(99)


@pytest.mark.parametrize("backend", ["dali", "torch"])
@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        (1, 2**24 + 1, "expected sides of at most 16777216 pixels, got 1 x 16777217"),
        (2**24 + 1, 1, "expected sides of at most 16777216 pixels, got 16777217 x 1"),
        (2**32 - 1, 2**32 - 1, "expected sides of at most .*, got 4294967295 x 4294967295"),
        (2**31, 2**32 - 2, "expected sides of at most .*, got 2147483648 x 4294967294"),
        (0, 2**32 - 1, "pixels"),
        (9, 0, "pixels"),
    ],
)
def test_a_side_that_is_too_long_is_named(
    path: Path, backend: str, height: int, width: int, message: str
) -> None:
    """However few its pixels are: views are cut of shorter ones."""
    without_checksums(path)
    loader = Loader(config(path, strict=True, backend=backend))
    picture = png_header(height, width)

    def change(content: bytearray, start: int) -> None:
        content[start + 512 : start + 512 + len(picture)] = picture

    spoil(path, 5, change)
    with pytest.raises(RuntimeError, match=f"corrupt sample 5 at position .*: .*{message}"):
        take(loader, 4)


def test_a_picture_that_dali_alone_refuses_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its header is one that DALI does not parse, and does not name a sample for.

    No picture is known that Pillow reads and DALI does not: Pillow is taken away.
    """
    picture = encode_image(smooth_picture(3, 30, 40), "PNG")[:-12]  # without its last chunk
    monkeypatch.setattr(dali_backend, "read_sample", lambda *_: None)
    for bad in (0, 3):
        path = pack(tmp_path / str(bad), [sample(i, JPEG) for i in range(5)], samples_per_shard=5)
        repack(path, lambda i, found, bad=bad: found | ({"jpg": picture} if i == bad else {}))
        told = (
            f"corrupt sample {bad} at position .*DALI refuses it, though Pillow decodes it: .*Err"
        )
        with pytest.raises(RuntimeError, match=told):
            next(Loader(config(path, batch_size=5, strict=True, backend="dali")))
        batch = next(Loader(config(path, batch_size=5, backend="dali")))
        assert bad not in batch.sample_id
        batch = next(Loader(config(path, batch_size=5, backend="torch")))
        assert bad not in batch.sample_id


@pytest.mark.parametrize("kind", DAMAGE)
def test_another_sample_takes_its_place_on_any_split(
    path: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The stream is the same from either backend, on any ranks, and after a resume."""
    change, has_checksums, _ = DAMAGE[kind]
    if not has_checksums:
        without_checksums(path)
    expected = take(Loader(config(path)), 12)
    file = tmp_path / "skipped.jsonl"
    whole = Loader(config(path, backend="torch"), skipped_file=file)
    three = config(path, batch_size=3, backend="dali")
    ranks = [Loader(three, rank=rank, num_ranks=2) for rank in range(2)]
    resumed = Loader(config(path, backend="dali"))
    spoil(path, 5, change)
    with caplog.at_level(logging.WARNING):
        found = take(whole, 12)  # three epochs
    for ours, before in zip(found, expected, strict=True):
        kept = before.sample_id != 5
        assert torch.equal(ours.position, before.position)
        for a, b in zip(ours.tensors(), before.tensors(), strict=True):
            assert torch.equal(a[kept], b[kept])
        assert 5 not in ours.sample_id
    (told,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert (told["sample_id"], Path(told["file"]).parent) == (5, path)
    assert [r for r in caplog.records if "SKIPPED" in r.message and "sample 5 " in r.message]
    for ours in found[:7]:
        parts = [next(loader) for loader in ranks]
        order = torch.cat([part.position for part in parts]).argsort()
        for a, *b in zip(ours.tensors(), *(part.tensors() for part in parts), strict=True):
            assert torch.equal(a, torch.cat(b)[order])
    resumed.load_state_dict(ranks[1].state_dict())
    assert all(equal(a, b) for a, b in zip(take(resumed, 5), found[7:], strict=True))


def test_too_many_end_the_run(path: Path) -> None:
    patient, impatient = (Loader(config(path, max_skipped=most)) for most in (3, 2))
    for sample_id in (3, 9, 11):
        spoil(path, sample_id, one_bit)
    assert len(take(patient, 4)) == 4
    with pytest.raises(RuntimeError, match=r"data.max_skipped: expected at most 2 .* got another"):
        take(impatient, 4)


def test_a_resume_knows_what_was_skipped(path: Path, tmp_path: Path) -> None:
    """It writes nothing twice, counts them, and reads those of other ranks; the stream is kept."""
    file = tmp_path / "skipped.jsonl"
    cfg = config(path, batch_size=3, backend="torch", max_skipped=2)
    ranks = [Loader(cfg, rank=rank, num_ranks=2, skipped_file=file) for rank in range(2)]
    later = Loader(replace(cfg, batch_size=6), skipped_file=file)
    patient = Loader(replace(cfg, batch_size=6, max_skipped=3), skipped_file=file)
    for sample_id in (3, 9):
        spoil(path, sample_id, one_bit)
    for _ in range(12):  # three epochs
        for loader in ranks:
            next(loader)
    files = [file, tmp_path / "skipped-rank1.jsonl"]
    first, second = ([json.loads(line) for line in f.read_text().splitlines()] for f in files)
    assert {told["sample_id"] for told in (*first, *second)} == {3, 9}
    state = {**ranks[0].state_dict(), "samples": 0}
    files[1].write_text("".join(json.dumps(told) + "\n" for told in second) + '{"sample_id": 1')
    file.write_text("".join(json.dumps(told) + "\n" for told in (*first, *second)))
    before = file.read_bytes()
    later.load_state_dict(state)
    ids = torch.cat([batch.sample_id for batch in take(later, 4)])
    assert file.read_bytes() == before and not np.isin(ids, (3, 9)).any()
    spoil(path, 11, one_bit)
    with pytest.raises(RuntimeError, match=r"data.max_skipped: expected at most 2 .* got another"):
        take(later, 4)
    assert [json.loads(line)["sample_id"] for line in file.read_text().splitlines()][-1] == 11
    patient.load_state_dict(state)
    after = file.read_bytes()
    take(patient, 8)
    assert file.read_bytes() == after


def test_a_file_that_cannot_be_read_is_no_corrupt_sample(path: Path) -> None:
    """Another sample in the place of each of a shard's would hide that the disk is gone."""
    for backend in ("dali", "torch"):
        loader = Loader(config(path, backend=backend))
        (path / "train-000001.tar").rename(path / "away")
        with pytest.raises(
            RuntimeError, match=r"train-000001.tar: cannot be (opened|read): No such"
        ):
            take(loader, 4)
        (path / "away").rename(path / "train-000001.tar")
        assert len(take(loader, 4)) == 4  # it goes on where it stood


def test_marked_samples_are_never_read(path: Path) -> None:
    """Nor reported: that they are bad was decided before. Both backends, any split."""
    expected = take(Loader(config(path)), 8)
    bad = (2, 3, 17)

    def mark(table: Any) -> None:
        table["flags"][np.isin(table["sample_id"], bad)] |= BAD

    rewrite(path, mark)
    edit_manifest(path, lambda raw: raw["splits"]["train"].update(num_bad=len(bad)))
    whole = Loader(config(path, strict=True, backend="torch"))
    two = config(path, strict=True, batch_size=2)
    ranks = [Loader(two, rank=rank, num_ranks=3) for rank in range(3)]
    one_pass = evaluation_batches(path, "train", image_size=8, batch_size=5)
    for sample_id in bad:
        spoil(path, sample_id, no_header)
    for before in expected:
        ours = next(whole)
        kept = torch.from_numpy(~np.isin(before.sample_id, bad))
        for a, b in zip(ours.tensors(), before.tensors(), strict=True):
            assert torch.equal(a[kept], b[kept])
        assert not np.isin(ours.sample_id, bad).any()
        ids = torch.stack([next(loader).sample_id for loader in ranks], 1).flatten()
        assert torch.equal(ids, ours.sample_id)
    ids = torch.cat([batch.sample_id for batch in one_pass])
    assert sorted(ids.tolist()) == sorted(set(range(24)) - set(bad))
