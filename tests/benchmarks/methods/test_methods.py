"""The methods' benchmark from runs to tables: one row a run, and stopped runs go on."""

import os
import signal
import time
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from m3i_fast.benchmarks.methods import main as methods
from m3i_fast.benchmarks.methods import plan as methods_plan
from m3i_fast.benchmarks.methods import run as methods_run
from m3i_fast.benchmarks.methods.main import main, run_missing
from m3i_fast.benchmarks.methods.run import is_trained, train_and_measure, unpack
from m3i_fast.config import TrainConfig
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.engine.evaluator import Evaluation
from m3i_fast.engine.train_step import TrainStep
from m3i_fast.engine.trainer import Trainer
from m3i_fast.evaluation.held_out import HeldOut
from m3i_fast.observe.metrics import read_jsonl
from m3i_fast.pipelines.dataset.sample_table import split_digest
from tests.benchmarks.methods.small_runs import rows_in, run_of, small_config


@pytest.mark.usefixtures("small")
def test_from_runs_to_tables(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = small_config(tmp_path, data=data, methods="dense_distillation", num_steps=2)
    ours, teacher = (run_of(cfg, name) for name in ("dense_distillation", "supervised"))
    (cfg.out / teacher.name).mkdir(parents=True)  # stopped before it had a checkpoint
    (cfg.out / teacher.name / "config.json").write_text("{}")
    assert run_missing(cfg) == {}

    rows = rows_in(cfg)
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
    cfg = small_config(tmp_path, data=data)
    train, out, seconds, *rest = methods._job(cfg, run_of(cfg, "m3i"), None)
    assert seconds == 90 and train.num_threads == 1 and rest == [data / "openmoji", "heldout"]
    none = torch.zeros(0)
    found = Evaluation({"trained_minus": {}}, {}, HeldOut(group=none, cluster=none, distance=none))
    asked: dict[str, Any] = {}
    monkeypatch.setattr(methods_run, "evaluate", lambda *_, **how: asked.update(how) or found)
    monkeypatch.setattr(methods_run, "calibrate", lambda *_: 4)
    step = TrainStep.__call__

    def stopped(train_step: TrainStep, *arguments: Any, **more: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return step(train_step, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", stopped)
        with pytest.raises(InterruptedError, match="signal 2 at step 1 of 4; the same command"):
            train_and_measure(train, out, seconds, data, "heldout")
    assert not is_trained(out)
    monkeypatch.setattr(methods_run, "calibrate", None)
    row = train_and_measure(train, out, seconds, data, "tune")
    assert (asked["data"], asked["split"]) == (data, "tune")
    assert (row["num_steps"], row["resumed"]) == (4, True)
    assert [logged["step"] for logged in read_jsonl(out / "metrics.jsonl")] == [1, 2, 3, 4]
    logged = (out / "metrics.jsonl").read_bytes()
    trainer = Trainer(TrainConfig.load(out / "config.json"), out, resume=True)
    assert trainer.train().signal is None  # killed after its last step, before it had a row
    assert (out / "metrics.jsonl").read_bytes() == logged
    assert is_trained(out) and not is_trained(out / "nothing")


@pytest.mark.usefixtures("small")
def test_a_killed_run_goes_on_and_the_others_did(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "CHECKPOINT_EVERY", 2)
    cfg = small_config(tmp_path, data=data, methods="supervised,siameseim", num_steps=40, jobs=2)
    out = cfg.out / run_of(cfg, "supervised").name

    def kill() -> None:
        while not checkpoint.checkpoints(out / "checkpoints"):
            time.sleep(0.02)
        first = min(active_children(), key=lambda child: int(child.name.rpartition("-")[2]))
        os.kill(first.pid or 0, signal.SIGKILL)

    killer = Thread(target=kill, daemon=True)
    killer.start()
    failures = {run.method: why for run, why in run_missing(cfg).items()}
    killer.join()
    assert failures.keys() == {"supervised"} and "BrokenProcessPool" in failures["supervised"]
    assert [row["method"] for row in rows_in(cfg)] == ["siameseim"] and not is_trained(out)

    assert run_missing(cfg) == {}
    [_, row] = rows_in(cfg)
    assert (row["method"], row["num_steps"], row["resumed"]) == ("supervised", 40, True)
    assert [logged["step"] for logged in read_jsonl(out / "metrics.jsonl")] == [*range(1, 41)]
