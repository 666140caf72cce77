"""A pack into a bucket: its objects are the files of a local pack, whatever stops it."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3i_fast.cli import main
from m3i_fast.pipelines.dataset.manifest import MANIFEST_NAME
from m3i_fast.pipelines.packing import bucket_output
from m3i_fast.pipelines.packing.items import SourceChanged, SourceOptions
from m3i_fast.pipelines.packing.job import Packed
from m3i_fast.pipelines.packing.readers.folders import Folders
from m3i_fast.pipelines.packing.shard_task import ShardTask
from m3i_fast.pipelines.packing.state import SETTINGS, check_unchanged
from m3i_fast.pipelines.packing.workers import Run, run_here, with_processes, with_ray
from m3i_fast.pipelines.storage.objects import Bucket
from tests.pipelines.packing.helpers import contents, make_folder, pack_with, picture, put
from tests.shared.pipelines.data import encode_image
from tests.shared.pipelines.objects_below import POLICY, objects
from tests.shared.pipelines.s3_server import Environ, Fault, S3Server, refuse

FLAGS: dict[str, Any] = {"samples_per_shard": 16, "split": ("heldout=0.2",), "name": "set"}
NUM_SHARDS = 5 + 2  # of 80 and 20 pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("folder") / "source", 100)


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    pack_with(folder, out, **FLAGS)
    found = contents(out)
    assert sum(name.endswith(".tar") for name in found) == NUM_SHARDS
    return found


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Also a short patience with the server."""
    monkeypatch.setattr(bucket_output, "UPLOAD_POLICY", POLICY)
    bucket_output._bucket.cache_clear()
    return tmp_path / "cache"


def pack_to(url: str, source: Path, cache: Path, run: Run = run_here, **flags: Any) -> Packed:
    return pack_with(source, Path(url), run, cache_dir=cache, **flags)


def number_of(server: S3Server, method: str, end: str) -> int:
    return sum(n for name, n in server.requests.items() if name.startswith(method) and end in name)


def while_putting(faults: list[Fault]) -> Fault:
    """Take the next of these faults for each object that is put."""

    def answer(environ: Environ, start_response: Any, real: Any) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "PUT" and faults:
            return faults.pop()(environ, start_response, real)
        return real()  # type: ignore[no-any-return]

    return answer


def lose_answer(environ: Environ, start_response: Any, real: Any) -> Iterator[bytes]:
    """Write the object, and close the connection without a word."""
    real()
    yield from ()
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionAbortedError("cut by the test")


@pytest.mark.parametrize("workers", [1, 2])
def test_its_objects_are_the_files_of_a_local_pack(
    folder: Path,
    undisturbed: dict[str, bytes],
    url: str,
    server: S3Server,
    cache: Path,
    workers: int,
) -> None:
    """Through refused requests and connections that are cut."""
    slow_down = refuse("503 Slow Down", "SlowDown")
    faults = {
        ".tar": [slow_down, slow_down, lose_answer, slow_down, lose_answer],
        ".tar.json": [lose_answer, slow_down],
        "settings.json": [lose_answer],
        MANIFEST_NAME: [refuse("500 Internal Server Error", "InternalError"), lose_answer],
    }
    for end, of_puts in faults.items():
        server.fault(end, while_putting(of_puts), 1000)
    pack_to(url, folder, cache, run_here if workers == 1 else with_processes(workers), **FLAGS)
    assert not any(faults.values())  # all of them came
    assert objects(url) == undisturbed
    puts = [name for name in server.requests if name.startswith("PUT")]
    assert puts[-1] == f"PUT {MANIFEST_NAME}"
    assert not [file for file in cache.rglob("*") if file.is_file()]
    for name, content in undisturbed.items():
        if name.endswith((".tar", ".samples")):
            assert Bucket(url).info(name).sha256 == hashlib.sha256(content).hexdigest()


def test_no_more_than_a_shard_a_process_lies_here(
    folder: Path, url: str, server: S3Server, cache: Path
) -> None:
    seen: list[int] = []

    def count(environ: Environ, start_response: Any, real: Any) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "PUT":
            seen.append(len(list(cache.rglob("*.tar.*"))))
        return real()  # type: ignore[no-any-return]

    server.fault(".tar", count, 100)
    pack_to(url, folder, cache, with_processes(2), **FLAGS)
    assert len(seen) == NUM_SHARDS and 1 <= min(seen) <= max(seen) <= 2


def test_a_picture_that_is_written_again_after_it_was_listed_ends_the_pack_which_goes_on(
    tmp_path: Path, url: str, cache: Path
) -> None:
    """By its time alone, which is no part of what a later start compares."""
    source = make_folder(tmp_path / "source", 6)

    def overwrite(tasks: Any, advance: Any) -> Any:
        put(source, "class 0/00000.png", (source / "class 0/00000.png").read_bytes())
        return run_here(tasks, advance)

    with pytest.raises(SourceChanged, match=r"class 0/00000\.png was changed after"):
        pack_to(url, source, cache, overwrite)
    pack_to(url, source, cache)


def stop_after(number: int) -> Run:
    def run(tasks: Any, advance: Any) -> Any:
        yield from run_here(tasks[:number], advance)
        raise KeyboardInterrupt

    return run


def test_it_goes_on_without_sending_a_shard_twice(
    folder: Path, undisturbed: dict[str, bytes], url: str, server: S3Server, cache: Path
) -> None:
    """Also on another machine, which has another cache; and a record was lost."""
    for start in range(2):
        with pytest.raises(KeyboardInterrupt):
            pack_to(url, folder, cache / str(start), stop_after(2), **FLAGS)
        assert MANIFEST_NAME not in objects(url)
        assert number_of(server, "PUT", ".tar.json") == 2 * start + 2
    server.fault("000004.tar.json", refuse("403 Forbidden", "AccessDenied"), 1)
    with pytest.raises(PermissionError, match=r"000004.tar.json \(put\): refused"):
        pack_to(url, folder, cache, **FLAGS)
    ran: list[str] = []

    def count(tasks: list[ShardTask], advance: Any) -> Any:
        ran.extend(task.name for task in tasks)
        return run_here(tasks, advance)

    pack_to(url, folder, cache, count, **FLAGS)
    assert objects(url) == undisturbed
    # The shard whose record was lost is packed again, and found there by its digest.
    assert ran[0] == "train-000004.tar" and len(ran) == 3
    for name in undisturbed:
        if name.endswith(".tar"):
            assert server.requests[f"PUT {name}"] == 1, name
    server.clear()
    again = pack_to(url, folder, cache, count, **FLAGS)
    assert again.was_there and len(again.refused) == 14 and len(ran) == 3
    assert not number_of(server, "PUT", "") and objects(url) == undisturbed


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_another_machine_has_the_source_elsewhere_and_with_other_times(
    url: str, server: S3Server, cache: Path, tmp_path: Path, kind: str
) -> None:
    """No picture that was hashed or packed is read again."""
    first = make_folder(tmp_path / "here", 40)
    if kind == "table":
        names = sorted(file.relative_to(first).as_posix() for file in first.rglob("*.png"))
        put(first, "table.csv", "\n".join(["image", *names]).encode())
    flags = {"samples_per_shard": 16, "name": "set", "group_near_duplicates": 4}
    source = "table.csv" if kind == "table" else ""
    ran: list[Any] = []

    def pack_of(root: Path, run: Run, number: int) -> None:
        pack_to(url, root / source, cache / str(number), run, **flags)

    def stop_in_shards(tasks: Any, advance: Any) -> Any:
        if isinstance(tasks[0], ShardTask):
            yield from run_here(tasks[:1], advance)
            raise KeyboardInterrupt
        yield from run_here(tasks, advance)

    def noting(tasks: Any, advance: Any) -> Any:
        ran.extend(tasks)
        return run_here(tasks, advance)

    pack_with(first / source, tmp_path / "out", **flags)
    with pytest.raises(KeyboardInterrupt):
        pack_of(first, stop_in_shards, 0)
    second = tmp_path / "mounted" / "there"
    shutil.copytree(first, second)
    for file in second.rglob("*"):
        os.utime(file, (1, 1))
    changed = put(second, "class 1/00001.png", (second / "class 1/00001.png").read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"1 changed \(class 1/00001.png\)"):
        pack_of(second, run_here, 1)
    changed.write_bytes(changed.read_bytes()[:-1])
    shutil.rmtree(first)
    pack_of(second, noting, 1)
    assert objects(url) == contents(tmp_path / "out")
    assert [task.name for task in ran] == ["train-000001.tar", "train-000002.tar"]


def test_the_list_of_a_pack_that_was_begun_later_replaces_none(
    folder: Path,
    undisturbed: dict[str, bytes],
    url: str,
    server: S3Server,
    cache: Path,
    tmp_path: Path,
) -> None:
    """Two machines begin at once; the second has seen no settings, and writes its list last."""
    other = make_folder(tmp_path / "other", 101)
    waiting = [True]

    def second_first(environ: Environ, start_response: Any, real: Any) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "PUT" and waiting:
            waiting.clear()
            answer = real()
            with pytest.raises(ValueError, match="another pack was begun there at the same time"):
                check_unchanged(later, {"name": "set"}, listing)
            return answer  # type: ignore[no-any-return]
        return real()  # type: ignore[no-any-return]

    later = bucket_output.BucketOutput.at(url, cache / "later")
    listing = Folders(SourceOptions(path=other, kind="folders")).list()
    read = type(later).read

    def none_yet(self: Any, name: str) -> bytes | None:
        """Let the second have looked for settings before the first wrote them."""
        return None if self is later and name == SETTINGS and waiting == [] else read(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bucket_output.BucketOutput, "read", none_yet)
        server.fault("settings.json", second_first, 1000)
        with pytest.raises(KeyboardInterrupt):
            pack_to(url, folder, cache / "first", stop_after(1), **FLAGS)
    assert not waiting and sum("/listed-" in name for name in objects(url)) == 2
    pack_to(url, folder, cache / "first", **FLAGS)
    assert objects(url) == undisturbed


def test_who_may_not_delete_packs_all_the_same(
    folder: Path,
    undisturbed: dict[str, bytes],
    url: str,
    server: S3Server,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    refused = refuse("403 Forbidden", "AccessDenied")

    def refuse_to_delete(environ: Environ, start_response: Any, real: Any) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "DELETE" or "delete" in environ["QUERY_STRING"]:
            return refused(environ, start_response, real)
        return real()  # type: ignore[no-any-return]

    server.fault("", refuse_to_delete, 1000)
    pack_to(url, folder, cache, **FLAGS)
    assert f"{url}/.packing/ is left, which nothing reads any more" in caplog.text
    found = objects(url)
    assert {name: found[name] for name in undisturbed} == undisturbed
    assert all(name in undisturbed or name.startswith(".packing/") for name in found)
    assert pack_to(url, folder, cache, **FLAGS).was_there


def test_what_differs_is_refused(folder: Path, url: str, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        pack_to(url, folder, cache, stop_after(1), **FLAGS)
    with pytest.raises(ValueError, match=f"DIR: {url} holds a pack .*: seed was 0, is 1"):
        pack_to(url, folder, cache, **FLAGS, seed=1)
    other = make_folder(tmp_path / "other", 101)
    with pytest.raises(ValueError, match=r"1 new \(class 1/00100.png\)"):
        pack_to(url, other, cache, **FLAGS)
    pack_to(url, folder, cache, **FLAGS)
    with pytest.raises(ValueError, match=rf"{url} holds a data set of another .* \(seed\)"):
        pack_to(url, folder, cache, **FLAGS, seed=1)
    Bucket(f"{url}/own", POLICY).put("holiday.png", b"x")
    with pytest.raises(ValueError, match="expected no objects, .* got holiday.png below s3://"):
        pack_to(f"{url}/own", folder, cache, **FLAGS)
    assert objects(f"{url}/own") == {"holiday.png": b"x"}


def test_two_at_once_are_refused(
    folder: Path, undisturbed: dict[str, bytes], url: str, cache: Path
) -> None:
    """On one machine by a lock, on two by the settings that the first has written."""

    def second(tasks: Any, advance: Any) -> Any:
        with pytest.raises(ValueError, match=f"{url} is being packed by another process"):
            pack_to(url, folder, cache, **FLAGS)
        return run_here(tasks, advance)

    pack_to(url, folder, cache, second, **FLAGS)
    out = bucket_output.BucketOutput.at(f"{url}/other", cache)
    out.create("settings.json", b"first")
    out.create("settings.json", b"first")  # an answer was lost, and it is sent again
    with pytest.raises(ValueError, match="another pack was begun there at the same time"):
        out.create("settings.json", b"second")
    assert objects(f"{url}/other") == {"settings.json": b"first"}


def test_a_compressed_source_is_spooled_here(url: str, cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "source" / "all.tar.gz"
    source.parent.mkdir()
    with tarfile.open(source, "w:gz") as tar:
        for i in range(20):
            tar.add(put(tmp_path, f"{i}.png", picture(i)), f"{i}.png")
    flags = {"samples_per_shard": 8, "name": "set"}
    pack_with(source, tmp_path / "out", **flags)
    with pytest.raises(KeyboardInterrupt):
        pack_to(url, source, cache, stop_after(1), **flags)
    assert sorted(file.name for file in cache.rglob("spool*")) == ["spool", "spool.key"]
    pack_to(url, source, cache, **flags)
    assert objects(url) == contents(tmp_path / "out")
    assert not [file for file in cache.rglob("*") if file.is_file()]


def test_what_a_person_types(
    folder: Path, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--workers", "1", "--num-merges", "100", "--cache-dir", str(tmp_path / "cache")]
    assert main(["data", "pack", str(folder), url, *flags]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"wrote {url}" in said and f"each by name, with what to do: {url}/refused.jsonl" in said
    assert main(["data", "pack", str(folder), "https://host/set", *flags]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "a web server lists no objects" in said and "data push DIR https://host/set" in said
    assert main(["data", "pack", url, str(tmp_path / "out"), *flags]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"got {url}: packing reads" in said and f"m3i-fast data index {url}" in said


@pytest.mark.nightly  # test_job has it in CI for a folder
def test_ray_writes_the_same_objects(
    folder: Path, undisturbed: dict[str, bytes], url: str, cache: Path
) -> None:
    pack_to(url, folder, cache, with_ray("local"), **FLAGS)
    assert objects(url) == undisturbed


@pytest.mark.matrix
def test_killed_at_random_moments_it_goes_on_to_the_same_objects(
    url: str, server: S3Server, tmp_path: Path
) -> None:
    """The verb with its processes, of shards that are sent in parts."""
    rng, moments = np.random.default_rng(0), random.Random(0)
    for i in range(120):
        pixels = rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)  # which PNG does not shrink
        put(tmp_path / "source", f"{i}.png", encode_image(pixels))
    flags = {"samples_per_shard": 20, "name": "set"}
    pack_with(tmp_path / "source", tmp_path / "out", **flags)
    words = "--samples-per-shard 20 --name set --num-merges 100 --context-length 16 --workers 2"
    command = [sys.executable, "-m", "m3i_fast.cli", "data", "pack", str(tmp_path / "source"), url]
    command += [*words.split(), "--cache-dir", str(tmp_path / "cache")]
    killed = 0
    while killed < 2:
        before = number_of(server, "PUT", ".tar") + number_of(server, "POST", ".tar")
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            if number_of(server, "PUT", ".tar") + number_of(server, "POST", ".tar") > before:
                break
            time.sleep(0.005)
        time.sleep(moments.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        killed += 1
        assert MANIFEST_NAME not in Bucket(url).list()
    assert subprocess.run(command, check=False).returncode == 0
    assert objects(url) == contents(tmp_path / "out")
