"""The timing half of a sweep, on the CPU's tiles: operators are built, checked and timed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from m3i_fast.benchmarks.core.harness import Timing
from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.benchmarks.tune import build as tune_build
from m3i_fast.benchmarks.tune import main as tune
from m3i_fast.benchmarks.tune import timing as tune_time
from m3i_fast.benchmarks.tune.candidates import SUBJECTS, Subject, with_policy
from m3i_fast.ops import tiles

BOLTZMANN, DCNV3 = (
    replace(subject, shape=shape)
    for op, shape in (("boltzmann", (80, 96, 16)), ("dcnv3", (1, 6, 7, 16, 2)))
    for subject in SUBJECTS
    if (subject.op, subject.card) == (op, "cpu")
)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Policy files and ledger of the test's own."""
    monkeypatch.setattr(ledger, "results_dir", lambda: tmp_path)
    for op in tiles.FIELDS:
        (tmp_path / op).mkdir()
        shutil.copy(tiles.path_of(op), tmp_path / op)
    monkeypatch.setattr(tiles, "path_of", lambda op: tmp_path / op / "tiles.json")
    monkeypatch.setattr(tiles, "header_of", lambda op: tmp_path / op / "tiles.h")
    return tmp_path


def test_candidates_are_built_checked_timed_and_written(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real libraries of boltzmann's sources, one with half of a tile's columns."""
    monkeypatch.setattr(tune_build, "CPU_OPTIONS", ("-O0",))
    monkeypatch.setattr(tune, "SUBJECTS", (BOLTZMANN,))
    monkeypatch.setattr(
        tune, "candidates", lambda _, current: [current, {**current, "tile_columns": 384}]
    )
    monkeypatch.setattr(tune_time, "fastest", lambda timings, _: list(timings)[1])
    tune.main(["--card", "cpu", "--op", "boltzmann", "--num-samples", "2", "--write"])

    (first, second) = ledger.read_rows("tune")
    assert first["figures"]["policy"]["tile_columns"] == 768
    assert second["figures"]["chosen"] and not first["figures"]["chosen"]
    for row in (first, second):
        figures = row["figures"]
        assert figures["op"] == "boltzmann" and figures["dropped"] is None
        assert figures["measured_ms"] == figures["timings"][figures["candidate"]]["median_ms"] > 0
        assert figures["registers"] is None and figures["predicted_ms"] is None
    entries = json.loads((files / "boltzmann" / "tiles.json").read_text())
    assert entries["cpu"]["any"] == {
        "policy": second["figures"]["policy"],
        "why": "measured",
        "row": {"run_id": second["run_id"], "time": second["time"]},
    }
    assert "kCpuTileColumns = 384;" in (files / "boltzmann" / "tiles.h").read_text()


def test_a_librarys_name_is_of_its_tiles_and_its_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tiles.read("dcnv3")
    other = with_policy(table, DCNV3, {"block_points": 64})
    monkeypatch.setattr(tune_build, "build_folder", lambda: tmp_path)
    monkeypatch.setattr(tune_build, "_build", lambda folder, *_: (folder / "ops.so").touch())
    monkeypatch.setattr(tune_build, "_nvcc", lambda card: ("nvcc", [card]))
    names = {
        tune_build.build_ops("dcnv3", of_table, card).name
        for of_table in (table, other)
        for card in ("cpu", "a100", "h100")
    }
    assert len(names) == 6


# ---- What is right -------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", [BOLTZMANN, DCNV3], ids=lambda subject: subject.op)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_packages_own_operators_are_right(subject: Subject, dtype: str) -> None:
    assert tune_time.check(replace(subject, dtype=dtype), torch.ops.m3i, "cpu") is None


def off_by(op: Any, index: int) -> Any:
    """The operator, with a thousandth of its largest result added to one element of one of them."""

    def run(*arguments: Any) -> Any:
        results = op.default(*arguments)
        of_all: list[Tensor] = [results] if isinstance(results, Tensor) else list(results)
        of_all[index].view(-1)[-1] += 1e-3 * of_all[index].abs().max()
        return results

    return SimpleNamespace(default=run)


@pytest.mark.parametrize(
    ("subject", "names", "bad", "index", "first"),
    [
        *((DCNV3, ("dcnv3", "dcnv3_bwd"), "dcnv3", 0, 0),),
        *((DCNV3, ("dcnv3", "dcnv3_bwd"), "dcnv3_bwd", i, 1 + i) for i in range(3)),
        *((BOLTZMANN, ("boltzmann_sums", "boltzmann_grads"), "boltzmann_sums", i, i)
          for i in range(2)),
        *((BOLTZMANN, ("boltzmann_sums", "boltzmann_grads"), "boltzmann_grads", i, 2 + i)
          for i in range(3)),
    ],
)  # fmt: skip
def test_one_wrong_element_of_any_result_is_found(
    subject: Subject, names: tuple[str, ...], bad: str, index: int, first: int
) -> None:
    ops = SimpleNamespace(**{name: getattr(torch.ops.m3i, name) for name in names})
    setattr(ops, bad, off_by(getattr(torch.ops.m3i, bad), index))
    problem = tune_time.check(subject, ops, "cpu")
    assert problem and problem.startswith(f"result {first}: off by 0.001")


def timing(median: float, p20: float, p80: float) -> Timing:
    return Timing(median, p20, p80, num_samples=20)


def test_only_what_is_faster_beyond_noise_wins() -> None:
    current = timing(1.0, 0.95, 1.1)
    assert tune_time.fastest({"a": current, "b": timing(0.9, 0.85, 0.94)}, "a") == "b"
    assert tune_time.fastest({"a": current, "b": timing(0.9, 0.85, 0.96)}, "a") == "a"
    assert tune_time.fastest({"a": current, "b": timing(1.2, 1.1, 1.3)}, "a") == "a"


# ---- Requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"most": -1}, "most: expected 0 or more, got -1"),
        ({"num_samples": 0}, "num_samples: expected at least 1, got 0"),
        ({"write": True, "record": False}, "write: expected with --record and --timing"),
        ({"write": True, "timing": False}, "write: expected with --record and --timing"),
    ],
)
def test_a_wrong_request_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tune.Config(**fields)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "dcnv3", "--card", "a100", "--kind", "half"], "small, large on a100, got 'half'"),
        (["--card", "cpu", "--kind", "small"], "kind: expected one of any on cpu, got 'small'"),
    ],
)
def test_a_class_of_calls_that_is_not_there_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tune.main([*arguments, "--no-record"])


def test_a_card_without_a_class_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A40")
    assert tune.card_here() is None
    with pytest.raises(ValueError, match="card: expected .* for NVIDIA A40; name one, or cpu"):
        tune.main(["--no-record"])


def test_an_installed_package_has_no_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "CUDA", tmp_path)
    with pytest.raises(ValueError, match="tune: expected a checkout"):
        tune.main(["--no-record"])
