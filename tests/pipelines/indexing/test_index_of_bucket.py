"""Tars in a bucket are indexed as those in a folder, and trained on where they lie."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from m3i_fast.cli.data import main
from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.pipelines.dataset.manifest import MANIFEST_NAME, read_manifest
from m3i_fast.pipelines.dataset.verification.verify import find_faults
from m3i_fast.pipelines.indexing.tar_places import BucketTars, _expression
from m3i_fast.pipelines.loader import Loader
from m3i_fast.pipelines.storage.objects import Bucket
from m3i_fast.pipelines.storage.remote_files import opened_files
from tests.pipelines.indexing.tars import PNG, as_img2dataset, write_tar
from tests.shared.pipelines.data import equal, pack, sample
from tests.shared.pipelines.objects_below import objects, put_all
from tests.shared.pipelines.s3_server import Environ, S3Server, cut, refuse

FLAGS = ["--num-merges", "100", "--name", "tars", "--workers", "1"]


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures in three tars, of which one lies in a folder and one is cut off."""
    root = tmp_path_factory.mktemp("tars")
    write_tar(root / "00000.tar", as_img2dataset(0, 16))
    write_tar(root / "more" / "val-1.tar", as_img2dataset(16, 8))
    last = write_tar(root / "00002.tar", as_img2dataset(24, 16))
    last.write_bytes(last.read_bytes()[:-12_000])
    write_tar(root / ".hidden" / "3.tar", as_img2dataset(0, 1))
    (root / "notes.txt").write_text("none")
    return root


@pytest.fixture
def here(tars: Path, tmp_path: Path) -> Path:
    """The index of the folder."""
    assert main(["index", str(tars), "--out", str(tmp_path / "here"), *FLAGS]) == 0
    return tmp_path / "here"


@pytest.fixture
def there(tars: Path, url: str, server: S3Server) -> str:
    put_all(url, tars)
    server.clear()
    return url


def without_place(folder: Path) -> dict[str, bytes]:
    """The files of an index, as if the tars lay beside it."""
    manifest = replace(read_manifest(folder), shards_in=None)
    found = {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}
    return found | {MANIFEST_NAME: manifest.to_json().encode()}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_index_in_a_folder_is_that_of_the_tars_in_a_folder(
    here: Path, there: str, server: S3Server, tmp_path: Path, workers: str
) -> None:
    server.fault("00002.tar", refuse("503 Slow Down", "SlowDown"), 2)
    server.fault("val-1.tar", cut, 2)
    out = tmp_path / "out"
    assert main(["index", there, "--out", str(out), *FLAGS, "--workers", workers]) == 0
    assert without_place(out) == without_place(here)
    assert read_manifest(out).shards_in == there and not list(out.glob(".*"))
    assert read_manifest(out).digest == read_manifest(here).digest
    # Each tar once, and the beginning of the first for what its samples hold.
    assert server.requests["GET 00000.tar"] == 2 and server.requests["GET 00002.tar"] == 3


def test_an_index_beside_the_tars_is_that_of_the_folder(
    here: Path, tars: Path, there: str, server: S3Server, tmp_path: Path
) -> None:
    words = ["index", there, *FLAGS, "--cache-dir", str(tmp_path / "cache")]
    server.fault(MANIFEST_NAME, fail_to_put, 100)
    with pytest.raises(PermissionError):
        main(words)
    found = objects(there)
    assert MANIFEST_NAME not in found and "train.samples" in found
    server.clear()
    assert main(words) == 0
    # Stopped before the manifest was there, it went on without reading a tar again.
    assert not any(server.requests[f"GET 0000{i}.tar"] > 1 for i in (0, 2))
    assert server.requests["GET val-1.tar"] == 0
    found = objects(there)
    expected = without_place(here)
    assert {name: found[name] for name in expected} == expected
    in_tars = {f.relative_to(tars).as_posix() for f in tars.rglob("*") if f.is_file()}
    assert set(found) == in_tars | set(expected)
    assert not list((tmp_path / "cache" / "indexing").iterdir())
    assert main(words) == 0  # an index may be made anew
    assert objects(there) == found


def fail_to_put(environ: Environ, start_response: Any, real: Any) -> Iterable[bytes]:
    if environ["REQUEST_METHOD"] == "PUT":
        return refuse("403 Forbidden", "AccessDenied")(environ, start_response, real)
    return real()  # type: ignore[no-any-return]


@pytest.mark.parametrize("is_beside", [True, False])
def test_it_is_trained_on_where_it_lies(
    here: Path, there: str, tmp_path: Path, is_beside: bool
) -> None:
    """Through lanes, with the batches of the tars in a folder; and is verified there."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    words = ["--cache-dir", str(cache)] if is_beside else ["--out", str(out)]
    assert main(["index", there, *FLAGS, *words]) == 0
    cfg = LoaderConfig(
        path=Path(there) if is_beside else out,
        batch_size=4,
        global_views=ViewConfig(size=8),
        lanes=2,
        fetch_ahead=16,
        cache_dir=cache,
        backend="torch",
    )
    remote, local = Loader(cfg), Loader(replace(cfg, path=here))
    assert remote._open.lanes is not None
    local._open = replace(local._open, lanes=remote._open.lanes)
    for _ in range(17):  # two epochs
        assert equal(next(remote), next(local))
    remote.close()
    with opened_files(cfg.path, cache, anew=True) as files:
        assert find_faults(files).faults == []
    content = bytearray(Bucket(there).read("00000.tar"))
    content[5000] ^= 1
    Bucket(there).put("00000.tar", bytes(content))
    with opened_files(cfg.path, cache, anew=True) as files:
        of_sample, of_shard = find_faults(files).faults
        assert f"m3i-fast data index {there}" in files.restore
    assert of_sample.sample is not None and f"{there}/00000.tar: sample" in of_sample.reason
    assert of_shard.where == "00000.tar" and "expected sha256" in of_shard.reason


def test_a_tar_that_changes_meanwhile_is_named(there: str, tars: Path, tmp_path: Path) -> None:
    found = BucketTars(there, ["**/*.tar"], is_beside=False)
    Bucket(there).put("00000.tar", (tars / "00000.tar").read_bytes() + b"\0" * 512)
    with pytest.raises(ValueError, match=f"{there}/00000.tar: changed while it was read"):
        with found.tar("00000.tar").local(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_is_refused(there: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a web server lists no objects"):
        main(["index", "https://host/tars", "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match=r"--out: expected a folder, .* got s3://other/x"):
        main(["index", there, "--out", "s3://other/x"])
    with pytest.raises(ValueError, match=r"expected tars \(b/\*.tar\), got none"):
        main(["index", there, "--tars", "b/*.tar"])
    with pytest.raises(ValueError, match="--tars: expected a pattern below the URL, got '../x.tar"):
        main(["index", there, "--tars", "../x.tar"])
    packed = pack(tmp_path / "packed", [sample(i, PNG) for i in range(4)])
    assert main(["push", str(packed), f"{there}/packed"]) == 0
    with pytest.raises(ValueError, match=f"{there}/packed holds a data set that was packed"):
        main(["index", f"{there}/packed"])
    index = tmp_path / "index"
    assert main(["index", there, "--out", str(index), *FLAGS]) == 0
    with pytest.raises(ValueError, match=f"an index of those in {there}"):
        main(["push", str(index), f"{there}/elsewhere"])


@pytest.mark.parametrize(
    "pattern",
    ["**/*.tar", "*.tar", "more/*.tar", "*/*.tar", "0000[02].tar", "?????.tar", "**/[!v]*"],
)
def test_a_pattern_means_what_it_means_in_a_folder(tars: Path, pattern: str) -> None:
    names = sorted(f.relative_to(tars).as_posix() for f in tars.glob(pattern) if f.is_file())
    every = [f.relative_to(tars).as_posix() for f in tars.rglob("*") if f.is_file()]
    expression = _expression(pattern)
    assert sorted(name for name in every if expression.fullmatch(name)) == names != []


def test_pictures_of_an_index_are_shown(
    here: Path, there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    out = tmp_path / "out"
    assert main(["index", there, "--out", str(out), *FLAGS]) == 0
    pages = []
    for path in (here, out):
        words = ["show", str(path), "--out", str(tmp_path / "page.html"), "--num", "3"]
        assert main([*words, "--recipe", "demo", "--counted", "99"]) == 0
        pages.append((tmp_path / "page.html").read_text())
    assert pages[0] == pages[1] and "picture 1" in pages[0]
