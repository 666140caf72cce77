"""What m3i-fast says before any verb, and how much of the package that takes."""

import subprocess
import sys
from importlib.metadata import version

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
