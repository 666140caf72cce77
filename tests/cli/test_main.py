"""What m3i-fast says before any verb, and how much of the package that takes."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from m3i_fast.cli import VERBS, main


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"m3i-fast {version('m3i-fast')}\n"


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_load_no_torch(flag: str) -> None:
    code = (
        "import sys; from m3i_fast.cli import main; "
        f"code = main([{flag!r}]); sys.exit(code or ('torch' in sys.modules) * 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if flag == "--help":
        assert all(f"  {verb} " in done.stderr for verb in VERBS)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["demo", "--num-steps", "0"], "num_steps: expected"),
        (["demo", "--seconds", "0"], "seconds: expected > 0, got 0"),
        (["evaluate", "timm:vit_tiny_patch16_224"], "MODEL: expected a run, of which config.json"),
        (["evaluate", "pixels", "--data", "none"], "--data: expected a file or folder, got none"),
        (["evaluate", "pixels", "--data", "s3://b/set"], "--data: expected a path of this machine"),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, list) else "",
)
def test_a_wrong_request_names_the_flag(
    argv: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (["train", "demo", "--out", "s3://bucket/run"], "--out"),
        (["profile", "demo", "--out", "gs://bucket/profile"], "--out"),
        (["demo", "--out", "s3://bucket/run"], "--out"),
        (["evaluate", "pixels", "--data", ".", "--out", "s3://bucket/found"], "--out"),
        (["export", "runs/demo", "s3://bucket/model", "--to", "timm"], "OUT"),
        (["data", "synthetic", "s3://bucket/data", "--num-samples", "2"], "OUT"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_nothing_is_written_to_a_folder_that_looks_like_a_bucket(
    argv: list[str],
    flag: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A Path takes s3://bucket/run for ./s3:/bucket/run, which is lost with the machine."""
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert f"{flag}: expected a path of this machine" in said and "bucket" in said
    assert list(tmp_path.iterdir()) == []
