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


HERE = "expected a path of this machine"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["demo", "--num-steps", "0"], "num_steps: expected"),
        (["demo", "--seconds", "0"], "seconds: expected > 0, got 0"),
        (["evaluate", "timm:vit_tiny_patch16_224"], "MODEL: expected a run, of which config.json"),
        (["evaluate", "pixels", "--data", "none"], "--data: expected a file or folder, got none"),
        # A Path takes s3://bucket/run for ./s3:/bucket/run, which is lost with the machine.
        (["evaluate", "pixels", "--data", "s3://bucket/set"], f"--data: {HERE}"),
        (["train", "demo", "--out", "s3://bucket/run"], f"--out: {HERE}"),
        (["profile", "demo", "--out", "gs://bucket/profile"], f"--out: {HERE}"),
        (["demo", "--out", "s3://bucket/run"], f"--out: {HERE}"),
        (["evaluate", "pixels", "--data", ".", "--out", "s3://bucket/found"], f"--out: {HERE}"),
        (["export", "runs/demo", "s3://bucket/model", "--to", "timm"], f"OUT: {HERE}"),
        (["data", "synthetic", "s3://bucket/data", "--num-samples", "2"], f"OUT: {HERE}"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_request_names_the_flag_and_writes_nothing(
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
