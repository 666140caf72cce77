"""Tars that others wrote are found, indexed and resumed, and nothing of them is changed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import google_crc32c
import pytest
import webdataset

from m3i_fast.cli import main
from m3i_fast.pipelines.dataset.manifest import how_to_restore, read_manifest
from m3i_fast.pipelines.indexing import build, tar_task
from m3i_fast.pipelines.indexing.tars import find_tars
from m3i_fast.pipelines.packing.output import locked
from m3i_fast.pipelines.tar_members import sample_files
from tests.pipelines.indexing.tars import (
    JPEG,
    PNG,
    WEBP,
    as_img2dataset,
    contents,
    index,
    refused,
    rows,
    table,
    write_tar,
)
from tests.shared.pipelines.data import pack, sample

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Eleven pictures in three tars, one of them of a single sample."""
    for number, (start, count) in enumerate([(0, 6), (6, 1), (7, 4)]):
        write_tar(tmp_path / "tars" / f"{number:05d}.tar", as_img2dataset(start, count))
    return tmp_path / "tars"


def files(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("prefix", ["", "folder/below.it/", "./", "n" * 90 + "/" + "m" * 70, "ä/ö"])
def test_rows_point_to_what_tarfile_and_webdataset_read(
    tmp_path: Path, name: str, prefix: str
) -> None:
    """Also where long names, or others than ASCII, take headers of their own."""
    root = tmp_path / "tars"
    found = [(prefix + name, content) for name, content in as_img2dataset(0, 5)]
    found += [(f"{prefix}x.JPEG", JPEG), (f"{prefix}y.png", PNG), (f"{prefix}z.webp", WEBP)]
    tar = write_tar(root / "a.tar", found, FORMATS[name])
    index(root, label=None)
    theirs = list(webdataset.WebDataset([str(tar)], shardshuffle=False))
    ours = [sample_files(content) for content in contents(root)]
    assert len(ours) == len(theirs) == 8 and refused(root) == []
    for (key, parts), row in zip(ours, theirs, strict=True):
        assert key == row["__key__"]
        assert parts == {k: v for k, v in row.items() if not k.startswith("__")}
    with tarfile.open(tar) as opened:
        offsets = [m.offset for m in opened if m.name.endswith((".jpg", ".JPEG", "y.png", "webp"))]
    assert rows(root)["offset"].tolist() == offsets
    crcs = [google_crc32c.value(content) for content in contents(root)]
    assert rows(root)["crc32c"].tolist() == crcs


def test_what_an_index_says(tars: Path) -> None:
    before = files(tars)
    manifest = index(tars, caption="json:caption", label="json:label")
    split = manifest.splits["train"]
    assert (split.num_samples, split.num_captions, split.num_labels) == (11, 11, 11)
    assert (split.num_groups, split.num_bad, manifest.caption_member) == (11, 0, "json:caption")
    assert manifest.class_names == ("0", "1", "2")
    assert (manifest.min_image_size, manifest.max_image_size) == ((20, 30), (26, 30))
    assert manifest.image_format == "jpg"
    found = rows(tars)
    assert found["sample_id"].tolist() == found["group_id"].tolist() == list(range(11))
    assert found["label"].tolist() == [i % 3 for i in range(11)]
    assert found["shard"].tolist() == [0] * 6 + [1] + [2] * 4
    written = files(tars)
    assert set(written) - set(before) == {"manifest.json", "refused.jsonl", "train.samples"}
    assert {name: written[name] for name in before} == before


def test_processes_change_nothing(tars: Path, tmp_path: Path) -> None:
    index(tars, out=tmp_path / "one")
    index(tars, out=tmp_path / "two", workers=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_what_was_finished_is_not_done_again(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(tars, out=tmp_path / "whole")
    done: list[str] = []
    allowed = [1]
    right = tar_task.index_tar

    def stopping(file: Path, *rest: object) -> object:
        if len(done) == allowed[0]:
            raise KeyboardInterrupt
        done.append(file.name)
        return right(file, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(tar_task, "index_tar", stopping)
    for allowed[0] in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            index(tars)
        assert not (tars / "manifest.json").exists()
    allowed[0] = 99
    index(tars)
    assert done == ["00000.tar", "00001.tar", "00002.tar"]
    assert files(tars)["train.samples"] == files(tmp_path / "whole")["train.samples"]
    assert read_manifest(tars).digest == read_manifest(tmp_path / "whole").digest
    assert not (tars / build.RESULTS).exists()


@pytest.mark.parametrize("change", ["tar", "settings", "damage", "cut between rows"])
def test_what_was_finished_of_something_else_is_done_again(
    tars: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    def stopping(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "_reduce", stopping)
    with pytest.raises(KeyboardInterrupt):
        index(tars)
    monkeypatch.undo()
    settings = {"label": None} if change == "settings" else {}
    if change == "tar":
        write_tar(tars / "00001.tar", as_img2dataset(20, 2))
    if change == "damage":
        for result in (tars / build.RESULTS).iterdir():
            result.write_bytes(result.read_bytes()[:-100])
    if change == "cut between rows":
        for result in (tars / build.RESULTS).glob("*.index"):
            result.write_bytes(result.read_bytes()[:-48])
    assert index(tars, **settings).splits["train"].num_samples == 11 + (change == "tar")
    (key, _), *_ = [sample_files(c) for c in contents(tars)][6:]
    assert key == ("000000020" if change == "tar" else "000000006")


def test_an_index_may_stand_elsewhere(tars: Path, tmp_path: Path) -> None:
    before = files(tars)
    out = tmp_path / "index"
    manifest = index(tars, out=out)
    assert files(tars) == before
    assert manifest.shards_in == str(tars)
    assert contents(out) != [] and table(out).shard_files[0] == str(tars / "00000.tar")
    assert manifest.digest == index(tars).digest  # of bytes, not of places
    assert contents(out) == contents(tars)


def test_splits_follow_names(tmp_path: Path) -> None:
    root = tmp_path / "tars"
    names = ["train/0.tar", "train/1.tar", "imagenet-val2017-0.tar", "x_Test_0.tar", "valid.tar"]
    for number, name in enumerate(names):
        write_tar(root / name, as_img2dataset(number, 1))
    manifest = index(root)
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {
        "train": 2, "heldout": 2, "test": 1,
    }  # fmt: skip
    ids = [rows(root, split)["sample_id"].tolist() for split in manifest.splits]
    assert sorted(sum(ids, [])) == list(range(5))


def test_groups_and_named_classes(tmp_path: Path) -> None:
    root = tmp_path / "tars"
    facts = [{"of": "b", "k": "dog"}, {"of": 7, "k": "cat"}, {}, {"of": "b", "k": "cat"}, {"of": 7}]
    found = []
    for i, fact in enumerate(facts):
        found += [(f"{i}.jpg", JPEG), (f"{i}.json", json.dumps(fact).encode())]
    write_tar(root / "0.tar", found[:6])
    write_tar(root / "1.tar", found[6:])
    manifest = index(root, caption=None, label="json:k", group="json:of")
    assert rows(root)["group_id"].tolist() == [0, 1, 2, 0, 1]
    assert manifest.class_names == ("cat", "dog")
    assert rows(root)["label"].tolist() == [1, 0, -1, 0, -1]
    assert (manifest.splits["train"].num_groups, manifest.splits["train"].num_labels) == (3, 3)
    manifest = index(root, label="json:k", class_names=("dog", "bird", "cat"))
    assert rows(root)["label"].tolist() == [0, 2, -1, 2, -1]
    (root / "1.tar").rename(root / "val.tar")
    with pytest.raises(ValueError, match="--group-column: expected each group in one split"):
        index(root, label=None, group="json:of")


def test_the_command_guesses_and_says_so(tars: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "index", str(tars), "--num-merges", "10", "--workers", "1"]) == 0
    said = capsys.readouterr().err
    assert (
        "tars: 3 of train (--split); captions: txt (--caption-column); labels: json:label" in said
    )
    assert "11 pictures in 3 tars, 0 that do not decode, 11 with a caption, 11 with a label" in said
    assert read_manifest(tars).tokenizer.num_merges == 10
    write_tar(tars / "00003.tar", [("a.jpg", b"<html>"), ("b.jpg", JPEG), ("c.txt", b"x")])
    assert main(["data", "index", str(tars), "--num-merges", "10", "--workers", "1"]) == 0
    said = capsys.readouterr().err
    assert "12 pictures in 4 tars" in said and "corrupt or empty image: expected PNG" in said
    assert "expected one picture" in said


@pytest.mark.parametrize("pattern", ["../*.tar", "/etc/*.tar", "{}/../other/*.tar"])
def test_tars_out_of_the_folder_are_refused(tars: Path, pattern: str) -> None:
    with pytest.raises(ValueError, match="--tars: expected tars in .*, got .*: name their folder"):
        find_tars(tars, [pattern.format(tars)])


def test_tars_inside_of_the_folder_may_be_named(tars: Path) -> None:
    assert find_tars(tars, ["*1.tar", str(tars / "00002.tar")]) == ["00001.tar", "00002.tar"]
    with pytest.raises(ValueError, match="expected tars .*, got none"):
        find_tars(tars, ["*.zip"])


def test_compressed_tars_are_named_with_what_reads_them(
    tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only = tmp_path / "only"
    (only / ".hidden").mkdir(parents=True)
    for name in ("a.tar.gz", "b.tgz", "c.tar.zip", ".hidden/d.tar.xz"):
        (only / name).write_bytes(b"")
    told = "2 compressed (a.tar.gz, b.tgz), in which no sample can be read by itself: m3i-fast data"
    with pytest.raises(ValueError, match=re.escape(f"(**/*.tar), got {told} pack reads")):
        find_tars(only, ["**/*.tar"])
    with pytest.raises(ValueError, match=r"expected tars \(b.tar\), got 1 compressed \(b.tgz\)"):
        find_tars(only, ["b.tar"])
    shutil.copytree(only, tars / "more")
    command = ["data", "index", str(tars), "--num-merges", "10", "--workers", "1"]
    assert main(command) == 0
    assert "left out: 2 compressed (more/a.tar.gz, more/b.tgz)" in capsys.readouterr().err
    assert main([*command, "--tars", "0*.tar"]) == 0
    assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "-3"], "--workers: expected at least 1, got -3"),
        (["--max-pixels", "0"], "--max-pixels: expected at least 1, got 0"),
        (["--class-names", "none.txt"], "--class-names: expected a text file in UTF-8, got 'No su"),
    ],
)
def test_wrong_flags_are_refused(
    tars: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "index", str(tars), "--num-merges", "10", *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tars / "manifest.json").exists()


def test_a_link_out_of_the_folder_is_refused(tars: Path, tmp_path: Path) -> None:
    (tars / "same.tar").symlink_to("00001.tar")
    assert len(find_tars(tars, ["*.tar"])) == 4
    shutil.copy(tars / "00001.tar", tmp_path / "secret.tar")
    (tars / "00009.tar").symlink_to(tmp_path / "secret.tar")
    with pytest.raises(ValueError, match=r"00009.tar: expected a tar in .*, got a link to"):
        find_tars(tars, ["*.tar"])


def test_what_was_packed_keeps_its_manifest(tmp_path: Path) -> None:
    path = pack(tmp_path / "data", [sample(i, PNG) for i in range(4)])
    before = files(path)
    with pytest.raises(ValueError, match="holds a data set that was packed, and needs no index"):
        index(path)
    (path / "manifest.json").write_text('{"of": "another program"}')
    with pytest.raises(ValueError, match="is not of this package, and is kept"):
        index(path)
    assert files(path) | {"manifest.json": b""} == before | {"manifest.json": b""}


def with_splits(root: Path) -> dict[str, bytes]:
    """Index a split that is good and one that is used too, and return all files."""
    write_tar(root / "train.tar", as_img2dataset(0, 3))
    write_tar(root / "val.tar", as_img2dataset(3, 2))
    index(root, group="json:key")
    return files(root)


def test_an_index_stays_where_another_one_fails(tmp_path: Path) -> None:
    root = tmp_path / "tars"
    before = with_splits(root)
    with pytest.raises(ValueError, match="expected each group in one split"):
        write_tar(root / "val.tar", as_img2dataset(2, 3))
        index(root, group="json:key")
    after = files(root)
    for name in ("manifest.json", "train.samples", "heldout.samples", "refused.jsonl"):
        assert after[name] == before[name]


def test_new_tables_never_stand_under_an_old_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "tars"
    with_splits(root)
    right = build.write_table

    def stopping(file: Path, parts: object) -> object:
        assert not (root / "manifest.json").exists()
        if file.name == "heldout.samples":
            raise KeyboardInterrupt
        return right(file, parts)  # type: ignore[arg-type]

    monkeypatch.setattr(build, "write_table", stopping)
    write_tar(root / "train.tar", as_img2dataset(10, 4))
    with pytest.raises(KeyboardInterrupt):
        index(root)
    assert not (root / "manifest.json").exists()
    monkeypatch.undo()
    assert index(root).splits["train"].num_samples == 4


def test_a_split_without_a_picture_is_left_out_and_named(
    tars: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = JPEG[:-40]
    write_tar(tars / "val.tar", [("a.jpg", broken)])
    write_tar(tars / "test.tar", [("a.jpg", b"no picture")])
    command = ["data", "index", str(tars), "--num-merges", "10", "--workers", "1", "--decode"]
    assert main(command) == 0
    said = capsys.readouterr().err
    for split in ("heldout", "test"):
        assert f"{split}: left out, since no picture of it can be used" in said
    assert list(read_manifest(tars).splits) == ["train"]
    assert len(refused(tars)) == 2 and not (tars / "heldout.samples").exists()


def test_two_processes_do_not_index_into_one_folder(tars: Path) -> None:
    with (
        locked(tars, build.RESULTS),
        pytest.raises(ValueError, match="is being indexed by another process"),
    ):
        index(tars)
    mine = tars / ".notes.tmp-1"
    mine.write_text("of the user")
    left = tars / ".manifest.json.tmp-1"
    left.write_text("of a killed index")
    index(tars)
    assert mine.exists() and not left.exists()


WORKER = """
import fcntl, os, sys, time
from pathlib import Path
from m3i_fast.pipelines.indexing import build

def wait(task):
    held = Path(task, f"{os.getpid()}.new").open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    Path(held.name).rename(Path(task, str(os.getpid())))
    time.sleep(120)

if __name__ == "__main__":
    build.run = wait
    list(build._finished([sys.argv[1]] * 2, 2))
"""


def test_processes_end_with_a_killed_index(tmp_path: Path) -> None:
    script, seen = tmp_path / "worker.py", tmp_path / "pids"
    script.write_text(WORKER)
    seen.mkdir()
    with subprocess.Popen([sys.executable, str(script), str(seen)]) as process:
        while len([file for file in seen.iterdir() if file.suffix != ".new"]) < 2:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    for file in seen.iterdir():
        assert is_free(file), file.name


def is_free(file: Path) -> bool:
    """Whether the process that held the lock of a file has ended, or does soon."""
    with file.open() as opened:
        for _ in range(1000):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            time.sleep(0.02)
    return False


@pytest.mark.parametrize("name", ["a/b", "../x", "", ".x"])
def test_a_split_is_the_name_of_a_file(
    tars: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    before = files(tars)
    assert main(["data", "index", str(tars), "--split", name]) == 2
    assert "--split: expected a name" in capsys.readouterr().err
    assert files(tars) == before


def test_the_command_that_restores_names_what_the_index_was_made_with(
    tars: Path, tmp_path: Path
) -> None:
    out = tmp_path / "the index"
    manifest = index(tars, out=out, caption=None, label="json:label", decode=True)
    command = how_to_restore(out, manifest).partition("m3i-fast ")[2]
    again = shlex.split(command)
    shutil.rmtree(out)
    assert main([*again, "--num-merges", "10", "--workers", "1"]) == 0
    recorded = read_manifest(out)
    assert recorded.settings == manifest.settings and recorded.splits == manifest.splits
