"""Policy files say what is built: a bad one is refused by name, and the headers are theirs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m3i_fast.ops import tiles

ROOT = Path(__file__).resolve().parents[2]
Change = Callable[[dict[str, Any]], None]


@pytest.mark.parametrize("op", list(tiles.FIELDS))
def test_headers_are_those_of_their_files(op: str) -> None:
    header = tiles.header_of(op)
    assert header.read_text() == tiles.render(op, tiles.read(op))


def changed(op: str, tmp_path: Path, change: Change) -> Path:
    """A copy of the op's file in which something is different."""
    path = tmp_path / "cuda" / op / "tiles.json"
    path.parent.mkdir(parents=True)
    entries = json.loads(tiles.path_of(op).read_text())
    change(entries)
    path.write_text(json.dumps(entries))
    return path


def policy(card: str, kind: str, **fields: object) -> Change:
    return lambda entries: entries[card][kind]["policy"].update(fields)


REFUSED: dict[str, tuple[str, Change, str]] = {
    "a card is missing": ("dcnv3", lambda e: e.pop("h100"), r"expected the keys .*'h100'"),
    "a class too many": (
        "boltzmann", lambda e: e["a100"].update(double={}), r"a100: expected the keys",
    ),
    "a word for a number": (
        "dcnv3", policy("a100", "small", warps="4"),
        r"a100\.small\.policy\.warps: expected a whole number from 1 to 32, got '4'",
    ),
    "a stage too few": (
        "boltzmann", policy("h100", "half", stages=1),
        r"h100\.half\.policy\.stages: expected a whole number from 2 to 8, got 1",
    ),
    "a field too many": (
        "dcnv3", policy("cpu", "any", unroll=2), r"cpu\.any\.policy: expected the keys",
    ),
    "more points than threads": (
        "dcnv3", policy("h100", "large", warps=1, blocks=8, bwd_blocks=8),
        r"h100\.large\.policy: chunk: expected at most the block's 32 threads, got 64",
    ),
    "more threads than a multiprocessor": (
        "dcnv3", policy("a100", "large", warps=16),
        r"a100\.large\.policy: blocks: expected at most 4 of 512 threads, got 6",
    ),
    "a tile that warps cannot share": (
        "boltzmann", policy("a100", "half", side=96, warps_across=4),
        r"a100\.half\.policy: side: expected a multiple of 64 for its warps_across, got 96",
    ),
    "two policies of one kernel": (
        "boltzmann", policy("h100", "float", stages=4),
        r"h100\.float\.policy: expected a100\.float's .*, since one kernel serves both",
    ),
    "more registers than there are": (
        "boltzmann", policy("h100", "half", producer_registers=56),
        r"h100\.half\.policy: registers: expected at most 65536 a block, got 66560",
    ),
    "measured without a row": (
        "dcnv3", lambda e: e["a100"]["small"].update(why="measured"),
        r"a100\.small: expected the keys \['policy', 'row', 'why'\]",
    ),
    "an unknown reason": (
        "dcnv3", lambda e: e["a100"]["small"].update(why="guessed"),
        r"a100\.small\.why: expected one of .*, got 'guessed'",
    ),
    "half a vector": (
        "boltzmann", policy("cpu", "any", tile_columns=777),
        r"cpu\.any\.policy: tile_columns: expected a multiple of 16, got 777",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("op", "change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_policy_that_cannot_be_built_is_named(
    op: str, change: Change, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"^cuda/{op}/tiles\.json: .*{message}"):
        tiles.read(op, changed(op, tmp_path, change))


def test_what_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cuda" / "dcnv3" / "tiles.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"^cuda/dcnv3/tiles\.json: expected JSON"):
        tiles.read("dcnv3", path)


def test_an_entry_is_replaced_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    shutil.copy(tiles.path_of("boltzmann"), path)
    before = json.loads(path.read_text())
    row = {"run_id": "0123456789abcdef", "time": "2026-11-26T10:00:00+00:00"}
    entry = {"policy": {"grads_mib": 16}, "why": "measured", "row": row}
    tiles.write_entry(path, "a100", "blocks", entry)
    after = json.loads(path.read_text())
    assert after["a100"]["blocks"] == entry
    after["a100"]["blocks"] = before["a100"]["blocks"]
    assert after == before
    table = tiles.read("boltzmann", path)
    assert "kGradsMibA100 = 16;" in tiles.render("boltzmann", table)


# ---- The build -----------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What CMake reads of a checkout."""
    shutil.copytree(ROOT / "cuda", tmp_path / "cuda")
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    (tmp_path / "m3i_fast" / "ops").mkdir(parents=True)
    shutil.copy(ROOT / "m3i_fast" / "ops" / "tiles.py", tmp_path / "m3i_fast" / "ops")
    return tmp_path


def configure(tree: Path) -> subprocess.CompletedProcess[str]:
    options = ["-DM3I_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}"]
    command = ["cmake", "-S", tree, "-B", tree / "build", *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def test_cmake_fails_on_a_policy_that_is_not_or_cannot_be_built(tree: Path) -> None:
    done = configure(tree)
    assert done.returncode == 0, done.stderr
    path = tree / "cuda" / "dcnv3" / "tiles.json"
    text = path.read_text()
    for warps, message in (
        (64, r"cuda/dcnv3/tiles\.json: a100\.small\.policy\.warps: expected"),
        (
            2,
            r"cuda/dcnv3/tiles\.h: expected what cuda/dcnv3/tiles\.json says, got other tiles; run",
        ),
    ):
        path.write_text(text.replace('"warps": 4', f'"warps": {warps}'))
        done = configure(tree)
        assert done.returncode != 0 and re.search(message, done.stderr)


def test_a_header_that_is_not_its_files_is_refused_and_made_anew(tree: Path) -> None:
    path = tree / "cuda" / "boltzmann" / "tiles.json"
    path.write_text(path.read_text().replace('"tile_columns": 768', '"tile_columns": 512'))
    script = [sys.executable, "-S", str(tree / "m3i_fast" / "ops" / "tiles.py")]
    done = subprocess.run([*script, "--check"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "cuda/boltzmann/tiles.h: expected what" in done.stderr.replace("\\", "/")
    assert subprocess.run(script).returncode == 0
    header = (tree / "cuda" / "boltzmann" / "tiles.h").read_text()
    assert "kCpuTileColumns = 512;" in header
    assert subprocess.run([*script, "--check"]).returncode == 0
