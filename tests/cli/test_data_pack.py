"""`m3i-fast data pack` as a person types it, on folders that no one prepared, up to training."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from m3i_fast.cli import main
from m3i_fast.observe.metrics import read_jsonl
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.dataset.verification.verify import verify
from tests.shared.pipelines.data import encode_image, smooth_picture

SMALL = ["--num-merges", "100", "--context-length", "16", "--workers", "1"]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("package", "least"), [("skimage", 20), ("sklearn", 2), ("sphinx", 20), ("networkx", 3)]
)
def test_pictures_inside_installed_packages_are_packed(
    package: str, least: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whose folders were made for anything but training."""
    found = importlib.util.find_spec(package)
    assert found is not None and found.origin is not None
    out = tmp_path / "out"
    assert main(["data", "pack", str(Path(found.origin).parent), str(out), *SMALL]) == 0
    text = said(capsys)
    manifest = verify(out, decode=True)
    number = manifest.splits["train"].num_samples
    assert number >= least
    assert f"train: {number} pictures in {number} groups" in text
    assert "files are not called like pictures" in text and f"wrote {out}" in text
    lines = (out / "refused.jsonl").read_text().splitlines()
    assert len(lines) == manifest.settings["num_refused"]
    num_unread = sum("pictures are not read" in line for line in lines)
    assert f"{number + len(lines) - num_unread}/" in text  # of the bar
    assert (f"refused: {len(lines)}" in text) == bool(lines)


def test_folders_of_classes_are_packed_trained_on_and_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two commands, and the recipe takes classes and vocabulary from the data."""
    for i in range(60):
        file = tmp_path / "pictures" / ("cat", "dog", "ox")[i % 3] / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_image(smooth_picture(i, 70, 90), "JPEG"))
    (tmp_path / "pictures" / "ox" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    data, run = tmp_path / "data", tmp_path / "run"
    flags = ["--split", "heldout=0.2", "--samples-per-shard", "16", *SMALL]
    assert main(["data", "pack", str(tmp_path / "pictures"), str(data), *flags]) == 0
    text = said(capsys)
    assert "imagefolder: every picture is in one of 3 folders, a class each" in text
    assert "refused: 1" in text and "ox/broken.jpg" in text
    assert read_manifest(data).class_names == ("cat", "dog", "ox")
    train = ["train", "demo", "--out", str(run), "--data.path", str(data), "--num-steps", "2"]
    assert main([*train, "--data.batch-size", "8", "--log-every", "1"]) == 0
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if "loss/total" in row]
    assert len(rows) == 2 and all(row["loss/total"] > 0 for row in rows)
    said(capsys)
    assert main(["data", "pack", str(tmp_path / "pictures"), str(data), *flags]) == 0
    assert f"was packed already {data}" in said(capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--for-gpu", "0"], "--for-gpu: expected at least 1, got 0"),
        (["--workers", "0"], "--workers: expected at least 1, got 0"),
        (["--max-pixels", "-1"], "--max-pixels: expected at least 1, got -1"),
        (["--limit", "0"], "--limit: expected at least 1, got 0"),
        (["--samples-per-shard", "0"], "--samples-per-shard: expected at least 1, got 0"),
        (
            ["--class-names", "none.txt"],
            "--class-names: expected a text file in UTF-8, got 'No such file",
        ),
        (["--context-length", "2"], "context_length: expected at least 3"),
        (["--kind", "torchvision", "--torchvision-class", "No"], "a class of torchvision.datasets"),
    ],
)
def test_wrong_flags_are_refused(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "pictures"
    source.mkdir()
    (source / "a.png").write_bytes(encode_image(smooth_picture(0, 9, 9)))
    flags = [*SMALL, *flags]
    assert main(["data", "pack", str(source), str(tmp_path / "out"), *flags]) == 2
    assert message in said(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ("missing", "got none at missing; name another directory, or make one there"),
        ("empty", "got none at empty; name another directory, or make one there"),
        ("link", "got a symbolic link to nowhere, which is not there, at link; name another"),
        (
            "my cats",
            "to pack what lies there, type: m3i-fast data pack 'my cats' 'my cats-packed'",
        ),
        (".", "to pack what lies there, type: m3i-fast data pack . {parent}-packed"),
        ("t.csv", "to pack what lies there, type: m3i-fast data pack t.csv t.csv-packed"),
    ],
)
def test_training_without_a_packed_data_set_says_what_to_type(
    there: str,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("my cats/cat/0.png", "my cats/dog/1.png", "t.csv"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_image(smooth_picture(0, 9, 9)))
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    assert main(["train", "demo", "--out", "run", "--data.path", there]) == 2
    text = " ".join(capsys.readouterr().err.split())
    start = f"error: --data.path: {there}: expected a dataset directory with manifest.json, "
    assert text.startswith(start) and said.format(parent=tmp_path) in text
    if there == "my cats":  # as it says
        argv = ["data", "pack", "my cats", "my cats-packed", "--workers", "1", *SMALL]
        assert main(argv) == 0


@pytest.mark.parametrize("verb", ["evaluate", "pack"])
@pytest.mark.parametrize(
    ("there", "message"),
    [
        ("empty", "below {path}, got none: it has no files; name the folder that holds"),
        ("link", "expected a file or folder, got a symbolic link to nowhere, which is not there"),
    ],
)
def test_a_source_without_a_picture_is_named_with_the_flag(
    verb: str, there: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    path = str(tmp_path / there)
    argv = ["data", "pack", path, str(tmp_path / "out")]
    if verb == "evaluate":
        argv = ["evaluate", "pixels", "--data", path, "--out", str(tmp_path / "out")]
        argv += ["--cache-dir", str(tmp_path / "cache")]
    assert main(argv) == 2
    text = said(capsys)
    assert text.startswith("error: --data: " if verb == "evaluate" else "error: SOURCE: ")
    assert message.format(path=path) in text


def test_a_web_server_to_write_to_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(encode_image(smooth_picture(0, 9, 9)))
    assert main(["data", "pack", str(tmp_path), "https://host/mine", *SMALL]) == 2
    assert "DIR: expected a folder, s3:// or gs://, got https://host/mine" in said(capsys)
    assert not (tmp_path / "https:").exists()


def test_what_may_be_markup_is_shown_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In names of folders, files and the data set."""
    folder = tmp_path / "x[b][bold]:bug:[green"
    folder.mkdir()
    (folder / "[b].png").write_bytes(b"none")
    (folder / "good.png").write_bytes(encode_image(smooth_picture(0, 9, 9)))
    out = tmp_path / "out[b]"
    assert main(["data", "pack", str(folder), str(out), *SMALL]) == 0
    text = "".join(said(capsys).replace("│", "").split())
    assert f"wrote{out}" in text and "packingout[b]" in text and "[b].png" in text
