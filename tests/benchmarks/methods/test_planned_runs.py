"""What is run, in which order, and which rows stand for it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from m3i_fast.benchmarks.ledger.rows import append_row
from m3i_fast.benchmarks.methods import main as methods
from m3i_fast.benchmarks.methods import plan as methods_plan
from m3i_fast.benchmarks.methods.main import SUBJECT, main, run_missing
from m3i_fast.benchmarks.methods.plan import (
    Config,
    Run,
    is_label_free,
    recipe_trees,
)
from m3i_fast.benchmarks.methods.variants import AS_BEFORE, VARIANTS
from m3i_fast.config import TrainConfig
from m3i_fast.engine.trainer import Trainer
from m3i_fast.objectives.methods import METHODS
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.sources import openmoji
from m3i_fast.recipes import DEMO_MERGES, demo_method
from tests.benchmarks.methods.small_runs import TEXT, figures_of, rows_in, run_of, small_config


def _in_threads(monkeypatch: pytest.MonkeyPatch, work: Callable[..., Any]) -> None:
    monkeypatch.setattr(methods, "child_processes", ThreadPoolExecutor)
    monkeypatch.setattr(methods, "_pack", lambda *_: None)
    monkeypatch.setattr(methods, "train_and_measure", work)
    monkeypatch.setattr(methods, "calibrate", work)


def test_a_teacher_comes_first_and_its_failure_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    wrong: set[str] = {"supervised", "byol"}

    def work(_: TrainConfig, out: Path, seconds: float | None, *__: object) -> dict[str, Any]:
        method = out.name.split("-")[0]
        begun.append(method)
        if method in wrong:
            raise FloatingPointError("step 1: not finite")
        assert seconds is None
        return {"num_steps": 5, "hits": {"trained": {}}}

    _in_threads(monkeypatch, work)
    cfg = small_config(tmp_path, methods="milan,byol,global_distillation,mae", num_steps=5, jobs=1)
    failures = {run.method: why for run, why in run_missing(cfg).items()}
    assert set(begun) == {"supervised", "byol", "mae"}
    assert failures == {
        "supervised": "FloatingPointError: step 1: not finite",
        "byol": "FloatingPointError: step 1: not finite",
        "milan": "supervised did not end well",
        "global_distillation": "supervised did not end well",
    }
    assert [row["method"] for row in rows_in(cfg)] == ["mae"]

    wrong.clear()
    begun.clear()
    assert run_missing(cfg) == {}
    assert begun.index("supervised") < min(map(begun.index, ("milan", "global_distillation")))
    assert sorted(begun) == ["byol", "global_distillation", "milan", "supervised"]
    with pytest.raises(
        RuntimeError, match=r"mae-openmoji-\w+-1-1-0-5_steps-\w+: FloatingPointError"
    ):
        wrong.add("mae")
        main(
            ["--num-steps", "5", "--methods", "mae", "--jobs", "1", "--out", str(cfg.out)]
            + ["--data", str(tmp_path), "--ledger", str(tmp_path / "other")]
        )


def test_a_teacher_without_weights_is_run_again_with_its_steps(tmp_path: Path) -> None:
    cfg = small_config(tmp_path, methods="milan")
    teacher = run_of(cfg, "supervised")
    assert methods._missing(cfg) == {teacher: None, run_of(cfg, "milan"): None}
    append_row(SUBJECT, figures_of(teacher, num_steps=321), command="test", folder=cfg.ledger)
    assert methods._missing(cfg) == {teacher: 321, run_of(cfg, "milan"): None}
    train, *rest = methods._job(cfg, teacher, 321)
    assert train.num_steps == 321
    assert rest == [cfg.out / teacher.name, None, tmp_path / "openmoji", "heldout"]


def test_steps_follow_from_a_row_or_from_one_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = small_config(tmp_path, methods="m3i,clip", growth=True, seeds="0,3", seconds=30)
    known = figures_of(run_of(replace(cfg, growth=False), "m3i"), num_steps=60)
    append_row(SUBJECT, known, command="test", folder=cfg.ledger)
    todo = methods._missing(cfg)
    of = {(run.method, run.seed, run.budget.split()[0]): steps for run, steps in todo.items()}
    expected = {"10": 20, "30": 60, "90": 180, "270": 540}
    assert {key[2]: n for key, n in of.items() if key[:2] == ("m3i", 3)} == expected
    assert {key[2]: n for key, n in of.items() if key[:2] == ("m3i", 0)} == {
        seconds: steps for seconds, steps in expected.items() if seconds != "30"
    }
    assert {n for key, n in of.items() if key[0] == "clip"} == {None}

    asked: list[TrainConfig] = []

    def calibrate(train: TrainConfig, seconds: float) -> int:
        asked.append(train)
        return round(7 * seconds)

    _in_threads(monkeypatch, calibrate)
    todo = methods._calibrated(cfg, todo)
    assert len(asked) == 1 and [t.name for t in asked[0].objective.active_terms] == ["caption"]
    steps = {run.seconds: n for run, n in todo.items() if run.method == "clip"}
    assert steps == {10: 70, 30: 210, 90: 630, 270: 1890}

    waiting = replace(cfg, methods="milan", growth=False, seeds="0")
    asked.clear()
    todo = methods._calibrated(waiting, methods._missing(waiting))
    assert {run.method: n for run, n in todo.items()} == {"supervised": 210, "milan": None}
    assert len(asked) == 1  # milan's teacher is not trained yet


def test_every_run_is_planned_once(tmp_path: Path) -> None:
    cfg = small_config(tmp_path, seeds="0,2", num_steps=7)
    planned = list(methods._planned(cfg))
    names = (*METHODS, "untrained")
    assert {(run.method, run.seed) for run in planned} == {(m, s) for m in names for s in (0, 2)}
    assert len({run.name for run in planned}) == len(planned) == 2 * len(names)
    trained = [run for run in planned if run.method != "untrained"]
    assert {(run.labelled, run.captioned, run.budget) for run in trained} == {(1.0, 1.0, "7 steps")}

    assert replace(cfg, num_steps=None, seconds=1.5).budget() == "1.5 s on 1 thread"
    ablations = list(methods._planned(replace(cfg, ablations=True, seeds="0")))
    assert len({run.name for run in ablations}) == len(ablations)
    ours = {name for name in VARIANTS if not name.startswith("siameseim")}
    assert {run.method for run in ablations} == {"m3i", *ours, "untrained"}


def test_a_label_free_run_is_planned_once_for_all_shares(tmp_path: Path) -> None:
    cfg = small_config(tmp_path, annotations=True, shares="0.01,0.03:0.3", seeds="0,1")
    planned = list(methods._planned(cfg))
    of: dict[str, set[tuple[float, float]]] = {}
    for run in planned:
        of.setdefault(run.method, set()).add((run.labelled, run.captioned))
    both = {(0.01, 0.01), (0.03, 0.3)}
    assert of == {
        **dict.fromkeys(("m3i", "m3i as before", "category + caption", "supervised", "clip"), both),
        **dict.fromkeys(("siameseim", "mae", "simclr", "untrained"), {(1.0, 1.0)}),
        "siameseim as before": {(1.0, 1.0)},
    }
    assert AS_BEFORE == ("m3i as before", "siameseim as before")
    assert len(planned) == len({run.name for run in planned}) == 2 * (2 * 5 + 5)
    assert {_dataset_name(cfg, run) for run in planned} == {
        "openmoji",
        "openmoji-labelled-0.01-captioned-0.01",
        "openmoji-labelled-0.03-captioned-0.3",
    }


def _dataset_name(cfg: Config, run: Run) -> str:
    return methods._dataset(cfg, run.labelled, run.captioned).name


def test_methods_that_see_no_annotation_are_known() -> None:
    seeing = {"supervised", "clip", "siglip", "cappa", "coca", "locca", "tips", "siglip2", "slip"}
    seeing |= {"m3i"}
    taught = {"dense_distillation", "global_distillation", "milan", "radio"}  # by supervised's run
    assert {name for name in METHODS if not is_label_free(name)} == seeing | taught
    assert {name for name in VARIANTS if is_label_free(name)} == {"siameseim as before"}


@pytest.mark.usefixtures("small")
def test_annotations_change_no_bit_of_a_label_free_run(data: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    length = TEXT.context_length
    openmoji.build(
        few, limit=60, num_merges=DEMO_MERGES, context_length=length, labelled=0.03, captioned=0.3
    )
    states = {}
    for name in ("siameseim", "supervised"):
        for path in (data / "openmoji", few):
            cfg = methods_plan.config_of(name, data=path)
            # Of seed 0 the few samples of the first steps have a label in both data sets.
            cfg = replace(cfg, num_threads=1, data=replace(cfg.data, seed=1))
            trainer = Trainer(cfg, tmp_path / name / path.name)
            trainer.train()
            states[name, path] = trainer.objective.state_dict()
    first, second = (states["siameseim", path] for path in (data / "openmoji", few))
    assert all(torch.equal(first[key], second[key]) for key in first)
    first, second = (states["supervised", path] for path in (data / "openmoji", few))
    assert not all(torch.equal(first[key], second[key]) for key in first)


def test_a_variant_of_before_is_of_its_own_method(monkeypatch: pytest.MonkeyPatch) -> None:
    def slower(cfg: TrainConfig) -> TrainConfig:
        return replace(cfg, optim=replace(cfg.optim, lr=cfg.optim.lr / 2))

    for name in ("m3i", "siameseim"):
        monkeypatch.setitem(VARIANTS, f"{name} as before", slower)
        assert methods_plan.config_of(f"{name} as before") == slower(demo_method(name))


def test_rows_of_before_there_were_two_shares_are_read(tmp_path: Path) -> None:
    old = {"method": "clip", "labelled": 0.01, "seed": 3, "budget": "7 steps"}
    figures = {**old, "recipes": recipe_trees("clip"), "num_steps": 7}
    append_row(SUBJECT, figures, command="test", folder=tmp_path / "ledger")
    cfg = small_config(tmp_path, annotations=True, num_steps=7, seeds="3", methods="clip")
    [missing] = methods._missing(cfg)
    assert (missing.method, missing.labelled, missing.captioned) == ("clip", 0.03, 0.03)
    first, second = cfg.groups
    assert list(methods._rows(cfg, first)) == ["clip"] and methods._rows(cfg, second) == {}
    free = {**figures, "method": "mae", "labelled": 1.0, "recipes": recipe_trees("mae")}
    append_row(SUBJECT, free, command="test", folder=cfg.ledger)
    assert list(methods._rows(cfg, second)) == ["mae"]  # at every share
    assert set(methods._rows(cfg, first)) == {"clip", "mae"}
    apart = replace(cfg, shares="0.01:0.02")
    assert (
        list(methods._rows(apart, apart.groups[0])) == ["mae"] and len(methods._missing(apart)) == 1
    )
    other = replace(cfg, dataset="styles")
    assert methods._rows(other, other.groups[0]) == {} and len(methods._missing(other)) == 2


def test_rows_of_other_pictures_are_not_reused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = small_config(tmp_path, num_steps=7, methods="clip", data=data)
    [run] = methods._missing(cfg)
    assert run.data == read_manifest(data / "openmoji").digest[:8]
    figures = figures_of(run, num_steps=7)
    append_row(SUBJECT, figures, command="test", folder=cfg.ledger)
    assert methods._missing(cfg) == {}
    elsewhere = replace(cfg, data=tmp_path / "nothing")  # for a table the rows say which
    assert methods._data_digest(elsewhere) == run.data
    append_row(SUBJECT, {**figures, "data": "0" * 8}, command="test", folder=cfg.ledger)
    assert methods._data_digest(elsewhere) == "0" * 8
    assert list(methods._rows(cfg, cfg.groups[0])) == ["clip"]
    openmoji.build(tmp_path / "other" / "openmoji", limit=9, num_merges=DEMO_MERGES)
    assert [run.method for run in methods._missing(replace(cfg, data=tmp_path / "other"))] == [
        "clip"
    ]


def test_data_sets_are_packed_or_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(methods, "pack_demo", lambda path, **how: asked.append((path.name, how)))
    cfg = small_config(tmp_path)
    methods._pack(cfg, 1.0, 1.0)
    methods._pack(cfg, 0.03, 0.3)
    tuned = replace(cfg, dataset="openmoji-tune")
    methods._pack(tuned, 1.0, 1.0)
    assert methods._job(tuned, run_of(tuned, "clip"), 5)[3:] == (tmp_path / "openmoji-tune", "tune")
    assert asked == [
        ("openmoji", {"labelled": 1.0, "captioned": None, "tune": 0.0}),
        ("openmoji-labelled-0.03-captioned-0.3", {"labelled": 0.03, "captioned": 0.3, "tune": 0.0}),
        ("openmoji-tune", {"labelled": 1.0, "captioned": None, "tune": 0.2}),
    ]
    with pytest.raises(
        FileNotFoundError,
        match=r"type m3i-fast data styles \S+/styles-labelled-0.03-captioned-0.3 --labelled 0.03 "
        r"--captioned 0.3 --num-merges 500",
    ):
        methods._pack(replace(cfg, dataset="styles"), 0.03, 0.3)
    openmoji.build(tmp_path / asked[1][0], limit=9, labelled=0.5, num_merges=DEMO_MERGES)
    with pytest.raises(ValueError, match="expected classes of 0.03 and captions of 0.3 .* 0.5 and"):
        methods._pack(cfg, 0.03, 0.3)


def test_there_is_a_table_a_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--table-only", "--num-steps", "7", "--ledger", str(tmp_path)]
    arguments += ["--data", str(tmp_path)]
    main(["--annotations", *arguments])
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in shown if line] == [
        f"7 steps a run, classes of {share} % of the concepts, captions of {share} %"
        for share in (1, 3)
    ]
    main(["--shares", "0.5:1", "--dataset", "styles", *arguments])
    assert "7 steps a run, styles, classes of 50 % of the concepts, captions of 100 %" in (
        capsys.readouterr().out
    )
    main(["--growth", *arguments[:2], "9", *arguments[3:]])
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(" steps")[0] for line in shown if line] == ["3", "9", "27", "81"]
    assert list(tmp_path.iterdir()) == []


def test_one_plan_at_a_time() -> None:
    with pytest.raises(ValueError, match="ablations, growth: expected one of them at most"):
        Config(ablations=True, growth=True)
    with pytest.raises(ValueError, match="calibrate: expected --pilot or --targets with it"):
        Config(calibrate=True)
    with pytest.raises(ValueError, match="holm: expected --pilot with it.*type --pilot --holm"):
        Config(targets=True, holm=True)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seconds", 0.0, "seconds: expected > 0, got 0"),
        ("num_steps", 0, "num_steps: expected > 0, got 0"),
        ("jobs", 0, "jobs: expected > 0, got 0"),
        ("seeds", "0;1", "seeds: expected numbers as 0,1,2, got '0;1'"),
        ("shares", "0.1,3", "shares: expected fractions as 0.01,0.03 or 0.03:0.3, got '3'"),
        ("shares", "0.1:x", "shares: expected fractions .*, got '0.1:x'"),
        ("methods", "m3i,m4i", r"methods: expected some of .*siglip.*, got \['m4i'\]"),
        ("measures", "knn", r"measures: expected some of knn_top1, .*, got \['knn'\]"),
    ],
)
def test_a_wrong_field_is_named(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**{field: value})  # type: ignore[arg-type]
