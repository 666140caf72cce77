"""The benchmark of saving times both kinds, records what it shows and leaves no files."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.benchmarks.training import checkpoint


def test_a_row_is_shown_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ledger, "results_dir", lambda: tmp_path / "results")
    (tmp_path / "disk").mkdir()
    arguments = ["--mib", "24", "--rounds", "2", "--device", "cpu"]
    checkpoint.main([*arguments, "--directory", str(tmp_path / "disk")])
    (row,) = (row["figures"] for row in ledger.read_rows("checkpoint"))
    assert row["at_once_waited_ms"] <= row["at_once_whole_ms"]
    assert 0 < row["background_waited_ms"] < row["background_whole_ms"]
    assert row["waited_share"] == row["background_waited_ms"] / row["at_once_waited_ms"]
    assert row["pause_ours_ms"] > 0 and row["pause_torchs_ms"] > 0
    said = capsys.readouterr().out
    assert "at once" in said and "background" in said
    assert list((tmp_path / "disk").iterdir()) == []
