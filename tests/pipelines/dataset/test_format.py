"""Format version 1, written here by hand: data with one caption a picture is still packed so."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.dataset.verify import verify
from m3i_fast.pipelines.loader import Loader, evaluation_batches
from tests.shared.pipelines.data import TOKENIZER, encode_image, pack, sample, smooth_picture

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


def test_one_caption_a_picture_is_packed_as_version_1_byte_for_byte(
    by_hand: Path, tmp_path: Path
) -> None:
    samples = []
    for index in range(4):
        token_ids, label = ROWS[index]
        found = () if token_ids is None else (np.array(token_ids, np.int32),)
        samples.append(sample(index, PICTURES[index], captions=found, label=label))
    packed = pack(tmp_path / "packed", samples)
    names = ["manifest.json", "train-000000.idx", "train-000000.tar"]
    assert sorted(f.name for f in packed.iterdir()) == names
    for name in names:
        assert (packed / name).read_bytes() == (by_hand / name).read_bytes(), name


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
