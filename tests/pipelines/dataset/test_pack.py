"""The shard writer: what it refuses, what others read from it, and that old files stay good."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from m3i_fast.pipelines.dataset.manifest import how_to_restore, read_manifest
from m3i_fast.pipelines.dataset.pack import write_dataset
from m3i_fast.pipelines.dataset.verification.verify import verify
from tests.shared.pipelines.data import TOKENIZER, encode_image, info, pack, sample, smooth_picture

PNG = encode_image(smooth_picture(0, 20, 30))
JPEG = encode_image(smooth_picture(0, 20, 30), "JPEG")


def contents(directory: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(directory.iterdir())}


def test_webdataset_reads_what_was_packed(fifty: Path) -> None:
    tars = sorted(str(tar) for tar in fifty.glob("*.tar"))
    found = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert len(found) == 50
    for row in found:
        index = int(np.frombuffer(row["sid"], "<i8")[0])
        assert row["png"] == encode_image(smooth_picture(index, 40, 56))
        assert np.frombuffer(row["gid"], "<i8")[0] == index
        assert np.frombuffer(row["cls"], "<i8")[0] == (-1 if index % 7 == 0 else index % 3)
        assert ("tok" in row) == (index % 5 != 0)
        if "tok" in row:
            assert np.frombuffer(row["tok"], "<i4").tolist() == list(range(1, 4 + index % 5))


def test_manifest_counts(fifty: Path) -> None:
    manifest = verify(fifty)
    split = manifest.splits["train"]
    assert (split.num_samples, split.num_captions, split.num_labels) == (50, 40, 42)
    assert split.num_groups == 50
    assert [shard.num_samples for shard in split.shards] == [4] * 12 + [2]
    assert manifest.min_image_size == manifest.max_image_size == (40, 56)
    assert manifest.tokenizer == TOKENIZER
    assert manifest == read_manifest(fifty)


def test_samples_are_shuffled_over_all_shards(fifty: Path) -> None:
    tars = sorted(str(tar) for tar in fifty.glob("*.tar"))
    order = [int(r["__key__"][:9]) for r in webdataset.WebDataset(tars, shardshuffle=False)]
    assert sorted(order) == list(range(50))
    moved = sum(abs(index // 4 - position // 4) > 1 for position, index in enumerate(order))
    assert moved > 25


def test_same_bytes_on_every_run(fifty: Path, tmp_path: Path) -> None:
    samples = [sample(i, encode_image(smooth_picture(i, 9, 9))) for i in range(10)]
    first = contents(pack(tmp_path / "first", samples))
    os.utime(tmp_path / "first", (0, 0))
    assert contents(pack(tmp_path / "second", samples)) == first
    assert contents(pack(tmp_path / "first", samples)) == first  # a data set replaces a data set
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "second"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": b""}, "picture-1: corrupt or empty"),
        ({"image": b"no image at all"}, "picture-1: corrupt or empty"),
        ({"image": PNG[: len(PNG) // 2]}, "picture-1: corrupt or empty"),
        ({"image": JPEG[: len(JPEG) * 3 // 4], "extension": "jpg"}, "picture-1: corrupt or empty"),
        ({"image": JPEG}, "picture-1: expected png, got JPEG"),
        ({"image": PNG[:16] + b"\0\0\x75\x30" * 2 + PNG[24:]}, "picture-1: .* 30000 x 30000"),
        ({"label": 3}, "picture-1: expected a label from -1 to 2, got 3"),
        ({"label": -2}, "picture-1: expected a label from -1 to 2, got -2"),
        (
            {"sample_id": 0},
            "picture-1: sample_id: expected another one for each sample, got 0 twice",
        ),
        ({"sample_id": -1}, "picture-1: expected ids of at least 0, got -1 of group 1"),
        ({"group_id": -1}, "picture-1: expected ids of at least 0, got 1 of group -1"),
        ({"group_id": 77}, "group_id: expected the sample_id of a sample of split train, got 77"),
        ({"captions": (np.zeros(0, np.int32),)}, "picture-1: expected 1 to 12 token ids, got 0"),
        ({"captions": (np.zeros(13, np.int32),)}, "picture-1: expected 1 to 12 token ids, got 13"),
        ({"captions": (np.array([521], np.int32),)}, "picture-1: expected token ids from 0 to 520"),
    ],
)
def test_bad_samples_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    good = pack(tmp_path / "data", [sample(0, PNG)])
    before = contents(good)
    good_png = {"image": PNG, "extension": "png"}
    with pytest.raises(ValueError, match=message):
        pack(tmp_path / "data", [sample(0, PNG), sample(1, **{**good_png, **changes})])
    assert contents(good) == before
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_the_limit_of_pixels_can_be_changed(tmp_path: Path) -> None:
    splits = {"train": [sample(0, PNG)]}
    pack_with = partial(write_dataset, splits=splits, info=info(), seed=0, samples_per_shard=4)
    with pytest.raises(ValueError, match="picture-0: expected at most 599 pixels, got 20 x 30"):
        pack_with(tmp_path / "data", max_pixels=599)
    pack_with(tmp_path / "data", max_pixels=600)


def test_a_group_in_two_splits_is_refused(tmp_path: Path) -> None:
    splits = {"train": [sample(0, PNG)], "heldout": [sample(1, PNG, group_id=0)]}
    with pytest.raises(
        ValueError, match="group_id: expected each in one split, got 0 in heldout and in train"
    ):
        write_dataset(tmp_path / "data", splits, info(), seed=0, samples_per_shard=4)


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split train: expected at least one sample"):
        pack(tmp_path / "data", [], samples_per_shard=1)


def test_foreign_directories_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.png").write_bytes(PNG)
    (tmp_path / "photos" / "manifest.json").write_text(json.dumps({"format": "other"}))
    (tmp_path / "file").write_text("text")
    for name in ("photos", "file"):
        with pytest.raises(ValueError, match=f"OUT: expected .* got .*{name}"):
            pack(tmp_path / name, [sample(0, PNG)])
    assert (tmp_path / "photos" / "holiday.png").read_bytes() == PNG


@pytest.mark.parametrize(
    ("entry", "name", "message"),
    [
        ("indexed", "00000.tar", "got .*data with a data set of m3i-fast data index: name another"),
        ("pack", "train-000001.tar", "got .*data with a data set of m3i-fast data pack: name"),
        ("seed", "notes.txt", "nothing beside its data set, got notes.txt in .*data: move it"),
    ],
)
def test_files_of_a_user_are_never_replaced(
    entry: str, name: str, message: str, tmp_path: Path
) -> None:
    """An index lies among the tars of a user, and what was packed may be all that is left."""
    out = pack(tmp_path / "data", [sample(i, PNG) for i in range(3)])
    manifest = json.loads((out / "manifest.json").read_bytes())
    manifest["settings"][entry] = {}
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / name).write_bytes(b"of the user")
    before = contents(out)
    with pytest.raises(ValueError, match=f"OUT: expected .*{message}"):
        pack(out, [sample(0, PNG)])
    assert contents(out) == before


@pytest.mark.parametrize("settings", [{"indexed": {}}, {"pack": {}}, {}])
def test_only_a_data_set_that_was_made_is_made_again(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Not one of the same name: a folder may have any."""
    manifest = replace(read_manifest(pack(tmp_path / "x", [sample(0, PNG)])), name="synthetic")
    told = how_to_restore(tmp_path / "x", replace(manifest, settings=settings))
    assert ("m3i-fast data synthetic" in told) == (not settings)


def test_a_failed_replacement_puts_the_old_data_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = pack(tmp_path / "data", [sample(i, PNG) for i in range(3)])
    before = contents(out)
    rename = Path.rename

    def refuse_new(self: Path, target: Path) -> Path:
        if ".packing-" in self.name:
            raise OSError("no rename today")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(OSError, match="no rename today"):
        pack(out, [sample(0, PNG)])
    assert contents(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


# Random bytes of one picture after another, until a file may grow no further.
FULL_DISK = """
import io, resource, sys
from pathlib import Path
import numpy as np
from PIL import Image
from m3i_fast.pipelines.dataset.pack import DatasetInfo, write_dataset
from m3i_fast.pipelines.dataset.samples import Sample
from m3i_fast.pipelines.dataset.annotations.tokenizer import TokenizerInfo

resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
buffer = io.BytesIO()
noise = np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)
Image.fromarray(noise).save(buffer, "PNG")
samples = [
    Sample(image=buffer.getvalue(), extension="png", name="x", sample_id=i, group_id=i,
           captions=(), label=-1)
    for i in range(8)
]
tokenizer = TokenizerInfo(num_merges=0, context_length=4, vocab_size=514, fingerprint="")
info = DatasetInfo(name="full", class_names=(), tokenizer=tokenizer, licence="", attribution="",
                   settings={})
write_dataset(Path(sys.argv[1]), {"train": samples}, info, seed=0, samples_per_shard=8)
"""


def test_a_full_disk_keeps_the_old_data_set(tmp_path: Path) -> None:
    before = contents(pack(tmp_path / "data", [sample(i, PNG) for i in range(3)]))
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "data")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "OSError" in result.stderr, result.stderr
    assert contents(tmp_path / "data") == before
    verify(tmp_path / "data")
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
