"""The benchmark of packed pictures times equal work, and counts the tokens that it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.benchmarks.training import packed

SMALL: dict[str, Any] = {"dim": 64, "depth": 1, "num_pictures": 7, "sides": (32, 96)}


def test_a_row_says_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ledger, "results_dir", lambda: tmp_path)
    small = ["--dim", "64", "--depth", "1", "--num-pictures", "7", "--sides", "32", "96"]
    packed.main(["--device", "cpu", *small, "--num-samples", "1"])
    (row,) = ledger.read_rows("packed")
    figures = row["figures"]
    assert set(figures["timings"]) == {"m3i_fast", "padded", "bucketed"}
    assert figures["times_slower_than_ours"]["m3i_fast"] == 1.0
    computed = figures["computed_tokens"]
    assert computed["m3i_fast"] == figures["num_tokens"] < computed["bucketed"] < computed["padded"]
    shown = " ".join(capsys.readouterr().out.split())
    assert f"7 pictures of 32 to 96 pixels, {figures['num_tokens']} tokens" in shown
    assert f" {computed['padded']} " in shown
    settings = ledger.settings_of(row)
    assert settings["num_pictures"] == 7 and "tokens_per_s" not in settings


def test_pictures_are_of_the_sides_and_aspects_asked_for() -> None:
    grids = packed.draw_grids(packed.Config(num_pictures=200))
    assert torch.equal(grids, packed.draw_grids(packed.Config(num_pictures=200)))
    assert grids.min() == 4 and grids.max() == 14
    aspect = grids[:, 0] / grids[:, 1]
    assert 0.4 < aspect.min() < 0.6 and 1.6 < aspect.max() < 2.4  # rounded to patches
    assert len(grids.unique(dim=0)) > 40


def test_different_gradients_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = packed.Config(**SMALL, device="cpu")
    grids = packed.draw_grids(cfg)

    def without_mask(self: packed.PaddedPictures) -> torch.Tensor:
        self.shown = torch.ones_like(self.shown)
        return encode(self)

    encode = packed.PaddedPictures.encode
    packed.make_functions(cfg, packed.Pictures(cfg, grids, "cpu"))
    monkeypatch.setattr(packed.PaddedPictures, "encode", without_mask)
    with pytest.raises(AssertionError, match="gradients of padded: expected those of m3i_fast"):
        packed.make_functions(cfg, packed.Pictures(cfg, grids, "cpu"))


def test_config_names_a_bad_field() -> None:
    with pytest.raises(ValueError, match="num_buckets: expected at least 1, got 0"):
        packed.Config(num_buckets=0)
    with pytest.raises(ValueError, match="dim: expected a multiple of 64, got 100"):
        packed.Config(dim=100)
    with pytest.raises(ValueError, match="sides: expected patch_size = 16 <= low <= high, got 8"):
        packed.Config(sides=(8, 64))
