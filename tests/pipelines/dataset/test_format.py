"""Format versions 1 and 4, written here by hand: what is packed has these bytes."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.dataset.sample_table import NO_CRC, ROW, SampleTable
from m3i_fast.pipelines.dataset.verification.verify import verify
from m3i_fast.pipelines.loader import Loader, evaluation_batches
from tests.shared.pipelines.data import (
    TOKENIZER,
    before_tables,
    encode_image,
    pack,
    sample,
    smooth_picture,
)

# sample_id: (token ids or none, label)
ROWS: dict[int, tuple[list[int] | None, int]] = {
    2: (None, -1),
    1: ([4, 5, 6, 7], -1),
    0: ([1, 2, 3], 1),
    3: (None, 2),
}
PICTURES = {i: encode_image(smooth_picture(i, 10 + i, 12)) for i in ROWS}


def _components(index: int) -> list[tuple[str, bytes]]:
    token_ids, label = ROWS[index]
    found = [("png", PICTURES[index])]
    if token_ids is not None:
        found.append(("tok", np.array(token_ids, "<i4").tobytes()))
    numbers = {"cls": label, "sid": index, "gid": index}
    return [*found, *((name, np.array(n, "<i8").tobytes()) for name, n in numbers.items())]


def _write(directory: Path, order: list[int]) -> None:
    rows = [f"v1.2 {len(order)}"]
    with tarfile.open(directory / "train-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in order:
            row = []
            for extension, content in _components(index):
                member = tarfile.TarInfo(f"{index:09d}-picture-{index}.{extension}")
                member.size = len(content)
                row += [extension, str(tar.offset + 512), str(len(content)), member.name]
                tar.addfile(member, io.BytesIO(content))
            rows.append(" ".join(row))
    (directory / "train-000000.idx").write_text("\n".join(rows) + "\n")


def _manifest(directory: Path) -> dict[str, Any]:
    tar, index = (directory / f"train-000000.{suffix}" for suffix in ("tar", "idx"))
    shard = {
        "file": tar.name,
        "num_samples": 4,
        "num_bytes": tar.stat().st_size,
        "sha256": hashlib.sha256(tar.read_bytes()).hexdigest(),
        "index_bytes": index.stat().st_size,
        "index_sha256": hashlib.sha256(index.read_bytes()).hexdigest(),
    }
    split = {"num_samples": 4, "num_captions": 2, "num_labels": 2, "num_groups": 4}
    return {
        "format": "m3i-fast-shards",
        "format_version": 1,
        "name": "test",
        "class_names": ["a", "b", "c"],
        "tokenizer": TOKENIZER.as_dict(),
        "image_format": "png",
        "min_image_size": [10, 12],
        "max_image_size": [13, 12],
        "licence": "none",
        "attribution": "nobody",
        "settings": {"samples_per_shard": 4, "seed": 0},
        "splits": {"train": {**split, "shards": [shard]}},
    }


@pytest.fixture
def by_hand(tmp_path: Path) -> Path:
    """The directory; samples are in the order of their keyed hashes."""
    directory = tmp_path / "by-hand"
    directory.mkdir()
    keys = {i: hashlib.sha256(f"order|0|train|{i}".encode()).digest() for i in range(4)}
    _write(directory, sorted(keys, key=lambda i: keys[i]))
    text = json.dumps(_manifest(directory), indent=2, sort_keys=True) + "\n"
    (directory / "manifest.json").write_text(text)
    return directory


def _packed(out: Path) -> Path:
    samples = []
    for index in range(4):
        token_ids, label = ROWS[index]
        found = () if token_ids is None else (np.array(token_ids, np.int32),)
        samples.append(sample(index, PICTURES[index], captions=found, label=label))
    return pack(out, samples)


def test_version_1_is_version_4_without_its_table(by_hand: Path, tmp_path: Path) -> None:
    packed = before_tables(_packed(tmp_path / "packed"))
    names = ["manifest.json", "train-000000.idx", "train-000000.tar"]
    assert sorted(f.name for f in packed.iterdir()) == names
    for name in names:
        assert (packed / name).read_bytes() == (by_hand / name).read_bytes(), name


def _crc32c(content: bytes) -> int:
    """Castagnoli's, bit by bit."""
    rest = 0xFFFFFFFF
    for byte in content:
        rest ^= byte
        for _ in range(8):
            rest = rest >> 1 ^ (0x82F63B78 if rest & 1 else 0)
    return rest ^ 0xFFFFFFFF


def test_version_4_has_a_table_byte_for_byte(by_hand: Path, tmp_path: Path) -> None:
    packed = _packed(tmp_path / "packed")
    content = (packed / "train-000000.tar").read_bytes()
    assert content == (by_hand / "train-000000.tar").read_bytes()
    ranges: dict[int, list[int]] = {}
    with tarfile.open(packed / "train-000000.tar") as tar:
        for member in tar:
            start, end = ranges.setdefault(int(member.name[:9]), [member.offset, 0])
            ranges[int(member.name[:9])][1] = member.offset_data + (member.size + 511) // 512 * 512
    table = b"".join(
        struct.pack(
            "<qqqIIIiII", start, i, i, end - start, 0, _crc32c(content[start:end]), ROWS[i][1], 0, 0
        )
        for i, (start, end) in ranges.items()
    )
    assert (packed / "train.samples").read_bytes() == table
    raw = json.loads((packed / "manifest.json").read_text())
    assert (raw["format_version"], raw["caption_member"]) == (4, "tok")
    assert "shards_in" not in raw
    assert raw["splits"]["train"]["num_bad"] == 0
    assert raw["splits"]["train"]["table"] == {
        "file": "train.samples",
        "num_bytes": 4 * 48,
        "sha256": hashlib.sha256(table).hexdigest(),
    }


def test_the_table_of_version_1_is_made_of_its_index(by_hand: Path, tmp_path: Path) -> None:
    packed = _packed(tmp_path / "packed")
    old = SampleTable.open(by_hand, read_manifest(by_hand), "train")
    new = SampleTable.open(packed, read_manifest(packed), "train")
    assert old.shard_files == new.shard_files == ("train-000000.tar",)
    assert len(old) == len(new) == 4
    for column in set(ROW.names or ()) - {"crc32c", "flags"}:
        assert old.rows[column].tolist() == new.rows[column].tolist(), column
    assert set(old.rows["flags"]) == {NO_CRC} and set(new.rows["flags"]) == {0}
    assert not new.rows.flags.writeable


def test_version_1_is_read(by_hand: Path) -> None:
    manifest = verify(by_hand)
    split = manifest.splits["train"]
    assert (split.num_captions, split.total_captions, split.max_captions) == (2, 2, 1)
    text = (by_hand / "manifest.json").read_text()
    assert manifest.to_json() == text  # so that states of loaders and runs stay good
    assert read_manifest(by_hand).digest == hashlib.sha256(text.encode()).hexdigest()
    cfg = LoaderConfig(path=by_hand, batch_size=4, global_views=ViewConfig(count=1, size=4))
    passes = [*evaluation_batches(by_hand, "train", image_size=4, batch_size=4), next(Loader(cfg))]
    for batch in passes:
        for i, index in enumerate(batch.sample_id.tolist()):
            token_ids, label = ROWS[index]
            ids = token_ids or []
            assert batch.token_ids[i].tolist() == ids + [0] * (12 - len(ids))
            assert (batch.num_tokens[i], batch.label[i]) == (len(ids), label)
