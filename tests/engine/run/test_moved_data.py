"""Runs on mixtures and on data that were moved: they train, and go on exactly."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from m3i_fast.cli import main
from m3i_fast.config import TrainConfig
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.engine.checkpoint.layout import STATE_SHAPE
from m3i_fast.engine.run.data_fields import take_data_fields
from m3i_fast.engine.trainer import Trainer
from m3i_fast.json_files import parse_json
from m3i_fast.pipelines.dataset.pack import write_dataset
from m3i_fast.recipes import demo, shrink
from tests.shared.engine.small_run import TEXT, assert_same_run
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
