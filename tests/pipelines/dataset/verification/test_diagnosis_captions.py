"""Captions that are not what a packer writes are named, with shard and sample, by all who read."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.pipelines.dataset.annotations import captions
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.dataset.verification.verify import verify
from m3i_fast.pipelines.loader import Loader, evaluation_batches
from tests.shared.pipelines.data import (
    Packer,
    encode_image,
    sample,
    several_captions,
    smooth_picture,
)

IMAGE = encode_image(smooth_picture(0, 9, 9))
CFG = LoaderConfig(batch_size=4, global_views=ViewConfig(count=1, size=4), strict=True)
BAD = 5  # the sample
MARK = 77  # a token id that tells it from the others

int32 = lambda values: np.array(values, "<i4").tobytes()  # noqa: E731

# What the shard holds of the bad sample, where other pictures have three captions.
AMONG_SEVERAL = {
    "more ids": ({"tok": int32([1] * 9), "len": int32([4, 4])}, r"expected 8 .*\[4, 4\]\), got 9"),
    "fewer ids": ({"tok": int32([1] * 7), "len": int32([4, 4])}, r"expected 8 .*, got 7"),
    "no ids": ({"len": int32([4, 4])}, r"expected 8 token ids .*, got 0"),
    "empty": ({"tok": int32([1] * 8), "len": int32([4, 0, 4])}, r"at least 1 .*\[4, 0, 4\]"),
    "empty last": ({"tok": int32([1] * 8), "len": int32([8, 0])}, r"at least 1 .*\[8, 0\]"),
    "negative": ({"tok": int32([1] * 8), "len": int32([4, -3, 7])}, r"at least 1 token id"),
    "too long": ({"tok": int32([1] * 15), "len": int32([2, 13])}, "caption 2 of 2: .*, got 13"),
    "one too long": ({"tok": int32([1] * 13)}, "expected 1 to 12 token ids, got 13"),
    "out of range": ({"tok": int32([1, 521]), "len": int32([1, 1])}, "caption 2 .* got 521 to 521"),
    "below range": ({"tok": int32([-4])}, "expected token ids from 0 to 520, got -4 to -4"),
    "too many": ({"tok": int32([1] * 8), "len": int32([1, 1, 1, 1])}, r"expected 4 .*, got 8"),
    "total too long": ({"tok": int32([1] * 40)}, "expected 1 to 12 token ids, got 40"),
    "odd ids": ({"tok": b"12345"}, "tok: expected int32 values, got 5 bytes"),
    "odd lengths": ({"tok": int32([1] * 8), "len": b"123456"}, "len: .* got 6 bytes"),
}
# The same where no picture has more than one.
AMONG_ONES = {
    "too long": ({"tok": int32([1] * 13)}, "expected 1 to 12 token ids, got 13"),
    "out of range": ({"tok": int32([1, 521])}, "expected token ids from 0 to 520, got 1 to 521"),
    "odd ids": ({"tok": b"12345"}, "tok: expected int32 values, got 5 bytes"),
}
CASES = [
    *((name, True, *case) for name, case in AMONG_SEVERAL.items()),
    *((name, False, *case) for name, case in AMONG_ONES.items()),
]


@pytest.mark.parametrize(("name", "several", "stored", "message"), CASES)
def test_corrupt_captions_are_named_with_shard_and_sample(
    packer: Packer,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    several: bool,
    stored: dict[str, bytes],
    message: str,
) -> None:
    """Written by a packer that does it wrong: digests and index are right, only reading tells."""
    right = captions.components

    def wrong(found: Sequence[Any]) -> Iterator[tuple[str, bytes]]:
        return iter(stored.items()) if found[0][0] == MARK else right(found)

    monkeypatch.setattr(captions, "components", wrong)
    others = several_captions(3 if several else 1)
    bad = (np.array([MARK], np.int32),)
    path = packer([sample(i, IMAGE, captions=bad if i == BAD else others) for i in range(8)])
    assert read_manifest(path).splits["train"].max_captions == (3 if several else 1)
    member = rf"train-000000.tar:.*{BAD:09d}-picture-{BAD}\.(tok|len)"
    with pytest.raises(ValueError, match=rf"{member} \(.*{message}"):
        verify(path)
    for backend in ("dali", "torch"):
        # The words of what is wrong are the same where Python reads.
        words = message if backend == "torch" else "(tok|len): expected"
        expected = rf"corrupt sample {BAD} at position \d .*{words}.*m3i-fast data verify"
        with pytest.raises(RuntimeError, match=expected):
            next(Loader(replace(CFG, path=path, batch_size=8, backend=backend)))
        whole = {"image_size": 4, "batch_size": 4, "backend": backend}
        with pytest.raises(RuntimeError, match=expected):
            list(evaluation_batches(path, "train", **whole))  # type: ignore[arg-type]


@pytest.mark.parametrize("component", ["tok", "len"])
def test_a_damaged_byte_is_named_by_its_sample(packer: Packer, component: str) -> None:
    path = packer([sample(i, IMAGE, captions=several_captions(3)) for i in range(8)])
    (shard,) = read_manifest(path).splits["train"].shards
    tar = path / shard.file
    with tarfile.open(tar) as opened:
        member = next(each for each in opened if each.name.endswith(f".{component}"))
    name = member.name
    raw = bytearray(tar.read_bytes())
    raw[member.offset_data + 3] ^= 0x40  # the highest byte of the first value
    tar.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"tar: sample \d \({name[:17]}.*\): damaged: expected"):
        verify(path)
    with pytest.raises(RuntimeError, match=rf"corrupt sample {int(name[:9])} at position \d in "):
        next(Loader(replace(CFG, path=path, batch_size=8)))


def _counted_wrong(path: Path, key: str) -> None:
    file = path / "manifest.json"
    split = read_manifest(path).splits["train"]
    number = getattr(split, key)
    text = file.read_text()
    assert text.count(f'"{key}": {number}') == 1
    file.write_text(text.replace(f'"{key}": {number}', f'"{key}": {number + 1}'))


@pytest.mark.parametrize(
    "key",
    ["num_captions", "total_captions", "max_captions", "num_labels", "num_groups"],
)
def test_a_wrong_count_is_named(packer: Packer, key: str) -> None:
    samples = [sample(i, IMAGE, captions=several_captions(i), label=-(i % 2)) for i in range(8)]
    path = packer([replace(s, group_id=s.sample_id - s.sample_id % 2) for s in samples])
    verify(path)
    _counted_wrong(path, key)
    with pytest.raises(ValueError, match=rf"split train: expected {key} \d+ \(manifest\), got \d+"):
        verify(path)


@pytest.mark.parametrize(
    ("component", "content", "message"),
    [
        ("cls", np.array([3], "<i8").tobytes(), r"-5.cls \(expected 2 \(table\), got 3"),
        ("cls", b"1234", r"-5.cls(: | \()expected 8 bytes, got 4"),
    ],
)
def test_other_bad_components_are_named(
    packer: Packer,
    monkeypatch: pytest.MonkeyPatch,
    component: str,
    content: bytes,
    message: str,
) -> None:
    from m3i_fast.pipelines.dataset import pack

    right = pack._components

    def wrong(of: Any) -> Iterator[tuple[str, bytes]]:
        for name, found in right(of):
            yield name, content if (of.sample_id, name) == (BAD, component) else found

    monkeypatch.setattr(pack, "_components", wrong)
    path = packer([sample(i, IMAGE) for i in range(8)])
    with pytest.raises(ValueError, match=rf"train-000000\.(tar|idx): .*{message}"):
        verify(path)
