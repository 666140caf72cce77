"""The methods' benchmark: one row a run, nothing run twice, teachers first, stopped runs go on."""

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from m3i_fast.benchmarks import methods, methods_plan, methods_run
from m3i_fast.benchmarks.ledger import append_row, read_rows
from m3i_fast.benchmarks.methods import SUBJECT, main, run_missing
from m3i_fast.benchmarks.methods_ablation import SHARES, VARIANTS
from m3i_fast.benchmarks.methods_plan import Config, Run, recipe_digest
from m3i_fast.benchmarks.methods_run import is_trained, train_and_measure, unpack
from m3i_fast.config import TrainConfig
from m3i_fast.engine.evaluator import Evaluation
from m3i_fast.engine.trainer import Trainer
from m3i_fast.evaluation.held_out import HeldOut
from m3i_fast.models.text import TextConfig
from m3i_fast.objectives.methods import METHODS
from m3i_fast.observe.metrics import read_jsonl
from m3i_fast.pipelines import openmoji
from m3i_fast.pipelines.shards import split_digest
from m3i_fast.recipes import DEMO_MERGES, demo, shrink

config_of = methods_plan.config_of
TEXT = TextConfig(
    vocab_size=512 + DEMO_MERGES + 2,
    context_length=demo().text.context_length,
    dim=32,
    depth=1,
    num_heads=2,
    embed_dim=32,
)
SMALL = ("supervised", "dense_distillation", "m3i", "untrained")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The methods of SMALL at a size that trains in a second."""

    def shrunk(method: str, *, data: Path = Path("data"), seed: int = 0) -> TrainConfig:
        cfg = config_of(method, data=data, seed=seed)
        return shrink(cfg, path=data, num_classes=9, text=TEXT) if method in SMALL else cfg

    monkeypatch.setattr(methods_plan, "config_of", shrunk)


def _config(tmp_path: Path, **changes: Any) -> Config:
    """One thread a run: two threads that share two cores with other tests would spin."""
    places = {"data": tmp_path, "out": tmp_path / "runs", "ledger": tmp_path / "ledger"}
    return Config(**{"jobs": os.cpu_count(), **places, **changes})


def _run(cfg: Config, method: str) -> Run:
    budget = cfg.budget()
    return Run(method=method, labelled=1.0, seed=0, budget=budget, recipe=recipe_digest(method))


def _rows(cfg: Config) -> list[dict[str, Any]]:
    return [row["figures"] for row in read_rows(SUBJECT, folder=cfg.ledger)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small `openmoji`."""
    folder = tmp_path_factory.mktemp("data")
    length = TEXT.context_length
    openmoji.build(folder / "openmoji", limit=60, num_merges=DEMO_MERGES, context_length=length)
    return folder


@pytest.mark.usefixtures("small")
def test_from_runs_to_tables(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = _config(tmp_path, data=data, methods="dense_distillation", num_steps=2)
    ours, teacher = (_run(cfg, name) for name in ("dense_distillation", "supervised"))
    (cfg.out / teacher.name).mkdir(parents=True)  # stopped before it had a checkpoint
    (cfg.out / teacher.name / "config.json").write_text("{}")
    assert run_missing(cfg) == {}

    rows = _rows(cfg)
    assert [(row["method"], row["teacher"]) for row in rows] == [
        ("supervised", None),
        ("dense_distillation", teacher.name),
    ]
    saved = TrainConfig.load(cfg.out / ours.name / "config.json")
    assert saved.objective.teacher == str(cfg.out / teacher.name)
    for run, row in zip((teacher, ours), rows, strict=True):
        hits = unpack(row["hits"]["trained"]["knn_top1"])
        assert len(hits) == row["held_out_concepts"]
        assert sum(hits) / len(hits) == pytest.approx(row["knn_top1"]["trained"])
        assert (row["budget"], row["num_steps"], row["resumed"]) == ("2 steps", 2, False)
        assert row["split_digest"] == split_digest(data / "openmoji", "heldout")
        is_hard = unpack(row["items"]["hard"])
        hard = [hit for hit, of in zip(hits, is_hard, strict=True) if of]
        assert sum(hard) / len(hard) == pytest.approx(row["knn_top1_hard"]["trained"])
        assert len(row["items"]["cluster"]) == len(hits) == 2 * len(hard)
        assert row["train_seconds"] > 0 and row["train_images_per_s"] > 0
        logged = read_jsonl(cfg.out / run.name / "metrics.jsonl")
        assert row["final_loss"] == logged[-1]["loss/total"]

    monkeypatch.setattr(methods, "train_and_measure", None)  # nothing is run from here on
    arguments = ["--num-steps", "2", "--ledger", str(cfg.ledger), "--data", str(data)]
    ledger = tmp_path / "ledger" / "methods.jsonl"
    written = ledger.read_bytes()
    main([*arguments, "--out", str(cfg.out), "--methods", cfg.methods, "--jobs", str(cfg.jobs)])
    assert ledger.read_bytes() == written
    shown = capsys.readouterr().out
    assert "| dense_distillation (t) |" in shown and "| supervised |" in shown
    assert ledger.with_suffix(".svg").read_text().startswith("<svg")

    main([*arguments, "--table-only", "--num-steps", "3"])  # another budget
    assert "no row in the ledger" in capsys.readouterr().out
    older = methods_plan.config_of

    def newer(method: str, **where: Any) -> TrainConfig:
        cfg = older(method, **where)
        return replace(cfg, optim=replace(cfg.optim, lr=2 * cfg.optim.lr))

    monkeypatch.setattr(methods_plan, "config_of", newer)
    todo = methods._missing(cfg)
    assert {run.method for run in todo} == {"supervised", "dense_distillation"}
    assert not {run.recipe for run in todo} & {row["recipe"] for row in rows}
    main([*arguments, "--table-only"])
    assert "no row in the ledger" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_a_stopped_run_goes_on_with_its_number_of_steps(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = _config(tmp_path, data=data)
    train, out, seconds, *rest = methods._job(cfg, _run(cfg, "m3i"), None)
    assert seconds == 90 and train.num_threads == 1 and rest == [data / "openmoji"]
    none = torch.zeros(0)
    found = Evaluation({"trained_minus": {}}, {}, HeldOut(group=none, cluster=none, distance=none))
    monkeypatch.setattr(methods_run, "evaluate", lambda *_, **__: found)
    monkeypatch.setattr(methods_run, "calibrate", lambda *_: 4)
    step = Trainer.train_step

    def stopped(trainer: Trainer, *arguments: Any, **more: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stopped)
        with pytest.raises(InterruptedError, match="signal 2 at step 1 of 4; the same command"):
            train_and_measure(train, out, seconds, data)
    assert not is_trained(out)
    monkeypatch.setattr(methods_run, "calibrate", None)
    row = train_and_measure(train, out, seconds, data)
    assert (row["num_steps"], row["resumed"]) == (4, True)
    assert [logged["step"] for logged in read_jsonl(out / "metrics.jsonl")] == [1, 2, 3, 4]
    assert is_trained(out) and not is_trained(out / "nothing")


# ---- What is run, and in which order -------------------------------------------------------------


def _in_threads(monkeypatch: pytest.MonkeyPatch, work: Callable[..., Any]) -> None:
    monkeypatch.setattr(methods, "ProcessPoolExecutor", lambda jobs, _: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(methods, "is_dataset", lambda _: True)
    monkeypatch.setattr(methods, "train_and_measure", work)
    monkeypatch.setattr(methods, "calibrate", work)


def test_a_teacher_comes_first_and_its_failure_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    wrong: set[str] = {"supervised", "byol"}

    def work(_: TrainConfig, out: Path, seconds: float | None, __: Path) -> dict[str, Any]:
        method = out.name.split("-")[0]
        begun.append(method)
        if method in wrong:
            raise FloatingPointError("step 1: not finite")
        assert seconds is None
        return {"num_steps": 5, "hits": {"trained": {}}}

    _in_threads(monkeypatch, work)
    cfg = _config(tmp_path, methods="milan,byol,global_distillation,mae", num_steps=5, jobs=1)
    failures = {run.method: why for run, why in run_missing(cfg).items()}
    assert set(begun) == {"supervised", "byol", "mae"}
    assert failures == {
        "supervised": "FloatingPointError: step 1: not finite",
        "byol": "FloatingPointError: step 1: not finite",
        "milan": "supervised did not end well",
        "global_distillation": "supervised did not end well",
    }
    assert [row["method"] for row in _rows(cfg)] == ["mae"]

    wrong.clear()
    begun.clear()
    assert run_missing(cfg) == {}
    assert begun.index("supervised") < min(map(begun.index, ("milan", "global_distillation")))
    assert sorted(begun) == ["byol", "global_distillation", "milan", "supervised"]
    with pytest.raises(RuntimeError, match=r"mae-1-0-5_steps-\w+: FloatingPointError: step 1"):
        wrong.add("mae")
        main(
            ["--num-steps", "5", "--methods", "mae", "--jobs", "1", "--out", str(cfg.out)]
            + ["--data", str(tmp_path), "--ledger", str(tmp_path / "other")]
        )


def test_a_teacher_without_weights_is_run_again_with_its_steps(tmp_path: Path) -> None:
    cfg = _config(tmp_path, methods="milan")
    teacher = _run(cfg, "supervised")
    assert methods._missing(cfg) == {teacher: None, _run(cfg, "milan"): None}
    figures = {**{name: getattr(teacher, name) for name in Run.__slots__}, "num_steps": 321}
    append_row(SUBJECT, figures, command="test", folder=cfg.ledger)
    assert methods._missing(cfg) == {teacher: 321, _run(cfg, "milan"): None}
    train, *rest = methods._job(cfg, teacher, 321)
    assert train.num_steps == 321
    assert rest == [cfg.out / teacher.name, None, tmp_path / "openmoji"]


def test_steps_follow_from_a_row_or_from_one_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = _config(tmp_path, methods="m3i,clip", growth=True, seeds="0,3", seconds=30)
    known = {**asdict(_run(cfg, "m3i")), "num_steps": 60}
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
    cfg = _config(tmp_path, seeds="0,2", num_steps=7)
    planned = list(methods._planned(cfg))
    names = (*METHODS, "untrained")
    assert {(run.method, run.seed) for run in planned} == {(m, s) for m in names for s in (0, 2)}
    assert len({run.name for run in planned}) == len(planned) == 2 * len(names)
    trained = [run for run in planned if run.method != "untrained"]
    assert {(run.labelled, run.budget) for run in trained} == {(1.0, "7 steps")}

    assert replace(cfg, num_steps=None, seconds=1.5).budget() == "1.5 s on 1 thread"
    ablations = list(methods._planned(replace(cfg, ablations=True, seeds="0")))
    assert len({run.name for run in ablations}) == len(ablations)
    of = {share: {r.method for r in ablations if r.labelled == share} for share in SHARES}
    assert of[1.0] == {"m3i", "supervised", "clip", *VARIANTS, "untrained"}
    assert of[0.01] == of[0.1] == of[0.5] == {"m3i", "supervised", "clip", "category + caption"}


def test_there_is_a_table_a_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--ablations", "--table-only", "--num-steps", "7", "--ledger", str(tmp_path)])
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in shown if line] == [
        f"7 steps a run, classes of {share} % of the concepts, captions of {share} %"
        for share in (100, 50, 10, 1)
    ]
    main(["--growth", "--table-only", "--num-steps", "9", "--ledger", str(tmp_path)])
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(" steps")[0] for line in shown if line] == ["3", "9", "27", "81"]
    assert list(tmp_path.iterdir()) == []


def test_ablations_do_not_grow() -> None:
    with pytest.raises(ValueError, match="ablations, growth: expected one of them at most"):
        Config(ablations=True, growth=True)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seconds", 0.0, "seconds: expected > 0, got 0"),
        ("num_steps", 0, "num_steps: expected > 0, got 0"),
        ("jobs", 0, "jobs: expected > 0, got 0"),
        ("seeds", "0;1", "seeds: expected numbers as 0,1,2, got '0;1'"),
        ("methods", "m3i,m4i", r"methods: expected some of .*siglip.*, got \['m4i'\]"),
    ],
)
def test_a_wrong_field_is_named(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**{field: value})  # type: ignore[arg-type]


# ---- Digests -------------------------------------------------------------------------------------


def test_the_rows_of_the_ledger_are_of_these_recipes() -> None:
    """Else they are measured again, or what is new in a config belongs to ADDED."""
    found = {row["figures"]["method"]: row["figures"]["recipe"] for row in read_rows(SUBJECT)}
    assert {name: found[name] for name in METHODS} == {
        name: recipe_digest(name) for name in METHODS
    }


def test_a_digest_is_of_the_recipe_and_of_its_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    names = (*METHODS, *VARIANTS)
    before = {name: recipe_digest(name) for name in names}
    assert len(set(before.values())) == len(names)

    def changed(method: str, **where: Any) -> TrainConfig:
        cfg = config_of(method, **where)
        slower = replace(cfg, optim=replace(cfg.optim, lr=cfg.optim.lr / 2))
        return slower if method == "supervised" else cfg

    monkeypatch.setattr(methods_plan, "config_of", changed)
    different = {name for name in names if recipe_digest(name) != before[name]}
    assert different == {"supervised", "dense_distillation", "global_distillation", "milan"}
