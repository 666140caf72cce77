"""Verify, stats and show of a bucket say what they say of the same files in a folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from m3i_fast.cli import main
from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer
from m3i_fast.pipelines.dataset.manifest import MANIFEST_NAME, read_manifest
from m3i_fast.pipelines.dataset.pack import write_dataset
from m3i_fast.pipelines.dataset.verification import verify
from m3i_fast.pipelines.dataset.verification.verify import find_faults
from m3i_fast.pipelines.storage import remote_files
from m3i_fast.pipelines.storage.objects import Bucket
from m3i_fast.pipelines.storage.remote_files import RemoteStream, opened_files
from m3i_fast.pipelines.storage.upload import push
from m3i_fast.report.data import gather
from tests.pipelines.storage.packed import table_of, write
from tests.shared.pipelines.data import encode_image, info, sample, smooth_picture
from tests.shared.pipelines.objects_below import put_all
from tests.shared.pipelines.s3_server import Environ, S3Server, cut, refuse

Found = list[tuple[str, str | None, str]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("packed") / "data")


@pytest.fixture
def copy(path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(path, tmp_path / "copy"))


def flip(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 0x40
    file.write_bytes(content)


def faults_of(where: Path, cache: Path) -> Found:
    """What verify finds, without what says where the data set lies."""
    with opened_files(where, cache, anew=True) as files:
        report = find_faults(files)
        return [
            (f.where, f.sample, f.reason.replace(files.place, "PLACE").split("; ")[0])
            for f in report.faults
        ]


def both(copy: Path, url: str, cache: Path) -> Found:
    """Upload a folder, damaged or not, and compare what is found there and here."""
    put_all(url, copy)
    here, there = faults_of(copy, cache), faults_of(Path(url), cache)
    assert there == here
    return there


@pytest.fixture(params=["pieces of 64 KiB", "pieces of 16 MiB"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "64" in request.param:
        monkeypatch.setattr(remote_files, "PIECE", 1 << 16)


def test_a_byte_that_was_changed_is_named_by_its_sample(
    copy: Path, url: str, tmp_path: Path, pieces: None
) -> None:
    assert both(copy, url, tmp_path) == []
    row = table_of(copy).rows[317]
    flip(copy / "train-000001.tar", int(row["offset"]) + 700)
    of_sample, of_shard = both(copy, url, tmp_path)
    assert of_sample[:2] == ("train-000001.tar", str(row["sample_id"]))
    assert f"PLACE/train-000001.tar: sample {row['sample_id']} (" in of_sample[2]
    assert "damaged: expected CRC-32C" in of_sample[2] and of_shard[1] is None
    flip(copy / "train-000000.tar", (copy / "train-000000.tar").stat().st_size - 700)
    assert len(both(copy, url, tmp_path)) == 3


def test_passing_faults_of_the_store_change_nothing(
    path: Path, url: str, server: S3Server, tmp_path: Path, pieces: None
) -> None:
    put_all(url, path)
    server.fault(".tar", refuse("503 Slow Down", "SlowDown"), 2)
    server.fault(".tar", cut, 2)
    assert faults_of(Path(url), tmp_path) == []


def test_objects_that_are_missing_cut_off_or_damaged_are_named(
    copy: Path, url: str, tmp_path: Path
) -> None:
    (copy / "train-000002.tar").unlink()
    tar = copy / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    flip(copy / "train-000000.tar", 1000)
    found = both(copy, url, tmp_path)
    assert [(where, sample is None) for where, sample, _ in found] == [
        ("train-000001.tar", True),
        ("train-000002.tar", True),
        ("train-000000.tar", False),
        ("train-000000.tar", True),
    ]
    flip(copy / "train.samples", 10)
    put_all(url, copy)
    first, *_ = faults_of(Path(url), tmp_path)
    assert first[0] == "train.samples" and "PLACE/train.samples: expected sha256" in first[2]


def test_the_table_is_read_again(copy: Path, url: str, tmp_path: Path) -> None:
    """Not the copy in the cache, of which training has compared the digest."""
    assert main(["data", "push", str(copy), url]) == 0
    assert main(["data", "stats", url, "--cache-dir", str(tmp_path)]) == 0
    flip(copy / "train.samples", 10)
    Bucket(url).put("train.samples", (copy / "train.samples").read_bytes())
    found = faults_of(Path(url), tmp_path)
    assert [where for where, _, _ in found] == ["train.samples"]


def test_an_object_that_is_changed_while_it_is_read_is_named(
    path: Path, url: str, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its ETag; the other shards are read all the same."""
    put_all(url, path)
    monkeypatch.setattr(remote_files, "PIECE", 1 << 14)
    monkeypatch.setattr(remote_files, "PIECES_AHEAD", 1)
    content = (path / "train-000001.tar").read_bytes()
    requests: list[str] = []

    def change(environ: Environ, start_response: Any, real: Any) -> Iterable[bytes]:
        requests.append(environ["REQUEST_METHOD"])
        answer = real()
        if len(requests) == 20:  # the first of them compared rows
            changed = content[:-1] + b"1"
            put = threading.Thread(target=lambda: Bucket(url).put("train-000001.tar", changed))
            put.start()
            put.join()
        return answer  # type: ignore[no-any-return]

    server.fault("000001.tar", change, 1000)
    ((where, sample, reason),) = faults_of(Path(url), tmp_path)
    assert (where, sample) == ("train-000001.tar", None)
    assert "PLACE/train-000001.tar: changed while it was read: expected ETag" in reason


def test_few_pieces_are_in_memory(
    path: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_all(url, path)
    monkeypatch.setattr(remote_files, "PIECE", 1 << 13)
    most = 0
    right = RemoteStream.pread

    def counting(self: RemoteStream, count: int, offset: int, /) -> bytes:
        nonlocal most
        content = right(self, count, offset)
        most = max(most, len(self._pieces))
        return content

    monkeypatch.setattr(RemoteStream, "pread", counting)
    assert faults_of(Path(url), tmp_path) == []
    assert 2 <= most <= remote_files.PIECES_AHEAD + 1


def test_what_verify_says(
    copy: Path, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_all(url, copy)
    flags = ["--cache-dir", str(tmp_path / "cache")]
    said = []
    for place in (str(copy), url):
        assert main(["data", "verify", place, "--decode", *flags]) == 0
        said.append(" ".join(capsys.readouterr().err.split()).replace(place, "PLACE"))
    assert said[0] == said[1] and "PLACE: good train: 650 pictures" in said[0]
    flip(copy / "train-000001.tar", 1000)
    put_all(url, copy)
    assert main(["data", "verify", url, *flags]) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert f"{url}: 2 faults; upload the data again (m3i-fast data push DIR {url})" in text
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]


def test_the_copies_of_a_killed_process_are_removed(path: Path, url: str, tmp_path: Path) -> None:
    """By the next one, and not those of one that lives."""
    put_all(url, path)
    code = (
        "import sys, time; from pathlib import Path\n"
        "from m3i_fast.pipelines.storage.remote_files import opened_files\n"
        "with opened_files(Path(sys.argv[1]), Path(sys.argv[2]), anew=True) as files:\n"
        "    print(files.folder, flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code, url, str(tmp_path)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        folder = Path(other.stdout.readline().strip())
        assert faults_of(Path(url), tmp_path) == [] and (folder / MANIFEST_NAME).is_file()
    finally:
        other.kill()
        other.communicate()
    assert (folder / MANIFEST_NAME).is_file()
    assert faults_of(Path(url), tmp_path) == []
    assert not folder.exists() and not list(tmp_path.glob("inspected-*"))


@pytest.mark.parametrize("shards", ["whole", "one is missing"])
@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_the_table_of_an_index_of_a_bucket_is_a_fault(
    copy: Path, url: str, tmp_path: Path, damage: str, shards: str
) -> None:
    put_all(url, copy)
    folder, manifest = tmp_path / "index", read_manifest(copy)
    folder.mkdir()
    (folder / MANIFEST_NAME).write_text(replace(manifest, shards_in=url).to_json())
    content = (copy / "train.samples").read_bytes()
    (folder / "train.samples").write_bytes(content)
    assert faults_of(folder, tmp_path) == []
    if damage == "missing":
        (folder / "train.samples").unlink()
    else:
        (folder / "train.samples").write_bytes(content[:-1])
    expected = ["train.samples"]
    if shards != "whole":
        Bucket(url).remove(["train-000001.tar"])
        expected.append("train-000001.tar")
    found = faults_of(folder, tmp_path)
    assert [where for where, _, _ in found] == expected
    said = {"missing": "a table, got none", "cut off": f"{len(content)} bytes, got"}[damage]
    assert f"PLACE/train.samples: expected {said}" in found[0][2]


@pytest.mark.parametrize("is_local", [True, False])
def test_a_shard_that_is_removed_after_its_size_was_compared_is_a_fault(
    copy: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_local: bool
) -> None:
    put_all(url, copy)
    right = verify.check_split

    def removing(*args: Any, **options: Any) -> None:
        (copy / "train-000001.tar").unlink()
        Bucket(url).remove(["train-000001.tar"])
        right(*args, **options)

    monkeypatch.setattr(verify, "check_split", removing)
    found = faults_of(copy if is_local else Path(url), tmp_path)
    assert found and {where for where, _, _ in found} <= {"train", "train-000001.tar"}
    assert all("train-000001.tar" in reason for _, _, reason in found)


@pytest.mark.parametrize("flags", [[], ["--json"], ["--read", "7"]])
def test_stats_are_equal(
    path: Path,
    url: str,
    server: S3Server,
    tmp_path: Path,
    flags: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    put_all(url, path)
    server.clear()
    said = []
    for place in (str(path), url):
        assert main(["data", "stats", place, *flags, "--cache-dir", str(tmp_path)]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "650" in said[0]
    number = sum(n for name, n in server.requests.items() if name.endswith(".tar"))
    assert number == (7 if "--read" in flags else 650)  # a sample a request
    Bucket(url).put("train-000001.tar", b"short")
    with pytest.raises(ValueError, match=f"{url}/train-000001.tar: expected .* bytes, got 5; uplo"):
        from m3i_fast.cli.data import main as data

        data(["stats", url, "--cache-dir", str(tmp_path)])


def test_the_page_is_equal(
    url: str, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What packing refused stands on it too; samples that are shown are read alone."""
    image = encode_image(smooth_picture(0, 40, 60))
    samples = [sample(i, image, captions=()) for i in range(60)]
    about = info(tokenizer=Tokenizer(100, 16).info)
    path = write_dataset(tmp_path / "data", {"train": samples}, about, seed=0, samples_per_shard=16)
    row = {"file": "a.gif", "reason": "a GIF", "what_to_do": "convert it"}
    (path / "refused.jsonl").write_text(json.dumps(row))
    monkeypatch.setenv("HOME", str(tmp_path))  # the cache's default folder is in it
    push(path, url)
    server.clear()
    pages = []
    for number, place in enumerate((str(path), url)):
        out = tmp_path / f"{number}.html"
        words = ["data", "show", place, "--out", str(out), "--num", "5", "--counted", "200"]
        assert main([*words, "--recipe", "demo"]) == 0
        pages.append(out.read_text())
    assert pages[0] == pages[1] and "a.gif" in pages[1] and "convert it" in pages[1]
    assert server.requests["GET refused.jsonl"] == 1
    of_shown = server.requests[f"GET {MANIFEST_NAME}"]
    samples_read = sum(n for name, n in server.requests.items() if name.endswith(".tar"))
    server.clear()
    words = ["data", "show", url, "--out", str(out), "--num", "50", "--counted", "20"]
    monkeypatch.setattr(gather, "_AT_ONCE", 8)  # the set is opened once, not for each batch
    assert main([*words, "--recipe", "demo"]) == 0
    assert server.requests[f"GET {MANIFEST_NAME}"] == of_shown
    read = sum(n for name, n in server.requests.items() if name.endswith(".tar"))
    assert read <= 60 + samples_read, (read, samples_read)


def test_a_set_that_is_not_there_is_said(url: str, tmp_path: Path) -> None:
    from m3i_fast.cli.data import main as data

    for verb in ("verify", "stats"):
        with pytest.raises(FileNotFoundError, match=f"{url}/manifest.json: not found"):
            data([verb, url, "--cache-dir", str(tmp_path)])
