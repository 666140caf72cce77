"""From rows to comparison, verdict and drawing, by the seeds that all arms have run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3i_fast.benchmarks.one_stage import main as command
from m3i_fast.benchmarks.one_stage.arms import ARMS
from m3i_fast.benchmarks.one_stage.main import Config
from m3i_fast.benchmarks.one_stage.plan import BASELINES, Plan, Run, read_plan
from m3i_fast.benchmarks.one_stage.resampling import ClusterCounts, accuracy, resample
from m3i_fast.benchmarks.one_stage.tables import (
    chosen,
    comparisons,
    counted_table,
    is_complete,
    stage_terms,
    tuning_table,
)
from m3i_fast.benchmarks.one_stage.verdict import compare
from tests.benchmarks.one_stage.test_plan import TREE, folder  # noqa: F401 (a fixture)


def _rows(plan: Plan) -> dict[Run, dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows = {}
    for run in plan.counted_runs():
        measure, clusters = plan.primary[run.data_set], [100 * (run.seed % 5) + i for i in range(9)]
        found: dict[str, Any] = {"counts": rng.integers(1, 9, (9, 3, 17)).tolist(), "cluster": 0}
        if run.data_set == "styles":
            clusters = 4 * clusters
            found = {"hits": "".join(map(str, rng.integers(2, size=36))), "cluster": 0}
        who = "untrained" if run.arm == BASELINES else "trained"
        rows[run] = {
            "found": {who: {measure: found}},
            "clusters": [clusters],
            "measured": {who: {measure: 0.5}},
            "stages": [{"logged": _logged(run.seed)} for _ in ARMS.get(run.arm, ())],
        }
    return rows


def _logged(seed: int) -> dict[str, list[float | None]]:
    first = None if seed else 1.0  # of the later seeds no picture had a caption
    return {
        "gradient/caption": [first, 2.0, 4.0, 8.0, seed + 1.0],
        "monitor/intra_explained": [-0.5, 0.0, 0.1, 0.2, 0.1 * seed],
        "loss/total": [5.0] * 5,
    }


def test_arms_are_compared_by_their_counts() -> None:
    plan = read_plan("small")
    rows = _rows(plan)
    assert is_complete(plan, rows)
    compared = comparisons(plan, rows)
    assert list(compared) == ["styles", "earth"]
    runs: dict[str, dict[int, ClusterCounts]] = {arm: {} for arm in plan.arms}
    for run, figures in rows.items():
        if run.data_set == "styles" and run.arm != BASELINES and run.seed < 5:
            hits = np.array([*map(int, figures["found"]["trained"]["linear_top1_hard"]["hits"])])
            cluster = figures["clusters"][0][:9]  # four items each
            counts = np.stack([hits.reshape(4, 9).sum(0), np.full(9, 4)], 1).astype(np.float64)
            runs[run.arm][run.seed] = ClusterCounts(cluster=np.array(cluster), counts=counts)
    by_hand = compare("styles: linear probe, hard half, %", resample(runs, accuracy))
    assert compared["styles"].seeds == (0, 1, 2, 3, 4)  # seed 5 holds out the fold of seed 0 again
    assert compared["styles"].minus_best.low == pytest.approx(by_hand.minus_best.low, abs=1e-9)
    assert compared["styles"].means.keys() == by_hand.means.keys()
    left_out = next(run for run in rows if (run.arm, run.seed) == ("slip", 1))
    del rows[left_out]
    assert not is_complete(plan, rows)
    assert comparisons(plan, rows)[left_out.data_set].seeds == (0, 2, 3, 4)


def test_rows_are_shown_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = read_plan("small")
    rows = _rows(plan)
    monkeypatch.setattr(command, "finished", lambda *_: rows)
    command.main(["--plan", "small", "--table-only", "--ledger", f"{tmp_path}"])
    told = capsys.readouterr().out
    assert "One stage is better than the best other arm on every set:" in told
    assert "untrained" in told and "best other" in told
    for name in ("one_stage_small.svg", "one_stage_small_terms.svg"):
        assert "so far" not in (tmp_path / name).read_text()
    rows.pop(next(iter(rows)))
    command.draw_arms(Config(ledger=tmp_path), plan, rows)
    assert "so far" in (tmp_path / "one_stage_small.svg").read_text()
    assert len(counted_table(plan, rows).columns) == 2 + len(plan.seeds)


def test_what_terms_logged_is_averaged_over_seeds() -> None:
    plan = read_plan("small")
    rows = _rows(plan)
    found = stage_terms(plan, rows)
    assert list(found) == ["styles", "earth"] and list(found["earth"]) == list(plan.arms)
    assert [stage.share for stage in found["styles"]["two stages"]] == [0.7, 0.3]
    seeds = np.array(plan.seeds)
    [stage] = found["earth"]["m3i"]
    assert stage.gradient == {"caption": [1.0, 2.0, 4.0, 8.0, pytest.approx(1 + seeds.mean())]}
    last = stage.explained["intra"][-1]
    assert set(stage.explained) == {"intra"} and last == pytest.approx(0.1 * seeds.mean())
    rows = {run: row for run, row in rows.items() if (run.data_set, run.arm) != ("earth", "slip")}
    assert "slip" not in stage_terms(plan, rows)["earth"]
    assert stage_terms(plan, {}) == {}


def test_the_best_setting_is_chosen_once_all_were_tried() -> None:
    plan, rows = read_plan("small"), {}
    for place, run in enumerate(plan.tuning_runs()):
        rows[run] = {"measured": {"trained": {plan.tuning.measure[run.data_set]: -place}}}
    best = chosen(plan, rows)
    assert best["styles"]["m3i"] == best["earth"]["slip"] == {"lr": 0.5, "label_weight": 0.1}
    assert best["earth"]["siameseim"] == {"lr": 0.5, "label_weight": 1.0}
    del rows[run]  # the last one: of two stages on earth
    assert set(chosen(plan, rows)["earth"]) == set(plan.arms) - {"two stages"}


def test_a_setting_is_chosen_by_its_mean_over_the_tuning_seeds(folder: Path) -> None:  # noqa: F811
    grid = {**TREE["tuning"], "seed": 1, "num_seeds": 2}
    (folder / "small.json").write_text(json.dumps({**TREE, "tuning": grid}))
    plan = read_plan("small")
    assert {run.seed for run in plan.tuning_runs()} == {1, 2}
    found = {0.5: (0.6, 0.2), 1.0: (0.5, 0.4), 2.0: (0.1, 0.5)}  # the best by seed: 0.5, then 2
    rows = {
        run: {
            "measured": {
                "trained": {
                    plan.tuning.measure[run.data_set]: found[run.tuning.lr][run.seed - 1]
                    * run.tuning.label_weight
                }
            }
        }
        for run in plan.tuning_runs()
    }
    best = chosen(plan, rows)
    for name in plan.primary:
        assert best[name] == dict.fromkeys(plan.arms, {"lr": 1.0, "label_weight": 1.0})
    table = tuning_table(plan, rows)
    assert [str(each.header) for each in table.columns][-2:] == ["seed 1", "seed 2"]
    assert [*table.columns[-1].cells][1] == "20.0"  # m3i on styles, learning rate x 0.5, labels x 1
    rows = {run: row for run, row in rows.items() if (run.arm, run.seed) != ("slip", 2)}
    assert set(chosen(plan, rows)["styles"]) == set(plan.arms) - {"slip"}
