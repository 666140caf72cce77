"""A sample that cannot be decoded, or has a label out of range, is named."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.pipelines.dataset.verification.verify import verify
from m3i_fast.pipelines.loader import Loader, evaluation_batches
from tests.shared.pipelines.data import (
    Components,
    before_tables,
    encode_image,
    pack,
    repack,
    sample,
    smooth_picture,
)

CFG = LoaderConfig(batch_size=8, global_views=ViewConfig(count=1, size=8), strict=True)
BAD = 3
JPEG = encode_image(smooth_picture(0, 200, 200), "JPEG", quality=98)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight JPEGs in one shard."""
    path = tmp_path_factory.mktemp("good") / "data"
    return before_tables(pack(path, [sample(i, JPEG) for i in range(8)], samples_per_shard=8))


def spoil(good: Path, tmp_path: Path, **components: bytes) -> Path:
    """A copy of which one sample has other components, with digests that are right."""

    def change(sample_id: int, found: Components) -> Components:
        return found | components if sample_id == BAD else found

    path = Path(shutil.copytree(good, tmp_path / "data"))
    repack(path, change)
    return path


@pytest.mark.parametrize("kind", ["truncated", "header"])
def test_a_picture_that_breaks_off_is_named(good: Path, tmp_path: Path, kind: str) -> None:
    """Its header is good: only decoding tells, of which `verify --decode` does all."""
    length = {"truncated": len(JPEG) // 2, "header": JPEG.index(b"\xff\xda") + 20}[kind]
    path = spoil(good, tmp_path, jpg=JPEG[:length])
    message = rf"corrupt sample {BAD} at position \d .*m3i-fast data verify --decode {path}"
    with pytest.raises(RuntimeError, match=message):
        next(Loader(replace(CFG, path=path)))
    with pytest.raises(RuntimeError, match=message):
        list(evaluation_batches(path, "train", image_size=8, batch_size=8))
    verify(path)
    with pytest.raises(ValueError, match=rf"{BAD:09d}-picture-{BAD}.jpg \(corrupt or empty image"):
        verify(path, decode=True)


@pytest.mark.parametrize(
    ("component", "value", "message"),
    [
        ("cls", 3, "expected a label from -1 to 2, got 3"),
        ("cls", 2**40, "expected a label from -1 to 2, got 1099511627776"),
        ("cls", -5, "expected a label from -1 to 2, got -5"),
        ("sid", -1, "expected at least 0, got -1"),
        ("gid", -1, "expected at least 0, got -1"),
    ],
)
def test_a_number_out_of_range_is_named(
    good: Path, tmp_path: Path, component: str, value: int, message: str
) -> None:
    """Not handed out: it would be taken for another class, or for none."""
    path = spoil(good, tmp_path, **{component: np.array(value, "<i8").tobytes()})
    named = rf"train-000000.tar:.*{BAD:09d}-picture-{BAD}.{component} \({message}\)"
    refused = "expected a label from -1 to 2 and ids of at least 0, got .* of group"
    with pytest.raises((RuntimeError, ValueError), match=refused):
        next(Loader(replace(CFG, path=path)))
    with pytest.raises((RuntimeError, ValueError), match=refused):
        list(evaluation_batches(path, "train", image_size=8, batch_size=8))
    with pytest.raises(ValueError, match=named):
        verify(path)


def test_a_sample_that_comes_twice_is_named(good: Path, tmp_path: Path) -> None:
    path = spoil(good, tmp_path, sid=np.array(5, "<i8").tobytes())
    with pytest.raises(
        ValueError,
        match=r"picture-\d.sid: sample_id: expected another one for each sample, got 5 twice",
    ):
        verify(path)


def test_a_group_of_another_sample_is_named(good: Path, tmp_path: Path) -> None:
    path = spoil(good, tmp_path, gid=np.array(99, "<i8").tobytes())
    with pytest.raises(
        ValueError, match="group_id: expected the sample_id of a sample of split train, got 99"
    ):
        verify(path)


def test_digests_are_right_after_repacking(good: Path, tmp_path: Path) -> None:
    """So that the errors above are not of the digests."""
    verify(spoil(good, tmp_path), decode=True)
