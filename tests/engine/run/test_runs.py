"""All that a resume goes on with, and the checkpoint that it takes."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from m3i_fast.benchmarks.faults.failing_files import flip_byte, forge
from m3i_fast.cli import main
from m3i_fast.config import TrainConfig
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.engine.checkpoint.checkpoints import Checkpoint
from m3i_fast.engine.checkpoint.layout import STATE_SHAPE
from m3i_fast.engine.checkpoint.saver import Saver
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.engine.precision.arithmetic import Arithmetic
from m3i_fast.engine.run.directory import Run
from m3i_fast.engine.run.log import RunLog
from m3i_fast.engine.run.random_state import random_state, set_random_state
from m3i_fast.engine.trainer import Trainer
from m3i_fast.observe import collapse
from m3i_fast.observe.collapse import HealthyRange
from m3i_fast.observe.metrics import JsonlSink, read_jsonl
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.loader import Loader
from tests.shared.engine.checkpoint_cases import assert_equal, trained
from tests.shared.engine.replaced_step import replace_call
from tests.shared.engine.small_run import small_run

OF_THE_MACHINE = ("time/", "throughput/", "efficiency/", "host/", "gpu/")


class Watched(Trainer):
    """Notes the ids of its samples, and has SIGTERM sent to it in the step `stop_at`."""

    stop_at = 0
    sample_ids: list[list[int]]

    def watch_steps(self) -> None:
        take = self.train_step.__call__

        def noted(batch: Batch, *, monitor: bool = False) -> dict[str, Tensor]:
            self.sample_ids.append(batch.sample_id.tolist())
            if len(self.sample_ids) == self.stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return take(batch, monitor=monitor)

        replace_call(self, noted)


def _train(cfg: TrainConfig, out: Path, *, resume: bool = False, stop_at: int = 0) -> Watched:
    trainer = Watched(cfg, out, resume=resume)
    trainer.sample_ids, trainer.stop_at = [], stop_at
    trainer.watch_steps()
    trainer.train()
    return trainer


def _saved(run: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    newest = checkpoint.latest(run / "checkpoints")
    tensors = {
        f"{part}/{name}": tensor
        for part in ("model", "optimizer")
        for name, tensor in newest.shards(part).read().items()
    }
    return tensors, newest.state()


@pytest.mark.parametrize("background", [True, False])
def test_a_resumed_run_is_the_whole_run_in_all_it_keeps(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    background: bool,
) -> None:
    """Interrupted between two logged steps, with a monitor out of its range since one."""
    never = HealthyRange(pattern="monitor/target_rank", low=1e9, cause="c", remedy="r")
    monkeypatch.setattr(collapse, "HEALTHY_RANGES", (never,))
    cfg = small_run(dataset, checkpoint_every=4, async_checkpoint=background)
    runs = {}
    for name, parts in {"whole": [0], "parts": [8, 0]}.items():
        random.seed(1), np.random.seed(1)
        ids, caplog.records[:] = [], []
        for number, stop_at in enumerate(parts):
            with caplog.at_level(logging.WARNING):
                trainer = _train(cfg, tmp_path / name, resume=number > 0, stop_at=stop_at)
            ids += trainer.sample_ids
            random.seed(2), np.random.seed(2)  # another process has other generators
        said = [r.getMessage() for r in caplog.records if "collapse?" in r.getMessage()]
        rows = [
            {k: v for k, v in row.items() if not k.startswith(OF_THE_MACHINE)}
            for row in read_jsonl(tmp_path / name / "metrics.jsonl")
        ]
        runs[name] = (*_saved(tmp_path / name), ids, said, rows)
    tensors, state, ids, said, rows = runs["whole"]
    assert_equal(runs["parts"][0], tensors)
    assert runs["parts"][1] == state and state["watch"]["monitor/target_rank"] == 3
    assert runs["parts"][2] == ids and len(ids) == cfg.num_steps
    assert runs["parts"][3] == said and len(said) == 1 and "step 15" in said[0]
    assert runs["parts"][4] == rows
    assert any("target" in name or "momentum" in name for name in tensors)  # the EMA
    assert TrainConfig.load(tmp_path / "whole" / "config.json") == cfg
    assert state["config"] == json.loads(cfg.to_json())
    assert state.keys() == {name.removesuffix("?") for name in STATE_SHAPE}


@pytest.mark.parametrize(("name", "best"), [("loss/total", min), ("+loss/total", max)])
def test_the_best_checkpoint_is_kept(
    dataset: Path, tmp_path: Path, name: str, best: Callable[[dict[int, float]], int]
) -> None:
    """Also where a resume comes between it and the next one."""
    out = tmp_path / "run"
    cfg = small_run(dataset, num_steps=12, log_every=2, checkpoint_every=2, keep_checkpoints=1)
    cfg = replace(cfg, keep_best=name)
    _train(cfg, out, stop_at=7)
    _train(cfg, out, resume=True)
    rows = read_jsonl(out / "metrics.jsonl")
    losses = {int(row["step"]): row["loss/total"] for row in rows if row["step"] % 2 == 0}
    of_best = best(losses, key=losses.__getitem__)  # type: ignore[call-arg]
    assert [c.step for c in checkpoint.checkpoints(out / "checkpoints")] == sorted({of_best, 12})


def test_an_unknown_metric_has_no_best(dataset: Path, tmp_path: Path) -> None:
    cfg = small_run(dataset, num_steps=2, log_every=1, keep_best="loss/totl")
    with pytest.raises(ValueError, match=r"keep_best: expected one of .*loss/total.* 'loss/totl'"):
        _train(cfg, tmp_path / "run")


def test_a_best_by_what_the_first_rank_alone_measures_is_its_own(
    dataset: Path, tmp_path: Path
) -> None:
    cfg = small_run(dataset, log_every=1, keep_best="+efficiency/mfu")
    bf16 = Arithmetic(recipe="bf16", backend="torch", compute_dtype=torch.bfloat16)
    cpu = torch.device("cpu")
    first, second = (RunLog(cfg, tmp_path, World(cpu, rank, 2), bf16) for rank in range(2))
    first.write(1, {"loss/total": 2.0, "efficiency/mfu": 0.4})
    second.write(1, {"loss/total": 2.0})
    assert (first.score, second.score) == (-0.4, None)


def test_a_run_of_before_there_were_manifests_goes_on(dataset: Path, tmp_path: Path) -> None:
    cfg, out = small_run(dataset, num_steps=10, checkpoint_every=5), tmp_path / "older"
    _train(cfg, tmp_path / "whole")
    _train(cfg, out, stop_at=7)
    newest = checkpoint.latest(out / "checkpoints")
    state = newest.state()
    parts = {part: newest.shards(part).read() for part in ("model", "optimizer")}
    shutil.rmtree(out / "checkpoints")
    newest.path.mkdir(parents=True)
    for part, tensors in parts.items():
        save_file(tensors, newest.path / f"{part}.safetensors")
    (newest.path / "state.json").write_text(json.dumps({"loader": state["loader"]}))
    fields = json.loads((out / "config.json").read_text())
    del fields["keep_every"], fields["async_checkpoint"]
    (out / "config.json").write_text(json.dumps(fields))
    assert _train(cfg, out, resume=True).sample_ids
    assert_equal(_saved(out)[0], _saved(tmp_path / "whole")[0])
    assert [c.step for c in checkpoint.checkpoints(out / "checkpoints")] == [7, 10]


def test_a_resume_passes_a_damaged_checkpoint_over(dataset: Path, tmp_path: Path) -> None:
    cfg = small_run(dataset, num_steps=10)
    _train(cfg, tmp_path / "whole")
    expected = _saved(tmp_path / "whole")[0]
    for path in (tmp_path / "whole" / "checkpoints" / "step_00000010").glob("model/*"):
        flip_byte(path)
    assert _train(cfg, tmp_path / "whole", resume=True).step == 10
    assert_equal(_saved(tmp_path / "whole")[0], expected)
    found = checkpoint.checkpoints(tmp_path / "whole" / "checkpoints")
    assert [(c.step, c.damage()) for c in found] == [(5, None), (10, None)]


def test_auto_resume_begins_goes_on_and_says_which(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg, out = small_run(dataset, num_steps=10), tmp_path / "run"

    def started(cfg: TrainConfig) -> Trainer:
        with caplog.at_level(logging.INFO):
            return Trainer(cfg, out, resume="auto")

    started(cfg).run.close()  # killed before its first checkpoint
    assert f"no run in {out}: it begins" in caplog.text
    trainer = started(cfg)
    assert trainer.step == 0 and "before its first checkpoint: it begins again" in caplog.text
    with pytest.raises(FileExistsError, match=f"process {os.getpid()} .* is training in it"):
        started(cfg)
    trainer.train()
    assert [row["step"] for row in read_jsonl(out / "metrics.jsonl")] == [5, 10]
    trainer = started(cfg)
    assert trainer.step == 10
    assert trainer.train().signal is None  # of a run that is done, the job ends well
    with pytest.raises(ValueError, match="seed: 0 != 1"):
        started(replace(cfg, seed=1))
    for path in out.glob("checkpoints/*/model/*"):
        flip_byte(path)
    with pytest.raises(ValueError, match="no good checkpoint"):  # never begins in silence
        started(cfg)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b'{"random": {"python": 3}}'])
def test_auto_resume_passes_over_a_state_that_cannot_be_taken(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    """A checkpoint whose manifest agrees with it."""
    cfg, out = small_run(dataset, num_steps=10), tmp_path / "run"
    _train(cfg, out)
    forge(out / "checkpoints" / "step_00000010", "state/00001-of-00001.json", content)
    with caplog.at_level(logging.WARNING):
        trainer = Trainer(cfg, out, resume="auto")
    assert trainer.step == 5 and "state/00001-of-00001.json: damaged" in caplog.text
    trainer.close()


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"", b'{"vision": []}'])
def test_auto_resume_takes_the_config_of_a_checkpoint_for_a_damaged_one(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    cfg, saver = small_run(dataset, num_steps=5), Saver(tmp_path / "checkpoints", keep=1)
    path = tmp_path / "config.json"
    path.write_bytes(content)

    def found(cfg: TrainConfig) -> Checkpoint | None:
        run = Run(tmp_path, cfg)
        try:
            return run.find_checkpoint("auto")
        finally:
            run.close()

    with pytest.raises(ValueError, match="config.json: "):  # no checkpoint has it
        found(cfg)
    model, optimizer = trained(1)
    state = {"config": json.loads(cfg.to_json())}
    saver.save(step=5, model=model, optimizer=optimizer, state=state)
    with pytest.raises(ValueError, match="differs from .*step_00000005: seed: 0 != 1"):
        found(replace(cfg, seed=1))
    assert path.read_bytes() == content
    resumed = found(cfg)
    assert resumed is not None and resumed.step == 5
    assert "config.json: " in caplog.text and "written anew, as" in caplog.text
    assert TrainConfig.load(path) == cfg


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"loader": {"version": 1}}, "loader: loader state: expected version 2, got 1"),
        ({"loader": {"version": "2"}}, "loader: loader state: expected version 2, got '2'"),
        ({"num_ranks": 2, "loader": {}}, "loader: loader state: expected version 2, got None"),
        ({"random": {"python": [3], "numpy": [], "torch": ""}}, "random: not enough values"),
    ],
)
def test_a_part_of_a_state_that_cannot_be_taken_is_named(
    dataset: Path, state: dict[str, object], reason: str
) -> None:
    loader = Loader(small_run(dataset).data)
    with pytest.raises(ValueError, match=f"the checkpoint's state: {reason}"):
        Run.restore(state, num_ranks=1, loader=loader)


def test_resume_and_auto_resume_are_two_wishes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    assert main(["train", "demo", "--out", out, "--resume", "--auto-resume"]) == 2
    assert "--auto-resume: expected without --resume" in capsys.readouterr().err
    assert main(["train", "demo", "--out", out, "--resume"]) == 2
    assert "--resume: no run in" in " ".join(capsys.readouterr().err.split())


def test_a_failed_save_ends_the_run_with_its_error(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("m3i_fast.engine.checkpoint.saver.write_shards", full)
    with pytest.raises(OSError, match="No space"):
        Trainer(small_run(dataset, num_steps=5), tmp_path / "run").train()
    assert checkpoint.checkpoints(tmp_path / "run" / "checkpoints") == []


def test_random_generators_go_on() -> None:
    state = json.loads(json.dumps(random_state()))
    first = random.random(), np.random.normal(), torch.rand(3).tolist()
    set_random_state(state)
    assert (random.random(), np.random.normal(), torch.rand(3).tolist()) == first


def test_rows_that_a_power_cut_spoilt_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": 0.5} for step in (5, 10, 15)]
    first, second, third = (json.dumps(row).encode() for row in rows)
    other = [b"[]", b'{"loss": 1}', b"[" * 100_000, b'{"step": 10, "x": {}}']
    path.write_bytes(b"\n".join([first, b"\0" * 9, second, third, *other, b'{"step": 20, "lo']))
    sink = JsonlSink(path, start_step=10)
    assert "metrics.jsonl:2: damaged" in caplog.text
    for number, reason in enumerate(("an object, got a list", "step: ", "too deeply", "x: "), 5):
        assert re.search(rf"metrics.jsonl:{number}: damaged: .*{reason}", caplog.text)
    sink.log(12, {"loss": 0.25})
    sink.close()
    assert read_jsonl(path) == [*rows[:2], {"step": 12, "loss": 0.25}]
