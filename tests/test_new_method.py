"""docs/extend/new_method.md: the file it shows is a method, trains, and is as short as it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from m3i_fast.observe.metrics import read_jsonl

TUTORIAL = Path(__file__).parent.parent / "docs" / "extend" / "new_method.md"
SMALL = (
    "--num-steps=3 --log-every=1 --num-classes=9 --text.vocab-size=814 --text.context-length=24 "
    "--data.batch-size=8 --data.initial-fill=16 --device=cpu"
).split()


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (code,) = re.findall(r"```python\n(.*?)```", TUTORIAL.read_text(), re.DOTALL)
    path = tmp_path_factory.mktemp("tutorial") / "simdino.py"
    path.write_text(code)
    return path


def _run(script: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_at_most_thirty_lines(script: Path) -> None:
    lines = [line for line in script.read_text().splitlines() if line.strip()]
    assert len(lines) <= 30


def test_it_trains_and_explains_itself(script: Path, dataset: Path, tmp_path: Path) -> None:
    explained = _run(script, "methods", "--explain", "SimDINO")
    assert "L_embedding = -cos(z_hat, sg(z)) - 0.01 R(z_hat)" in explained
    out = tmp_path / "run"
    request = ["--out", str(out), f"--data.path={dataset}", *SMALL]
    _run(script, "train", "demo_simdino", *request)
    rows = read_jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert {"loss/embedding", "monitor/embedding_std", "monitor/target_rank"} <= rows[0].keys()
