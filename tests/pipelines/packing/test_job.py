"""The job: one result whatever the processes, kills and order; what it goes on with."""

from __future__ import annotations

import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from m3i_fast.benchmarks.faults.failing_files import FaultyFiles, killed_at
from m3i_fast.pipelines.dataset.manifest import is_dataset, read_manifest
from m3i_fast.pipelines.dataset.verification.verify import verify
from m3i_fast.pipelines.packing.items import SourceChanged
from m3i_fast.pipelines.packing.shard_task import ShardTask
from m3i_fast.pipelines.packing.workers import run_here, with_processes, with_ray
from tests.pipelines.packing.helpers import (
    contents,
    make_folder,
    pack_with,
    picture,
    put,
    refused_of,
    rows_of,
    sizes,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("folder") / "source", 300)


FLAGS = {"samples_per_shard": 16, "split": ("heldout=0.2",), "name": "set"}


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    packed = pack_with(folder, out, **FLAGS)
    assert len(packed.refused) == 43
    assert sum(sizes(packed.manifest).values()) == 300 - 43
    return contents(out)


@pytest.mark.parametrize("workers", [2, 4])
def test_the_bytes_do_not_depend_on_the_workers(
    folder: Path, undisturbed: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    pack_with(folder, tmp_path / "out", with_processes(workers), **FLAGS)
    assert contents(tmp_path / "out") == undisturbed


COMMAND = [sys.executable, "-m", "m3i_fast.cli", "data", "pack"]
FLAG_WORDS = "--samples-per-shard 16 --split heldout=0.2 --name set --num-merges 100".split()


def pack_killed(source: Path, out: Path, times: int, **more: Any) -> None:
    """Kill the verb and its processes' parent at random moments of the packing, then let it end."""
    rng = random.Random(0)
    command = [*COMMAND, str(source), str(out), *FLAG_WORDS, "--context-length", "16"]
    command += [word for name, value in more.items() for word in (f"--{name}", str(value))]
    killed = 0
    while True:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        if killed < times:
            # From the first record that this start writes on, since it takes long to begin.
            before = len(list(out.glob(".packing/*.tar.json")))
            while process.poll() is None and not is_dataset(out):
                if len(list(out.glob(".packing/*.tar.json"))) > before:
                    break
                time.sleep(0.001)
            time.sleep(rng.random() * 0.05)
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
            assert process.stderr is not None
            process.stderr.close()
            if killed and not is_dataset(out):
                continue
        _, said = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), said
        if process.returncode == 0:
            assert killed == times, f"ended after {killed} kills"
            return


def test_a_pack_that_is_told_to_stop_says_how_to_go_on(folder: Path, tmp_path: Path) -> None:
    out, command = tmp_path / "out", [*COMMAND, str(folder), str(tmp_path / "out"), *FLAG_WORDS]
    for asked in (signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        before = len(list(out.glob(".packing/*.tar.json")))
        while process.poll() is None and len(list(out.glob(".packing/*.tar.json"))) == before:
            time.sleep(0.001)
        process.send_signal(asked)
        _, said = process.communicate()
        assert process.returncode == 128 + asked, said
        assert "stopping: type the same command again, and the pack goes on where it was" in said
        assert "Traceback" not in said
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True)
    assert "going on: " in ended.stderr and is_dataset(out)


def test_a_pack_that_is_killed_five_times_goes_on_to_the_same_bytes(
    folder: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    rng, out = random.Random(0), tmp_path / "out"
    for kill in range(5):
        child = os.fork()
        if child == 0:
            try:
                pack_with(folder, out, **FLAGS)
            finally:
                os._exit(1)
        while len(list(out.glob(".packing/*.tar.json"))) < 1 + 3 * kill:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.05)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert not is_dataset(out)
    pack_with(folder, out, **FLAGS)
    assert contents(out) == undisturbed


@pytest.mark.nightly
def test_twenty_thousand_pictures_are_killed_five_times(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", 20_000)
    flags = FLAGS | {"samples_per_shard": 256}
    pack_with(source, tmp_path / "undisturbed", with_processes(2), **flags)
    pack_killed(source, tmp_path / "out", 5, workers=2, **{"samples-per-shard": 256})
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("power_cut", [False, True])
def test_killed_at_any_write_it_goes_on_to_the_same_bytes(tmp_path: Path, power_cut: bool) -> None:
    """Before each of some writes, spread over the pack; nothing half-written looks finished."""
    source = make_folder(tmp_path / "source", 12)
    flags: dict[str, Any] = {"samples_per_shard": 5, "name": "set"}
    pack_with(source, tmp_path / "whole", **flags)
    expected = contents(tmp_path / "whole")
    number = 0
    while True:
        out = tmp_path / f"out{number}"
        if not killed_at(
            lambda o=out: pack_with(source, o, **flags), out, number, power_cut=power_cut
        ):
            break
        if is_dataset(out):
            assert verify(out) == read_manifest(tmp_path / "whole")
        pack_with(source, out, **flags)
        assert contents(out) == expected, number
        number += 17
    assert number > 50


def test_finished_shards_are_not_written_again(folder: Path, tmp_path: Path) -> None:
    ran: list[str] = []

    def stop_after_four(tasks: Any, advance: Any) -> Any:
        for task, record in run_here(tasks[:4], advance):
            ran.append(task.name)
            yield task, record
        raise KeyboardInterrupt

    def count(tasks: list[ShardTask], advance: Any) -> Any:
        ran.extend(task.name for task in tasks)
        return run_here(tasks, advance)

    with pytest.raises(KeyboardInterrupt):
        pack_with(folder, tmp_path / "out", stop_after_four, **FLAGS)
    pack_with(folder, tmp_path / "out", count, **FLAGS)
    assert len(ran) == len(set(ran)) == len(list((tmp_path / "out").glob("*.tar")))
    del ran[:]
    packed = pack_with(folder, tmp_path / "out", count, **FLAGS)
    assert packed.was_there and len(packed.refused) == 43 and not ran
    with pytest.raises(ValueError, match=r"holds a data set of another .* \(seed\): name another"):
        pack_with(folder, tmp_path / "out", **FLAGS, seed=1)


def stop(tasks: Any, advance: Any) -> Any:
    yield from run_here(tasks[:1], advance)
    raise KeyboardInterrupt


def test_a_changed_source_or_setting_is_refused_with_what_changed(tmp_path: Path) -> None:
    source, out = make_folder(tmp_path / "source", 12), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        pack_with(source, out, stop, samples_per_shard=4)
    with pytest.raises(ValueError, match="seed was 0, is 3; max_pixels was .*, is 99999"):
        pack_with(source, out, samples_per_shard=4, seed=3, max_pixels=99999)
    put(source, "class 0/00000.png", picture(99))
    put(source, "class 1/new.png")
    (source / "class 2/00002.png").unlink()
    message = (
        r"1 new \(class 1/new.png\), 1 gone \(class 2/00002.png\), 1 changed \(class 0/00000.png\)"
    )
    with pytest.raises(ValueError, match=message):
        pack_with(source, out, samples_per_shard=4)
    assert not is_dataset(out)


WORDS = ("heron", "badger", "walrus", "cricket", "otter", "falcon")
CHANGING = ("folder", "tar", "tar.gz", "csv", "jsonl", "parquet", "huggingface", "packed")


def captioned(kind: str, source: Path, order: Sequence[int]) -> Path:
    """Write pictures and their captions in some order; return the file that is written last."""
    names = [f"{place}.bmp" for place in range(len(order))]
    pictures = [picture(n, "BMP") for n in order]  # of equal size
    captions = [WORDS[n] for n in order]
    source.mkdir(exist_ok=True)
    if kind in ("folder", "csv", "jsonl", "packed"):
        for name, content, caption in zip(names, pictures, captions, strict=True):
            put(source, name, content)
            put(source, f"{name[:-4]}.txt", caption.encode())
    file = source / (names[-1] if kind == "folder" else f"t.{kind}")
    rows = list(zip(names, captions, strict=True))
    if kind == "csv":
        file.write_text("file,caption\n" + "".join(f"{name},{said}\n" for name, said in rows))
    elif kind == "jsonl":
        file.write_text("".join(json.dumps({"file": n, "caption": c}) + "\n" for n, c in rows))
    elif kind in ("tar", "tar.gz"):
        with tarfile.open(file, "w:gz" if kind == "tar.gz" else "w") as tar:
            for n, content in zip(order, pictures, strict=True):
                for extension, member in (("bmp", content), ("txt", WORDS[n].encode())):
                    header = tarfile.TarInfo(f"{n}.{extension}")
                    header.size = len(member)
                    tar.addfile(header, io.BytesIO(member))
    elif kind == "parquet":
        parquet.write_table(pyarrow.table({"image": pictures, "caption": captions}), file)
    elif kind == "huggingface":
        made = datasets.Dataset.from_dict({"image": pictures, "caption": captions})
        made.save_to_disk(str(source / "new"))
        for new in (source / "new").iterdir():
            new.replace(source / new.name)
        (source / "new").rmdir()
        file = next(source.glob("*.arrow"))
    elif kind == "packed":
        pack_with(source, source.parent / "new", name="set", kind="folder")
        shutil.rmtree(source)
        (source.parent / "new").rename(source)
        file = source / "train-000000.tar"
    return file


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("kind", CHANGING)
def test_a_source_that_changes_after_it_was_listed_ends_the_pack_which_goes_on(
    kind: str, hashed: bool, tmp_path: Path
) -> None:
    """No picture gets the caption of another one, neither here nor at the next start."""
    source, out, done = tmp_path / "source", tmp_path / "out", list[str]()
    flags: dict[str, Any] = {"samples_per_shard": 2}
    if hashed:
        flags |= {"group_near_duplicates": 0}
    file = captioned(kind, source, range(6))
    named = file if kind in ("csv", "jsonl") else source

    def overwrite(tasks: Any, advance: Any) -> Any:
        time.sleep(0.01)
        captioned(kind, source, [5, 4, 3, 2, 1, 0])
        for task, record in run_here(tasks, advance):
            done.append(task.record_file)
            yield task, record

    with pytest.raises(SourceChanged) as caught:
        pack_with(named, out, overwrite, **flags)
    assert any(str(each) in str(caught.value) for each in (file, *source.glob("?.bmp")))
    assert not done and not is_dataset(out)
    pack_with(named, out, **flags)
    rows = rows_of(out)
    assert len(rows) == 6
    for row in rows:
        (number,) = (n for n in range(6) if (picture_pixels(n) == row.pixels).all())
        assert row.captions == (WORDS[number],)


def picture_pixels(number: int) -> Any:
    return np.asarray(Image.open(io.BytesIO(picture(number, "BMP"))).convert("RGB"))


def test_a_tar_with_other_members_of_its_size_and_time_ends_the_pack(tmp_path: Path) -> None:
    """As a copy that keeps times, which a listing for a bucket does not compare anyway."""
    source = tmp_path / "source"
    file = captioned("tar", source, range(6))
    before = file.stat()

    def overwrite(tasks: Any, advance: Any) -> Any:
        captioned("tar", source, [5, 4, 3, 2, 1, 0])
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_size == before.st_size
        return run_here(tasks, advance)

    with pytest.raises(SourceChanged, match=r"t\.tar was changed .* without the picture that was"):
        pack_with(source, tmp_path / "out", overwrite)


def test_shards_without_a_picture_that_changed_are_kept(folder: Path, tmp_path: Path) -> None:
    source, out, done = tmp_path / "source", tmp_path / "out", list[str]()
    shutil.copytree(folder, source)

    def overwrite(tasks: Any, advance: Any) -> Any:
        for task, record in run_here(tasks, advance):
            done.append(task.name)
            yield task, record
            last = tasks[-1].items[0].item.name
            put(source, last, (source / last).read_bytes())

    with pytest.raises(SourceChanged, match="bytes written at .*, and was .* Start again when"):
        pack_with(source, out, overwrite, **FLAGS)
    ran: list[str] = []

    def count(tasks: list[ShardTask], advance: Any) -> Any:
        ran.extend(task.name for task in tasks)
        return run_here(tasks, advance)

    pack_with(source, out, count, **FLAGS)
    assert len(done) > 10 and len(ran) == 1 and not set(ran) & set(done)


@pytest.mark.parametrize("fail_at", [0, 3, 8, 20])
def test_a_full_disk_is_named_with_the_flag_and_the_pack_goes_on(
    fail_at: int, tmp_path: Path
) -> None:
    source, out = captioned("tar.gz", tmp_path / "source", range(6)), tmp_path / "out"
    with FaultyFiles(out, fail_at=fail_at), pytest.raises(OSError) as caught:
        pack_with(source, out, samples_per_shard=2)
    said = str(caught.value)
    assert re.match(r"DIR: No space left on device: \S+: free some space", said)
    assert said.endswith("the pack goes on where it was, or name another DIR")
    assert len(pack_with(source, out, samples_per_shard=2).manifest.splits["train"].shards) == 3


@pytest.mark.parametrize("kind", ["folder", "tar.gz"])
def test_a_file_that_is_too_large_is_named_with_the_flag(kind: str, tmp_path: Path) -> None:
    """Of a shard and of the spool, of which some bytes are written when it is closed."""
    source, out = tmp_path / "source", tmp_path / "out"
    captioned(kind, source, range(6))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            pack_with(source, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.match(rf"DIR: File too large.*: {out}.*: raise ulimit -f", str(caught.value))
    assert not list(tmp_path.rglob(".*.tmp-*"))
    pack_with(source, out)


def test_the_spool_is_synced_before_its_key_is_written(tmp_path: Path) -> None:
    """Else after a power cut a key says that pictures are there, and all of them are refused."""
    source, out = captioned("tar.gz", tmp_path / "source", range(6)), tmp_path / "out"
    with FaultyFiles(out) as files:
        pack_with(source, out)
    done = [(each.kind, re.sub(r"\d+$", "", each.path)) for each in files.operations]
    order = [
        done.index(step)
        for step in (
            ("fsync", ".packing/.spool.tmp-"),
            ("replace", ".packing/spool"),
            ("fsync", ".packing"),
            ("open", ".packing/.spool.key.tmp-"),
        )
    ]
    assert order == sorted(order)


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    source, out = make_folder(tmp_path / "source", 6), tmp_path / "out"

    def second(tasks: Any, advance: Any) -> Any:
        with pytest.raises(ValueError, match="is being packed by another process"):
            pack_with(source, out)
        return run_here(tasks, advance)

    pack_with(source, out, second)


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", 6)
    put(tmp_path / "out", "holiday.png")
    with pytest.raises(ValueError, match="expected a new or empty directory, got other files"):
        pack_with(source, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["holiday.png"]
    with pytest.raises(ValueError, match="expected a directory, got a file"):
        pack_with(source, put(tmp_path, "file"))


def test_a_process_that_is_ended_is_said_and_the_pack_goes_on(
    folder: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """As the system ends one where memory is short."""

    def with_murder(tasks: Any, advance: Any) -> Any:
        for i, done in enumerate(with_processes(2)(tasks, advance)):
            if i == 1:
                for child in workers_of(os.getpid()):
                    os.kill(child, signal.SIGKILL)
            yield done

    with pytest.raises(RuntimeError, match="start again with fewer --workers"):
        pack_with(folder, tmp_path / "out", with_murder, **FLAGS)
    pack_with(folder, tmp_path / "out", **FLAGS)
    assert contents(tmp_path / "out") == undisturbed


def workers_of(parent: int) -> list[int]:
    """Return the processes of the pool: children of the fork server, which is a child."""
    import psutil

    found = psutil.Process(parent).children(recursive=True)
    return [p.pid for p in found if "forkserver" in " ".join(p.cmdline()) and p.ppid() != parent]


# ---- Splits, groups, limit -----------------------------------------------------------------------


def test_shares_and_limits(folder: Path, tmp_path: Path) -> None:
    splits = ("heldout=0.25", "tune=0.1")
    first = pack_with(folder, tmp_path / "first", split=splits, limit=100)
    shares = sizes(first.manifest)
    assert sum(shares.values()) + len(first.refused) == 100
    names = ("train", "heldout", "tune")
    ids = {split: {row.sample_id for row in rows_of(tmp_path / "first", split)} for split in names}
    assert not ids["train"] & ids["heldout"] and not ids["tune"] & ids["heldout"]
    assert 18 <= shares["heldout"] <= 25 and 6 <= shares["tune"] <= 10
    second = pack_with(folder, tmp_path / "second", split=splits, limit=100, seed=1)
    other = {row.sample_id for row in rows_of(tmp_path / "second", "train")}
    assert other != ids["train"] and sizes(second.manifest).keys() == shares.keys()
    pack_with(folder, tmp_path / "named", split=("mine",), limit=9)
    assert set(read_manifest(tmp_path / "named").splits) == {"mine"}


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (("a/b",), "--split: expected a name of letters, digits and _, got 'a/b'"),
        (("x=2",), r"--split x=SHARE: expected a share in \(0, 1\), got '2'"),
        (("x=0.5", "y=0.5"), "expected shares that leave something over"),
        (("a", "b"), r"expected some of train, which the source has, got \['a', 'b'\]"),
        (("train=0.5",), "the source has a split train already"),
    ],
)
def test_wrong_splits_are_refused(
    folder: Path, tmp_path: Path, splits: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pack_with(folder, tmp_path / "out", split=splits)
    assert not (tmp_path / "out").exists()


def test_groups_stay_together_and_are_named_by_a_picture_that_is_there(tmp_path: Path) -> None:
    """The first of every group is no picture, which is known only when it is decoded."""
    lines = ["file,group"]
    for i in range(60):
        put(tmp_path, f"{i}.png", b"none" if i % 3 == 0 else None)
        lines.append(f"{i}.png,g{i // 3}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    flags: dict[str, Any] = {"split": ("heldout=0.3",), "samples_per_shard": 7}
    packed = pack_with(tmp_path / "t.csv", tmp_path / "out", **flags)
    assert len(packed.refused) == 20 and sizes(packed.manifest) == {"train": 28, "heldout": 12}
    for split in ("train", "heldout"):
        for row in rows_of(tmp_path / "out", split):
            assert row.group_id == row.sample_id // 3 * 3 + 1
    packed = pack_with(
        tmp_path / "t.csv", tmp_path / "other", with_processes(2), **flags, name="out"
    )
    assert contents(tmp_path / "other") == contents(tmp_path / "out")


def test_samples_are_shuffled_over_all_shards(folder: Path, tmp_path: Path) -> None:
    pack_with(folder, tmp_path / "out", samples_per_shard=16)
    rows = np.fromfile(tmp_path / "out" / "train.samples", "<i8").reshape(-1, 6)
    ids = rows[:, 1]
    assert len(set(ids.tolist())) == len(ids) == 257
    assert abs(np.corrcoef(ids, np.arange(len(ids)))[0, 1]) < 0.2


@pytest.mark.distributed
def test_ray_writes_the_same_bytes(tmp_path: Path) -> None:
    """Shards as tasks of a Ray cluster that this machine is."""
    for i in range(40):
        put(tmp_path / "source", f"{'ab'[i % 2]}/{i}.png", b"none" if i % 9 == 0 else None)
    flags = {"samples_per_shard": 8, "name": "set"}
    here = pack_with(tmp_path / "source", tmp_path / "here", **flags)
    there = pack_with(tmp_path / "source", tmp_path / "there", with_ray("local"), **flags)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert refused_of(there) == refused_of(here) and len(there.refused) == 5
