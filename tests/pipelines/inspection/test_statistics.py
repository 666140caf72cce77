"""What `data stats` says of a data set, beside counts made here."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import open_clip
import pytest

from m3i_fast.cli import main
from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer
from m3i_fast.pipelines.dataset.files import LocalFiles
from m3i_fast.pipelines.dataset.sample_table import BAD, ROW, write_table
from m3i_fast.pipelines.indexing.build import IndexInfo, index_tars
from m3i_fast.pipelines.indexing.contents import Columns
from m3i_fast.pipelines.indexing.tar_places import TarFolder
from m3i_fast.pipelines.inspection.statistics import describe
from tests.shared.pipelines.data import (
    TOKENIZER,
    edit_manifest,
    encode_image,
    pack,
    sample,
    several_captions,
    smooth_picture,
)

NUMBER = 20


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Pictures of 50, 60, ... pixels, in pairs of one group, with 0 to 3 captions each."""
    samples = [
        sample(
            i,
            encode_image(smooth_picture(0, 50 + 10 * i, 300), "JPEG" if i % 2 else "PNG"),
            captions=several_captions(i),
            label=(0, 0, 2, -1)[i % 4],
            group_id=i - i % 2,
        )
        for i in range(NUMBER)
    ]
    return pack(tmp_path / "data", samples)


def test_counts_are_those_of_what_was_packed(packed: Path) -> None:
    facts = describe(LocalFiles(packed), "train", read=1000)
    numbers = [len(several_captions(i)) for i in range(NUMBER)]
    assert (facts["samples"], facts["bad"], facts["shards"]) == (NUMBER, 0, 5)
    assert (facts["captions"], facts["with_label"]) == (sum(numbers), 15)
    assert facts["groups"] == {"groups": 10, "of_several": 10, "largest": 2}
    assert facts["classes"] == {
        "classes": 3,
        "without_samples": 1,
        "most": [
            {"class": "a", "samples": 10},
            {"class": "c", "samples": 5},
            {"class": "b", "samples": 0},
        ],
        "least": [],
    }
    read = facts["read"]
    assert (read["samples"], read["formats"]) == (NUMBER, {"PNG": 10, "JPEG": 10})
    assert [read["height"][name] for name in ("least", "median", "most")] == [50, 145, 240]
    assert read["width"]["least"] == read["width"]["most"] == 300
    sides = Counter({0: 2, 64: 6, 128: 10, 224: 2})
    assert {row["from"]: row["samples"] for row in read["short_side"]} == sides
    lengths = [len(ids) for i in range(NUMBER) for ids in several_captions(i)]
    assert read["captions"] == len(lengths) and read["captions_full"] == 0
    assert read["caption_tokens"]["median"] == np.median(lengths)
    in_tars = sum(tar.stat().st_size for tar in packed.glob("*.tar"))
    assert 0.9 * in_tars < facts["bytes"] < in_tars


def test_bad_samples_are_counted_as_such(packed: Path) -> None:
    rows = np.fromfile(packed / "train.samples", ROW)
    rows["flags"][:3] = BAD
    write_table(packed / "train.samples", [rows])
    edit_manifest(packed, lambda raw: raw["splits"]["train"].update(num_bad=3))
    facts = describe(LocalFiles(packed), "train", read=5)
    assert (facts["bad"], facts["read"]["samples"]) == (3, 5)
    assert facts["with_label"] == 15  # of the manifest


def test_captions_of_text_are_counted_before_they_are_cut(tmp_path: Path) -> None:
    """By open_clip's own tokenizer."""
    texts = ["one cat", "a " * 40, "", "a very long day at the sea " * 5]
    image = encode_image(smooth_picture(0, 20, 20))
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i, text in enumerate(texts):
            for extension, content in (("png", image), ("txt", text.encode())):
                member = tarfile.TarInfo(f"{i}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    columns = Columns(
        caption="txt", label=None, group=None, class_names=None, max_pixels=9999, decode=False,
        tokenizer=Tokenizer(None, 24).info,
    )  # fmt: skip
    info = IndexInfo(name="x", licence="", attribution="")
    names = {"0.tar": "train"}
    index_tars(
        TarFolder(tmp_path), names, columns, info, out=tmp_path, workers=1, advance=lambda *_: None
    )
    read = describe(LocalFiles(tmp_path), "train", read=9)["read"]
    theirs = [len(open_clip.get_tokenizer("ViT-B-32").encode(t.strip())) + 2 for t in texts if t]
    assert read["caption_tokens"]["most"] == max(theirs)
    assert (read["captions"], read["captions_cut"]) == (3, sum(n > 24 for n in theirs))


def test_the_command_prints_tables_or_json(
    packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "stats", str(packed), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["splits"]["train"] == describe(LocalFiles(packed), "train", read=2000)
    assert main(["data", "stats", str(packed)]) == 0
    said = capsys.readouterr().out
    assert "test: train" in said and "classes with most" in said and "a 10, c 5, b 0" in said
    assert main(["data", "stats", str(packed), "--split", "val"]) == 2
    assert main(["data", "stats", str(packed), "--read", "0"]) == 2


def test_a_sample_that_cannot_be_read_is_named(packed: Path) -> None:
    tar = packed / "train-000001.tar"
    content = bytearray(tar.read_bytes())
    content[600:700] = bytes(100)
    content[:100] = b"x" * 100
    tar.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-000001.tar: sample \d+: .*m3i-fast data verify"):
        describe(LocalFiles(packed), "train", read=2000)


def test_packed_captions_of_the_whole_context_are_not_said_to_be_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless packing has counted those that it cut."""
    full = np.arange(1, TOKENIZER.context_length + 1, dtype=np.int32)
    image = encode_image(smooth_picture(0, 20, 20))
    path = pack(
        tmp_path / "data", [sample(i, image, captions=(full[: 4 + 100 * i],)) for i in (0, 1)]
    )
    read = describe(LocalFiles(path), "train", read=9)["read"]
    assert (read["captions_full"], read["captions_cut"]) == (1, None)
    assert main(["data", "stats", str(path)]) == 0
    said = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert f"captions that fill the context of {len(full)} 1 (50.0%)" in said
    edit_manifest(path, lambda raw: raw["settings"].update(captions_cut=0))
    assert main(["data", "stats", str(path)]) == 0
    said = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert f"captions cut at {len(full)} 0 of all splits, as packing counted" in said
