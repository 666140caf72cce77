"""Damaged pictures and shards in training: both backends leave out the same samples, and no other.

Packing and indexing have fuzz tests of their own; what these let pass is read here.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from m3i_fast.cli import main
from m3i_fast.config.data import LoaderConfig
from m3i_fast.pipelines.dataset.sample_table import ROW
from m3i_fast.pipelines.loader import Loader
from tests.pipelines.deep_png import deep_png
from tests.shared.pipelines.data import EVERYTHING, encode_image, pack, sample, smooth_picture

BATCH = 8
EXIF_ENDS = 56  # bytes of the picture that has one
Picture = tuple[str, bytes]  # extension, content


def make_seeds() -> list[Picture]:
    """Pictures of each kind that shards hold, with what headers may have besides."""
    image = Image.fromarray(smooth_picture(0, 40, 56))
    alpha = image.copy()
    alpha.putalpha(image.convert("L"))
    exif = image.getexif()
    exif[0x0112] = 6  # lies on its side
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (image, "JPEG", {"quality": 90}),
        (image, "JPEG", {"quality": 90, "progressive": True}),
        (image, "JPEG", {"quality": 90, "subsampling": 0, "exif": exif}),
        (image, "JPEG", {"quality": 90, "restart_marker_blocks": 2}),
        (image.convert("L"), "JPEG", {"quality": 90}),
        (image.convert("CMYK"), "JPEG", {"quality": 90}),
        (image, "PNG", {}),
        (image.convert("L"), "PNG", {}),
        (image.quantize(9), "PNG", {}),
        (alpha, "PNG", {}),
        (image, "WEBP", {}),
        (image, "WEBP", {"lossless": True}),
    ]
    found = []
    for made, image_format, options in kinds:
        content = io.BytesIO()
        made.save(content, image_format, **options)
        extension = {"JPEG": "jpg"}.get(image_format, image_format.lower())
        found.append((extension, content.getvalue()))
    deep = np.dstack([np.asarray(image), alpha.getchannel("A")]).astype(np.uint16) * 251
    for channels in ([0], [0, 3], [0, 1, 2], [0, 1, 2, 3]):
        found.append(("png", deep_png(deep[..., channels])))
    return found


SEEDS = make_seeds()


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Cut, flip, set, drop, insert or repeat some bytes, but for those of EXIF.

    Of a damaged EXIF Pillow and DALI may read another orientation.
    """
    raw = bytearray(content)
    first = EXIF_ENDS if b"Exif" in content else 0
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(min(first, len(raw) - 1), len(raw)))
        count = int(rng.integers(1, 40))
        kind = rng.choice(["flip", "flip", "set", "cut", "drop", "insert", "repeat"])
        if kind == "flip":
            raw[place] ^= 1 << int(rng.integers(8))
        elif kind == "set":
            raw[place] = int(rng.integers(256))
        elif kind == "cut":
            del raw[max(place, 1) :]
        elif kind == "drop":
            del raw[max(place, 1) : place + count]
        elif kind == "insert":
            raw[place:place] = rng.bytes(count)
        else:
            raw[place:place] = raw[place : place + count]
    return bytes(raw)


def pillow_reads(content: bytes) -> bool:
    """Whether Pillow decodes a picture, and its checksums are right."""
    try:
        Image.open(io.BytesIO(content)).verify()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
    except Exception:  # of a dozen types
        return False
    return True


def compare_backends(
    path: Path, folder: Path, spoil: Callable[[], object] = lambda: None
) -> set[int]:
    """Take each sample by both backends, equal batches; returns what both left out.

    spoil: damages the data set after it was opened, which looks at some headers.
    """
    cfg = {"path": path, "batch_size": BATCH, "global_views": EVERYTHING, "max_skipped": 10**6}
    files = [folder / f"{backend}.jsonl" for backend in ("torch", "dali")]
    loaders = [
        Loader(LoaderConfig(**cfg, backend=file.stem), skipped_file=file)  # type: ignore[arg-type]
        for file in files
    ]
    spoil()
    for number in range(loaders[0].steps_per_epoch + 1):
        batches = [next(loader) for loader in loaders]
        torchs, dalis = map(left_out, files)
        assert torchs == dalis, (
            f"batch {number}: {torchs - dalis} by torch, {dalis - torchs} by dali"
        )
        for ours, theirs in zip(*(batch.tensors() for batch in batches), strict=True):
            assert torch.equal(ours, theirs), (number, batches[0].sample_id.tolist())
        assert not torchs & set(batches[0].sample_id.tolist())
    for loader in loaders:
        loader.close()
    return torchs


def left_out(file: Path) -> set[int]:
    """Return the ids in a file of skipped samples, each of which has a reason."""
    lines = file.read_text().splitlines() if file.exists() else []
    told = [json.loads(line) for line in lines]
    assert all(one["reason"] for one in told)
    return {one["sample_id"] for one in told}


def check_pictures(folder: Path, number: int, seed: int) -> None:
    """What is left out is what Pillow does not read; a third of the pictures is whole."""
    rng = np.random.default_rng(seed)
    contents = []
    for i in range(number):
        extension, content = SEEDS[i % len(SEEDS)]
        contents.append((f"{i}.{extension}", damaged(content, rng) if i % 3 else content))
    (folder / "data").mkdir()
    with tarfile.open(folder / "data" / "a.tar", "w") as file:
        for name, content in contents:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    assert main(["data", "index", str(folder / "data"), "--num-merges", "100"]) == 0
    tar = (folder / "data" / "a.tar").read_bytes()
    starts = [int(row["offset"]) for row in np.fromfile(folder / "data" / "train.samples", ROW)]
    taken = [int(tar[start : start + 100].split(b".")[0]) for start in starts]  # names
    skipped = {taken[i] for i in compare_backends(folder / "data", folder)}
    assert skipped == {i for i in taken if not pillow_reads(contents[i][1])}
    assert set(range(0, number, 3)) <= set(taken) - skipped
    assert skipped and len(taken) < number


def test_damaged_pictures(tmp_path: Path) -> None:
    check_pictures(tmp_path, 66, seed=0)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_thousand_damaged_pictures(tmp_path: Path, seed: int) -> None:
    """Three times 500, of which two thirds are damaged."""
    check_pictures(tmp_path, 500, seed)


def check_shards(folder: Path, number: int, flips: int) -> None:
    """Samples of which a bit was flipped, anywhere in their tars, are left out, and no other."""
    images = [encode_image(smooth_picture(i, 12, 16), "JPEG") for i in range(8)]
    path = pack(
        folder / "data", [sample(i, images[i % 8]) for i in range(number)], samples_per_shard=64
    )
    rng = np.random.default_rng(0)
    table, tars = np.fromfile(path / "train.samples", ROW), sorted(path.glob("*.tar"))
    hit: set[int] = set()

    def flip() -> None:
        for _ in range(flips):
            shard = int(rng.integers(len(tars)))
            content = bytearray(tars[shard].read_bytes())
            place = int(rng.integers(len(content)))
            content[place] ^= 1 << int(rng.integers(8))
            tars[shard].write_bytes(content)
            of = (table["shard"] == shard) & (table["offset"] <= place)
            of &= place < table["offset"] + table["size"]
            hit.update(table["sample_id"][of].tolist())

    assert compare_backends(path, folder, flip) == hit
    assert 0 < len(hit) < number


def test_flipped_bits_of_shards(tmp_path: Path) -> None:
    check_shards(tmp_path, 96, 10)


@pytest.mark.nightly
def test_a_thousand_flipped_bits_of_shards(tmp_path: Path) -> None:
    check_shards(tmp_path, 2048, 1000)
