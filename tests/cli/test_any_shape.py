"""Views of any shape by the commands: a run, its finish at high resolution, profile and page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from m3i_fast.cli import main
from m3i_fast.observe.metrics import read_jsonl
from m3i_fast.profiling.summary import read_summary
from m3i_fast.recipes import recipes, shrink
from tests.shared.engine.small_run import TEXT

pytestmark = pytest.mark.matrix


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe and its finish, shrunken, the second from the weights of the first."""
    out = tmp_path_factory.mktemp("runs")
    for name, size in (("any_shape_vit_b", (32, 64)), ("any_shape_vit_b_finish", (64, 96))):
        cfg = shrink(recipes()[name](), path=dataset, num_classes=9, text=TEXT)
        shown = replace(cfg.data.global_views, size_range=size)
        data = replace(cfg.data, global_views=shown)
        replace(cfg, data=data, num_steps=10, num_threads=1).save(out / f"{name}.json")
    config, low = str(out / "any_shape_vit_b.json"), str(out / "low")
    assert main(["train", "--config", config, "--out", low]) == 0
    config, init = str(out / "any_shape_vit_b_finish.json"), f"run:{low}"
    assert main(["train", "--config", config, "--out", str(out / "high"), "--init", init]) == 0
    return out


def test_the_finish_begins_where_the_first_run_ended(runs: Path) -> None:
    low, high = (
        [row for row in read_jsonl(runs / name / "metrics.jsonl") if "loss/total" in row]
        for name in ("low", "high")
    )
    assert json.loads((runs / "high" / "init.json").read_text())
    # As many tokens, of views of two to three times the area.
    assert high[-1]["batch/images"] < low[-1]["batch/images"] / 1.5
    assert high[-1]["batch/tokens"] > 0.6 * low[-1]["batch/tokens"]


def test_a_page_has_curves_of_tokens(runs: Path) -> None:
    assert main(["report", str(runs / "low")]) == 0
    page = (runs / "low" / "report.html").read_text()
    assert "patches of training views a second" in page and "Tokens of a batch" in page
    assert "training takes each at the aspect of its region" in page


def test_a_profile_is_of_packed_steps(runs: Path, tmp_path: Path) -> None:
    config, out = str(runs / "any_shape_vit_b.json"), str(tmp_path / "profile")
    flags = ["--out", out, "--profiler", "torch", "--warmup", "1", "--steps", "2"]
    assert main(["profile", "--config", config, *flags]) == 0
    stages = {row["name"] for row in read_summary(Path(out))["stages"]}
    assert {"data.wait", "fwd.target", "fwd.input", "loss.caption", "bwd"} <= stages
