"""The benchmark of add_layer_norm runs, compares equal values and records what it shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.benchmarks.ops import add_layer_norm
from m3i_fast.benchmarks.ops.add_layer_norm import Config, Size

SMALL = Size(batch_size=2, tokens=5, width=24)


def test_rows_are_shown_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(add_layer_norm, "CPU_SIZES", (SMALL,))
    monkeypatch.setattr(ledger, "results_dir", lambda: tmp_path)
    add_layer_norm.main(["--device", "cpu", "--num-samples", "2", "--no-compile"])
    rows = [row["figures"] for row in ledger.read_rows("add_layer_norm")]
    assert [(row["dtype"], row["pass"]) for row in rows] == [
        (dtype, kind)
        for dtype in ("float32", "bfloat16")
        for kind in ("forward", "forward+backward")
    ]
    assert all(set(row["timings"]) == {"m3i_fast", "torch", "copy"} for row in rows)
    for row, each in zip(rows, (16, 32, 12, 28), strict=True):
        milliseconds = row["timings"]["m3i_fast"]["median_ms"]
        assert row["gb_s"] == pytest.approx(240 * each / milliseconds / 1e6)
    shown = capsys.readouterr().out
    assert "2x5x24, bfloat16, forward+backward" in shown and str(tmp_path) in shown


def test_different_values_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(add_layer_norm, "by_torch", lambda x, branch, *_: (x, x + branch))
    cfg = Config(device="cpu", compile=False)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        add_layer_norm.make_functions(cfg, SMALL, torch.float32, backward=False)


def test_config_names_a_bad_field() -> None:
    with pytest.raises(ValueError, match="num_samples: expected at least 1, got 0"):
        Config(num_samples=0)


@pytest.mark.parametrize("backward", [False, True])
def test_compiled_expression_is_timed_too(backward: bool) -> None:
    cfg = Config(device="cpu")
    functions = add_layer_norm.make_functions(cfg, SMALL, torch.bfloat16, backward)
    assert set(functions) == {"m3i_fast", "torch", "compiled", "copy"}
