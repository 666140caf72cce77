"""The benchmark of gaussian runs, compares equal values and records what it shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.benchmarks.ops import gaussian
from m3i_fast.benchmarks.ops.gaussian import Config, Size

SMALL = Size(batch_size=2, queries=5, width=24)


def test_rows_are_shown_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gaussian, "CPU_SIZES", (SMALL,))
    monkeypatch.setattr(ledger, "results_dir", lambda: tmp_path)
    arguments = ["--device", "cpu", "--num-samples", "2", "--no-compile"]
    gaussian.main(arguments)
    rows = [row["figures"] for row in ledger.read_rows("gaussian")]
    assert [(row["dtype"], row["decorrelation_weight"], row["pass"]) for row in rows] == [
        (dtype, weight, kind)
        for dtype in ("float32", "bfloat16")
        for weight in (0.0, 0.02)
        for kind in ("forward", "forward+backward")
    ]
    assert set(rows[0]["timings"]) == {"m3i_fast", "torch", "copy"}
    assert set(rows[7]["timings"]) == {"m3i_fast", "torch", "same dtype", "copy"}
    for row, elements in ((rows[0], 2 * 240 * 4), (rows[7], 5 * 240 * 2)):
        milliseconds = row["timings"]["m3i_fast"]["median_ms"]
        assert row["gb_s"] == pytest.approx(elements / milliseconds / 1e6)
    shown = capsys.readouterr().out
    assert "2x5x24, bfloat16, forward+backward" in shown and str(tmp_path) in shown

    gaussian.main([*arguments, "--no-record"])
    assert len(list(ledger.read_rows("gaussian"))) == 8


def test_different_values_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian, "SIGMA", 1.0)
    monkeypatch.setattr(gaussian, "in_float32", lambda z_hat, z, weight: z_hat.mean())
    with pytest.raises(AssertionError, match="Tensor-likes are not close|Scalars are not close"):
        gaussian.make_functions(
            Config(device="cpu", compile=False), SMALL, torch.float32, 0.0, backward=True
        )


def test_config_names_a_bad_field() -> None:
    with pytest.raises(ValueError, match="num_samples: expected at least 1, got 0"):
        Config(num_samples=0)


@pytest.mark.parametrize("backward", [False, True])
def test_compiled_expression_is_timed_too(backward: bool) -> None:
    functions = gaussian.make_functions(Config(device="cpu"), SMALL, torch.bfloat16, 0.02, backward)
    assert set(functions) == {"m3i_fast", "torch", "same dtype", "compiled", "copy"}
