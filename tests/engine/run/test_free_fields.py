"""Resumes of a run, also of a mixture, with moved data or other free fields: they go on exactly."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from m3i_fast.cli import main
from m3i_fast.config import TrainConfig
from m3i_fast.config.guard import GuardConfig
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.engine.checkpoint.layout import STATE_SHAPE
from m3i_fast.engine.run.data_fields import take_data_fields
from m3i_fast.engine.trainer import Trainer
from m3i_fast.json_files import parse_json
from m3i_fast.observe.metrics import read_jsonl
from m3i_fast.pipelines.dataset.pack import write_dataset
from m3i_fast.recipes import demo, shrink
from tests.shared.engine.small_run import TEXT, assert_same_run, saved_tensors, small_run
from tests.shared.pipelines.data import encode_image, info, sample, smooth_picture


def packed(out: Path, size: int, classes: tuple[str, ...]) -> Path:
    samples = [sample(i, encode_image(smooth_picture(i, 40, 48))) for i in range(size)]
    return write_dataset(
        out, {"train": samples}, info(class_names=classes), seed=0, samples_per_shard=8
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    packed(folder / "a", 12, ("cat", "dog", "owl"))
    packed(folder / "b", 9, ("owl", "ant", "cat"))
    return folder


def mixture(folder: Path) -> tuple[str, str]:
    return f"{folder}/a:train:0.7", f"{folder}/b:train:0.3"


def small(folder: Path, *, mixed: bool) -> TrainConfig:
    cfg = shrink(demo(), path=folder / "a", num_classes=3, text=TEXT)
    data = replace(cfg.data, batch_size=4, mixture=mixture(folder) if mixed else ())
    cfg = replace(cfg, data=data, num_steps=4, log_every=1, checkpoint_every=2)
    return take_data_fields(replace(cfg, num_threads=1))


def begun(cfg: TrainConfig, out: Path) -> Path:
    """Trained to its end, whose last checkpoint is taken away."""
    Trainer(cfg, out).train()
    shutil.rmtree(checkpoint.latest(out / "checkpoints").path)
    return out


def train(cfg: TrainConfig, out: Path, *flags: str) -> int:
    cfg.save(out.parent / "asked.json")
    return main(["train", "--config", f"{out.parent}/asked.json", "--out", str(out), *flags])


def test_a_mixture_is_trained_by_its_flag(folders: Path, tmp_path: Path) -> None:
    cfg, out = replace(small(folders, mixed=False), num_steps=2), tmp_path / "run"
    cfg = replace(cfg, data=replace(cfg.data, path=tmp_path / "absent"))
    assert train(cfg, out, "--data.mixture", *mixture(folders)) == 0
    assert TrainConfig.load(out / "config.json").num_classes == 4
    state = checkpoint.latest(out / "checkpoints").state()
    assert state["loader"]["samples"] == 2 * cfg.data.batch_size
    assert "mixed by" in state["loader"]["order"]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_run_goes_on_exactly_with_data_that_were_moved(
    folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, mixed: bool
) -> None:
    cfg, whole = small(folders, mixed=mixed), tmp_path / "whole"
    Trainer(cfg, whole).train()
    out, place = begun(cfg, tmp_path / "run"), tmp_path / "moved"
    shutil.copytree(folders, place)
    flags = ("--data.mixture", *mixture(place)) if mixed else ("--data.path", f"{place}/a")
    caplog.set_level(logging.INFO)
    assert train(cfg, out, "--resume", *flags, "--data.num-threads", "2") == 0
    assert_same_run(out, whole)
    [told] = [r.getMessage() for r in caplog.records if "change nothing" in r.getMessage()]
    assert "data.num_threads: " in told and f"{place}/a" in told
    data = TrainConfig.load(out / "config.json").data
    assert data.num_threads == 2 and (data.mixture[0] if mixed else str(data.path)).startswith(
        str(place)
    )


@pytest.mark.parametrize("mixed", [False, True])
def test_other_data_under_the_new_path_are_refused(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mixed: bool
) -> None:
    cfg = small(folders, mixed=mixed)
    out, place = begun(cfg, tmp_path / "run"), tmp_path / "moved"
    before = (out / "config.json").read_bytes()
    shutil.copytree(folders, place)
    shutil.rmtree(place / "a")
    packed(place / "a", 13, ("cat", "dog", "owl"))
    flags = ("--data.mixture", *mixture(place)) if mixed else ("--data.path", f"{place}/a")
    assert train(cfg, out, "--resume", *flags) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "loader state of another run: dataset: expected" in said
    assert (out / "config.json").read_bytes() == before


def test_another_weight_is_another_run(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = small(folders, mixed=True)
    out = begun(cfg, tmp_path / "run")
    other = (f"{folders}/a:train:0.6", f"{folders}/b:train:0.4")
    assert train(cfg, out, "--resume", "--data.mixture", *other) == 2
    assert "data.mixture: " in capsys.readouterr().err


def test_a_damaged_order_is_still_told() -> None:
    for order in (1, "1, mixed by 2"):
        parse_json(json.dumps({"loader": {"order": order}}).encode(), STATE_SHAPE, "state")
    with pytest.raises(ValueError, match="order: expected an integer or a string, got None"):
        parse_json(b'{"loader": {"order": null}}', STATE_SHAPE, "state")


# ---- Other free fields ---------------------------------------------------------------------------


def rows(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "resumes.jsonl").read_text().splitlines()]


def test_a_resume_takes_the_config_of_its_run(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Fields that change nothing leave the run the same to the bit."""
    cfg = small_run(dataset, num_steps=4, log_every=1, checkpoint_every=2)
    Trainer(cfg, tmp_path / "whole").train()
    out = begun(cfg, tmp_path / "run")
    caplog.set_level(logging.INFO)
    flags = ("--checkpoint-every", "3", "--telemetry.hz", "2")
    assert main(["train", "--resume", str(out), *flags]) == 0
    assert_same_run(tmp_path / "whole", out)
    assert [c.step for c in checkpoint.checkpoints(out / "checkpoints")] == [3, 4]
    assert "change nothing of the run (run != now): telemetry.hz: 1.0 != 2.0" in caplog.text
    assert "checkpoint_every: 2 != 3" in caplog.text and "may differ" not in caplog.text
    changed = ["telemetry.hz: 1.0 != 2.0", "checkpoint_every: 2 != 3"]
    [row] = rows(out)
    assert row["step"] == 2 and not row["may_differ"]
    assert sorted(row["changed"]) == sorted(changed)  # type: ignore[call-overload]
    telemetry = replace(cfg.telemetry, hz=2.0)
    now = replace(cfg, checkpoint_every=3, telemetry=telemetry)
    assert TrainConfig.load(out / "config.json") == now
    assert main(["train", "--resume", str(out)]) == 0  # nothing changed: no row
    assert len(rows(out)) == 1


def test_the_fields_that_may_change_a_run_are_said_and_kept(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = small_run(dataset, num_steps=4, log_every=1, checkpoint_every=2, num_threads=1)
    out = begun(cfg, tmp_path / "run")
    flags = ("--log-every", "2", "--num-threads", "2")
    assert main(["train", "--resume", str(out), *flags]) == 0
    assert [row["step"] for row in read_jsonl(out / "metrics.jsonl")] == [1, 2, 4]
    [line] = [r.getMessage() for r in caplog.records if "may differ from here" in r.getMessage()]
    [row] = rows(out)
    assert row["may_differ"] == [
        "log_every: 1 != 2: limits, back-off and rollbacks of the guard take effect at other steps",
        "num_threads: 1 != 2: on a CPU sums may differ in their last bits",
    ]
    assert all(said in line for said in row["may_differ"])  # type: ignore[attr-defined]


def test_a_resume_goes_on_as_the_last_one_did(dataset: Path, tmp_path: Path) -> None:
    """In the batch of the last resume, which a second one need not repeat."""
    cfg = small_run(dataset, num_steps=2, log_every=1)
    out = tmp_path / "run"
    Trainer(cfg, out).train()
    assert main(["train", "--resume", str(out), "--data.batch-size", "4", "--num-steps", "3"]) == 0
    assert main(["train", "--resume", str(out), "--num-steps", "4"]) == 0
    assert checkpoint.latest(out / "checkpoints").state()["loader"]["samples"] == 2 * 8 + 2 * 4


def test_checkpoints_that_a_guard_goes_back_to_are_part_of_the_run(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guard = GuardConfig(spikes="rollback")
    out = begun(small_run(dataset, num_steps=2, checkpoint_every=1, guard=guard), tmp_path / "run")
    before = saved_tensors(out)
    assert main(["train", "--resume", str(out), "--checkpoint-every", "2"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "checkpoint_every: 1 != 2 (--checkpoint-every 1 goes on: with --guard.spikes" in said
    assert saved_tensors(out).keys() == before.keys() and not (out / "resumes.jsonl").exists()


@pytest.mark.parametrize("words", [["--resume", "absent"], ["demo", "--out", "absent", "--resume"]])
def test_a_resume_of_no_run_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words]) == 2
    assert "no run in absent" in " ".join(capsys.readouterr().err.split())
