"""What a plan fixes: equal time, data and tuning for every arm, and nothing a flag can change."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from m3i_fast.benchmarks.one_stage import plan as plans
from m3i_fast.benchmarks.one_stage.arms import (
    ARMS,
    OURS,
    Stage,
    Tuning,
    has_label_weight,
    stage_config,
)
from m3i_fast.benchmarks.one_stage.datasets import folders
from m3i_fast.benchmarks.one_stage.main import Config, finished, job_of, main
from m3i_fast.benchmarks.one_stage.plan import BASELINES, NUM_CLASSES, Plan, read_plan
from m3i_fast.config.convert import differences
from m3i_fast.pipelines.loader import Loader
from m3i_fast.pipelines.sources import openmoji
from m3i_fast.recipes import DEMO_MERGES

COMMITTED = plans.FOLDER
ARM_NAMES = ("m3i", "siameseim", "category + caption", "slip", "two stages")
TREE: dict[str, Any] = {
    "arms": list(ARM_NAMES),
    "seeds": [0, 1, 2, 3, 4, 5],
    "heldout": 0.2,
    "labelled": 0.03,
    "captioned": 0.3,
    "seconds": 10,
    "primary": {"styles": "linear_top1_hard", "earth": "patch_miou"},
    "tuning": {
        "seconds": 5,
        "share": 0.2,
        "seed": 7,
        "lr": [0.5, 1, 2],
        "label_weight": [0.1, 1],
        "measure": {"styles": "linear_top1", "earth": "patch_miou"},
    },
    "tuned": {
        name: dict.fromkeys(ARM_NAMES, {"lr": 2, "label_weight": 1}) for name in ("styles", "earth")
    },
    "data": {},
    "rule": {"level": 0.95, "margin": 1.0, "draws": 10000},
}
STEP_S = {"m3i": 0.1, "siameseim": 0.05, "category + caption": 0.02, "slip": 0.1}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of plans in a repository of its own, with one plan that is committed."""
    folder = tmp_path / "plans"
    folder.mkdir()
    monkeypatch.setattr(plans, "FOLDER", folder)
    (folder / "small.json").write_text(json.dumps(TREE))
    rounds = {name: {m: [s, 9.0, s] for m, s in STEP_S.items()} for name in NUM_CLASSES}
    read_plan("small").write_step_times(rounds, jobs=2)
    _git(folder, "init", "--quiet")
    _commit(folder)
    return folder


def _git(folder: Path, *words: str) -> None:
    me = ("-c", "user.name=me", "-c", "user.email=me@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *me, *words], cwd=folder, check=True)


def _commit(folder: Path) -> None:
    _git(folder, "add", ".")
    _git(folder, "commit", "--quiet", "-m", "plan")


def test_every_arm_has_the_same_time() -> None:
    plan = read_plan("small")
    for run in plan.counted_runs():
        if run.arm == BASELINES:
            continue
        steps = plan.steps(run)
        seconds = [n * STEP_S[s.method] for n, s in zip(steps, ARMS[run.arm], strict=True)]
        assert sum(seconds) == pytest.approx(plan.seconds, abs=0.06)
        if run.arm == "two stages":
            assert seconds == pytest.approx([7, 3], abs=0.06)
    assert {sum(plan.steps(run)) for run in plan.tuning_runs() if run.arm == "m3i"} == {50}


def test_arms_of_a_seed_read_the_same_data_and_each_seed_holds_out_its_fold() -> None:
    plan, cfg = read_plan("small"), Config()
    jobs = [job_of(cfg, plan, run) for run in plan.counted_runs() if run.arm != BASELINES]
    for name in plan.primary:
        for seed in plan.seeds:
            of_seed = [j for j in jobs if (j.run.data_set, j.run.seed) == (name, seed)]
            assert {job.run.arm for job in of_seed} == set(plan.arms)
            fold = f"{name}-fold-{seed % 5}"
            assert {(job.whole.name, job.masks.name) for job in of_seed} == {
                (fold, f"{fold}-masks")
            }
            read = {each.data.path for job in of_seed for each in job.configs()}
            assert read == {cfg.data / f"{fold}-labelled-0.03-captioned-0.3"}
    first, *_ = (job_of(cfg, plan, run) for run in plan.tuning_runs())
    assert [path.name for path in first.data] == ["styles-fold-0-tune-labelled-0.03-captioned-0.3"]


def test_stages_of_annotations_alone_read_the_annotated_part(folder: Path) -> None:
    """Where the plan says so: category + caption, and the second one of two stages."""
    (folder / "small.json").write_text(json.dumps({**TREE, "annotated_only": True}))
    plan, cfg = read_plan("small"), Config()
    every = "earth-fold-2-labelled-0.03-captioned-0.3"
    read = {
        run.arm: [each.data.path.name for each in job_of(cfg, plan, run).configs()]
        for run in plan.counted_runs()
        if run.arm != BASELINES and (run.data_set, run.seed) == ("earth", 2)
    }
    assert read == {
        "m3i": [every],
        "siameseim": [every],
        "category + caption": [f"{every}-annotated"],
        "slip": [every],
        "two stages": [every, f"{every}-annotated"],
    }
    packed = [each for each in folders(plan) if each.options.get("annotated_only")]
    assert len(packed) == 12 and all(each.name.endswith("-annotated") for each in packed)
    assert {(each.options["labelled"], each.options["captioned"]) for each in packed} == {
        (0.03, 0.3)
    }


def test_arms_of_a_seed_draw_the_same_pictures_and_views(tmp_path: Path) -> None:
    out = openmoji.build(tmp_path / "data", limit=80, num_merges=DEMO_MERGES)
    drawn: list[Any] = []
    for arm in ARM_NAMES:
        cfg = stage_config(ARMS[arm][0], data=out, seed=3)
        loader = Loader(cfg.data)
        batches = [next(loader) for _ in range(3)]
        loader.close()
        drawn.append(batches)
        for ours, theirs in zip(batches, drawn[0], strict=True):
            assert ours.sample_id.tolist() == theirs.sample_id.tolist()
            for view, other in zip(ours.global_views, theirs.global_views, strict=True):
                assert torch.equal(view, other)
    other = Loader(stage_config(Stage(OURS), data=out, seed=4).data)
    assert next(other).sample_id.tolist() != drawn[0][0].sample_id.tolist()
    other.close()


def test_arms_differ_in_their_objective_alone() -> None:
    ours = stage_config(Stage(OURS))
    for arm in ARMS:
        for stage in ARMS[arm]:
            told = differences(ours, stage_config(stage))
            fields = {each.partition(":")[0] for each in told}
            assert all(f.startswith(("objective.", "data.local_views")) for f in fields), told


def test_every_arm_is_tuned_by_the_same_grid() -> None:
    plan = read_plan("small")
    for arm in plan.arms:
        tried = plan.tuning.settings(arm)
        assert {each.lr for each in tried} == {0.5, 1, 2}
        assert {each.label_weight for each in tried} == (
            {0.1, 1} if arm in ("m3i", "slip") else {1}
        )
        assert has_label_weight(arm) == (arm in ("m3i", "slip"))
    before = stage_config(Stage(OURS))
    after = Tuning(lr=2, label_weight=0.1).of(before)
    assert after.optim.lr == 2 * before.optim.lr
    for then, now in zip(before.objective.terms, after.objective.terms, strict=True):
        assert now.weight == then.weight * (0.1 if then.name in ("category", "caption") else 1)


def test_the_second_stage_starts_from_the_first() -> None:
    plan = read_plan("small")
    run = next(run for run in plan.counted_runs() if run.arm == "two stages")
    job = job_of(Config(out=Path("runs")), plan, run)
    first, second = job.configs()
    assert (first.num_steps, second.num_steps) == (140, 150)
    assert first.init == "" and second.init == f"run:{job.stage_folder(0)}"
    assert [t.name for t in second.objective.active_terms] == ["category", "caption"]
    assert first.seed == second.seed == run.seed


def test_a_plan_that_is_not_committed_is_refused(folder: Path) -> None:
    plan = read_plan("small")
    plan.expect_committed()
    plan.path.write_text(json.dumps({**TREE, "seconds": 11}))
    with pytest.raises(
        ValueError, match=r"small.json: expected the plan as it is committed, got a"
    ):
        read_plan("small").expect_committed()
    (folder / "new.json").write_text(json.dumps(TREE))
    with pytest.raises(ValueError, match=r"new.json: .* got one that is not committed"):
        read_plan("new").expect_committed()


def _row(plan: Plan, **changes: Any) -> dict[str, Any]:
    run = next(plan.counted_runs())
    about = {"data_set": run.data_set, "arm": run.arm, "seed": run.seed, "is_counted": True}
    about |= {"plan": plan.name, "plan_sha256": plan.digest, "lr": 2.0, "label_weight": 1.0}
    return {"figures": about | {"steps": list(plan.steps(run)), "measured": {}} | changes}


def test_a_changed_plan_and_a_run_counted_twice_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, rows = read_plan("small"), [_row(read_plan("small"))]
    monkeypatch.setattr("m3i_fast.benchmarks.one_stage.main.read_rows", lambda *_, **__: rows)
    assert [*finished(plan, None)] == [next(plan.counted_runs())]
    rows.append(_row(plan))
    with pytest.raises(ValueError, match="expected counted-styles-m3i-lr-2-labels-1-0 once, got"):
        finished(plan, None)
    rows.pop()
    plan.path.write_text(json.dumps({**TREE, "seconds": 11}))
    _commit(folder)
    with pytest.raises(ValueError, match=r"small.json: expected the plan that counted-styles-m3i"):
        finished(read_plan("small"), None)


def test_what_is_not_of_the_plan_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="plan: expected one of small, got large"):
        read_plan("large")
    with pytest.raises(ValueError, match=r"seeds: expected some of 0, 1, .* small.json has, got"):
        main(["--plan", "small", "--seeds", "9"])
    with pytest.raises(ValueError, match=r"seeds: expected some of 7, which small.json has, got"):
        main(["--plan", "small", "--tune", "--seeds", "0"])
    with pytest.raises(ValueError, match=r"pack: expected one of these flags at most"):
        Config(pack=True, tune=True)
    with pytest.raises(FileNotFoundError, match=r"styles-fold-0-tune: .* --plan small --pack"):
        main(["--plan", "small", "--data", f"{tmp_path / 'none'}"])
    (folder / "small.json").write_text(json.dumps({**TREE, "tuned": {}}))
    with pytest.raises(ValueError, match=r"tuned.styles a setting of m3i that was tried, got None"):
        read_plan("small").expect_tuned()
    (folder / "small.json").write_text(json.dumps({**TREE, "arms": ["m3i", "gpt"]}))
    with pytest.raises(ValueError, match=r"small.arms: expected some of m3i, .*, got \['gpt'\]"):
        read_plan("small")


def test_step_times_of_another_recipe_are_refused(folder: Path) -> None:
    plan = read_plan("small")
    told = json.loads(plan.step_times_path.read_text())
    told["figures"]["sets"]["earth"]["slip"]["recipe"]["optim"]["lr"] /= 2
    plan.step_times_path.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="of slip on earth with today's recipe, got that of ano"):
        plan.steps(next(plan.counted_runs()))
    plan.step_times_path.unlink()
    with pytest.raises(ValueError, match=r"got no file; .* bench one-stage --plan small --calibr"):
        read_plan("small").steps(next(plan.counted_runs()))


def test_a_plan_may_have_the_step_times_of_another(folder: Path) -> None:
    tree = {**TREE, "seconds": 30, "step_times": "small"}
    (folder / "longer.json").write_text(json.dumps(tree))
    longer, small = read_plan("longer"), read_plan("small")
    for ours, theirs in zip(longer.counted_runs(), small.counted_runs(), strict=True):
        assert longer.steps(ours) == tuple(3 * steps for steps in small.steps(theirs))
    _commit(folder)
    longer.expect_committed()
    before = longer.digest
    small.step_times_path.write_text(small.step_times_path.read_text() + "\n")
    assert read_plan("longer").digest != before
    with pytest.raises(ValueError, match="small_step_times.json: expected the plan as it is commi"):
        longer.expect_committed()
    with pytest.raises(ValueError, match=r"--calibrate: .* got those of small in longer.json"):
        main(["--plan", "longer", "--calibrate"])


def test_the_committed_plans_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "FOLDER", COMMITTED)
    names = [path.stem for path in COMMITTED.glob("*.json") if "_step_times" not in path.name]
    assert "first" in names
    for name in names:
        plan = read_plan(name)
        assert OURS in plan.arms and len(plan.digest) == 64
        assert all(sum(plan.steps(run)) > 0 for run in plan.tuning_runs())
