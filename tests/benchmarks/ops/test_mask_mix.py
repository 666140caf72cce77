"""The benchmark of mask_mix runs, compares equal pictures and records what it shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.benchmarks.ops import mask_mix
from m3i_fast.benchmarks.ops.mask_mix import Config, Size

SMALL = Size(image_size=16, patch_size=8)


def test_rows_are_shown_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mask_mix, "SIZES", (SMALL,))
    monkeypatch.setattr(ledger, "results_dir", lambda: tmp_path)
    arguments = ["--device", "cpu", "--batch-size", "2", "--num-samples", "2", "--no-compile"]
    mask_mix.main(arguments)
    rows = list(ledger.read_rows("mask_mix"))
    assert [row["figures"]["dtype"] for row in rows] == ["float32", "bfloat16"]
    for row in rows:
        figures = row["figures"]
        assert set(figures["timings"]) == {"m3i_fast", "torch", "bytes first", "copy"}
        assert figures["times_slower_than_ours"]["m3i_fast"] == 1.0
        milliseconds = figures["timings"]["m3i_fast"]["median_ms"]
        assert figures["gb_s"] == pytest.approx(
            2 * 3 * 16 * 16 * (1 + (4 if figures["dtype"] == "float32" else 2)) / milliseconds / 1e6
        )
    shown = capsys.readouterr().out
    assert "bytes first" in shown and str(tmp_path) in shown

    mask_mix.main([*arguments, "--no-record"])
    assert len(list(ledger.read_rows("mask_mix"))) == 2


def test_different_pictures_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_mix, "bytes_first", lambda views, *_: torch.zeros(2, 3, 16, 16))
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        mask_mix.make_functions(
            Config(device="cpu", batch_size=2, compile=False), SMALL, torch.float32
        )


@pytest.mark.parametrize("field", ["batch_size", "num_samples"])
def test_config_names_a_bad_field(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}: expected at least 1, got 0"):
        Config(**{field: 0})


def test_compiled_expression_is_timed_too() -> None:
    functions = mask_mix.make_functions(Config(device="cpu", batch_size=2), SMALL, torch.float32)
    assert "compiled" in functions
