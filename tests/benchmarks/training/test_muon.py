"""The benchmark of Muon holds its processes to what is asked, and times equal steps alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.benchmarks.training import muon


def test_rows_are_of_the_instructions_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ledger, "results_dir", lambda: tmp_path)
    muon.main(["--device", "cpu", "--isas", "avx2", "--num-samples", "1"])
    (row,) = ledger.read_rows("muon")
    figures = row["figures"]
    assert figures["isa"] == "avx2" and figures["cpu_capability"] in ("AVX2", "DEFAULT")
    assert set(figures["timings"]) == {"m3i_fast", "torch"}
    assert figures["times_slower_than_ours"]["m3i_fast"] == 1.0
    shown = capsys.readouterr().out
    assert f"demo, avx2 ({figures['cpu_capability']})" in shown and str(tmp_path) in shown


def test_different_steps_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slower(torch.optim.Muon):
        def __init__(self, params, *, lr: float, weight_decay: float) -> None:  # type: ignore[no-untyped-def]
            super().__init__(params, lr=0.9 * lr, weight_decay=weight_decay)

    monkeypatch.setattr(muon, "Muon", Slower)
    with pytest.raises(AssertionError, match=r"a step of \(48, 16\): expected torch's, got"):
        muon.make_functions({16: 1}, "cpu")


def test_config_names_a_bad_field() -> None:
    with pytest.raises(ValueError, match="num_samples: expected at least 1, got 0"):
        muon.Config(num_samples=0)
    with pytest.raises(ValueError, match="isas: expected at least one of native, avx2, got none"):
        muon.Config(isas=())
