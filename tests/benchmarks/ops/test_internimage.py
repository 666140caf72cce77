"""The benchmark of InternImage compares equal models and records what it shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.benchmarks.ops import internimage
from m3i_fast.benchmarks.ops.internimage import Config

ARGUMENTS = ["--device", "cpu", "--sizes", "demo", "--image-size", "32", "--num-samples", "2"]


def test_rows_are_shown_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ledger, "results_dir", lambda: tmp_path)
    internimage.main([*ARGUMENTS, "--batch-size", "2"])
    (row,) = ledger.read_rows("internimage")
    figures = row["figures"]
    assert set(figures["timings"]) == {"m3i_fast", "grid_sample", "no sampling", "op alone"}
    milliseconds = figures["timings"]["m3i_fast"]["median_ms"]
    assert figures["images_per_s"]["m3i_fast"] == pytest.approx(2000 / milliseconds)
    assert figures["op_share"] == pytest.approx(
        figures["timings"]["op alone"]["median_ms"] / milliseconds
    )
    shown = capsys.readouterr().out
    assert "DEMO" in shown and str(tmp_path) in shown

    internimage.main([*ARGUMENTS, "--train", "--no-record"])
    assert len(list(ledger.read_rows("internimage"))) == 1


def test_other_outputs_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internimage, "dcnv3_by_grid_sample", lambda x, *_, **__: 2 * x)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        internimage.make_functions(Config(device="cpu", image_size=32), "demo")


@pytest.mark.parametrize(("field", "value"), [("batch_size", 0), ("image_size", 48)])
def test_config_names_a_bad_field(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field}: expected .*, got {value}"):
        Config(**{field: value})  # type: ignore[arg-type]
