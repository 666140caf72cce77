"""Planted collapses are told from learning: flagged within 200 steps, a healthy run is not."""

import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import m3i_fast
from m3i_fast.cli import main
from m3i_fast.config import TrainConfig
from m3i_fast.config.objective.losses import LOSSES, Loss, no_products
from m3i_fast.config.optim import EmaConfig
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.engine.run.data_fields import take_data_fields
from m3i_fast.engine.trainer import Trainer
from m3i_fast.models.encoder import ImageEncoder
from m3i_fast.objectives.losses.similarity import negative_cosine_similarity
from m3i_fast.objectives.methods import METHODS
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.objectives.targets import normalise_tokens
from m3i_fast.objectives.terms import Dense
from m3i_fast.observe import collapse
from m3i_fast.observe.collapse import CollapseError, HealthyRange
from m3i_fast.observe.metrics import read_jsonl
from m3i_fast.recipes import recipes, shrink
from tests.shared.engine.small_run import TEXT
from tests.shared.pipelines.with_regions import with_regions

NUM_STEPS = 200


def _config(dataset: Path, recipe: str = "demo") -> TrainConfig:
    cfg = shrink(recipes()[recipe](), path=dataset, num_classes=9, text=TEXT)
    mixing = replace(cfg.objective.mixing, dense_fraction=1.0)  # of 1 image there is no spread
    return replace(
        cfg,
        data=replace(cfg.data, batch_size=8),
        objective=replace(cfg.objective, mixing=mixing),
        num_steps=NUM_STEPS,
        log_every=5,
        checkpoint_every=50,
        device="cpu",
    )


def _dense_alone(cfg: TrainConfig) -> TrainConfig:
    """Without what holds the encoder apart: labels, captions, decorrelation, standardising."""
    terms = tuple(
        replace(t, regulariser="stop_gradient", standardise="none")
        if t.is_dense
        else replace(t, weight=0.0)
        for t in cfg.objective.terms
    )
    return replace(cfg, objective=replace(cfg.objective, terms=terms))


def _let_targets_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target is the encoder itself, with its gradient: a constant predicts itself best."""

    def online(self: MutualInformation) -> dict[str, torch.nn.Module]:
        return {"momentum": WithGradient(self.encoder)}

    def squared_error(z_hat: Tensor, z: Tensor) -> Tensor:
        return (z_hat - normalise_tokens(z)).square().mean()

    monkeypatch.setattr(MutualInformation, "_target_encoders", online)
    for owner, name in ((MutualInformation, "encode_targets"), (Dense, "_target")):
        monkeypatch.setattr(owner, name, getattr(owner, name).__wrapped__)
    key = "features", "gaussian", "stop_gradient"
    monkeypatch.setitem(LOSSES, key, replace(LOSSES[key], build=lambda *_: squared_error))


class WithGradient(torch.nn.Module):
    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.encode_cells(images)


class Dead(WithGradient):
    """One token, whatever it is shown."""

    def forward(self, images: Tensor) -> Tensor:
        tokens = super().forward(images)
        return tokens[:1, :1].expand_as(tokens).contiguous()


@pytest.mark.parametrize(("recipe", "num_steps"), [("demo", 100), ("demo_internimage", 40)])
def test_a_healthy_run_is_not_flagged(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, recipe: str, num_steps: int
) -> None:
    cfg = replace(_config(dataset, recipe), num_steps=num_steps)
    assert Trainer(cfg, tmp_path / "run", stop_on_collapse=True).train().step == num_steps
    assert "collapse" not in caplog.text
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["loss/total"] < rows[0]["loss/total"]


def test_targets_that_follow_with_gradient_are_flagged(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _let_targets_follow(monkeypatch)
    trainer = Trainer(_dense_alone(_config(dataset)), tmp_path / "run", stop_on_collapse=True)
    with pytest.raises(CollapseError, match=r"step \d+: monitor/.*ema\.momentum"):
        trainer.train()
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["loss/total"] < 0.05 * rows[0]["loss/total"]  # it looks like learning


def test_siamese_networks_without_stop_gradient_are_flagged(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SimSiam, arXiv 2011.10566, section 4.1: all images get one embedding."""
    key = "embedding", "gaussian", "none"
    row = Loss(
        formula="-cos(z_hat, z)",
        build=lambda *_: negative_cosine_similarity,
        flops=no_products,
        independent=True,
    )
    monkeypatch.setitem(LOSSES, key, row)
    cfg = _config(dataset, "demo_simsiam")
    terms = tuple(
        replace(t, regulariser="none", predictor="projector", output_norm=False)
        for t in cfg.objective.terms
    )
    cfg = replace(cfg, objective=replace(cfg.objective, terms=terms))
    with pytest.raises(CollapseError, match=r"monitor/(embedding_|target_)"):
        Trainer(cfg, tmp_path / "run", stop_on_collapse=True).train()


def test_prototypes_without_an_average_are_flagged(dataset: Path, tmp_path: Path) -> None:
    """DINO, arXiv 2104.14294, section 5.2: with the student itself as the teacher it fails."""
    cfg = _config(dataset, "demo_dino")
    cfg = replace(cfg, ema=EmaConfig(momentum=0.0, final_momentum=0.0))
    with pytest.raises(CollapseError, match=r"monitor/prototypes_(use|doubt)"):
        Trainer(cfg, tmp_path / "run", stop_on_collapse=True).train()


def when(method: str) -> list[pytest.MarkDecorator]:
    """By night all but one for each guard against a collapse."""
    by_day = method in ("supervised", "simsiam", "vicreg", "dinov2", "lejepa", "m3i")
    return [pytest.mark.matrix, *([] if by_day else [pytest.mark.nightly])]


@pytest.mark.parametrize("method", [pytest.param(name, marks=when(name)) for name in METHODS])
def test_no_method_is_flagged_when_healthy(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    cfg = _config(dataset, f"demo_{method}")
    if cfg.objective.uses(encoder="frozen"):
        taught = replace(_config(dataset, "demo_supervised"), num_steps=20)
        Trainer(taught, tmp_path / "teacher").train()
        cfg = replace(cfg, objective=replace(cfg.objective, teacher=str(tmp_path / "teacher")))
    if cfg.columns:
        data = replace(cfg.data, path=with_regions(dataset, tmp_path / "data"))
        cfg = take_data_fields(replace(cfg, data=data))
    assert Trainer(cfg, tmp_path / "run", stop_on_collapse=True).train().step == NUM_STEPS
    assert "collapse" not in caplog.text


def test_targets_of_a_dead_encoder_are_flagged(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        MutualInformation,
        "_target_encoders",
        lambda self: {"momentum": Dead(self.target_encoder.encoder)},
    )
    with pytest.raises(CollapseError, match="target_"):
        m3i_fast.train(_config(dataset), tmp_path / "run", stop_on_collapse=True)
    row = read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]
    assert row["step"] <= 30
    assert row["monitor/target_std"] < 1e-3 and row["monitor/target_kmeans_entropy"] == 0
    assert row["monitor/target_uniformity"] == pytest.approx(0, abs=1e-5)
    assert row["monitor/target_rank"] == pytest.approx(1, abs=1e-2)


def test_an_average_of_momentum_0_does_not_collapse_by_itself(
    dataset: Path, tmp_path: Path
) -> None:
    """The stop-gradient is enough here, without labels and decorrelation: no range is left."""
    cfg = replace(_dense_alone(_config(dataset)), num_steps=60)
    cfg = replace(cfg, ema=EmaConfig(momentum=0.0, final_momentum=0.0))
    assert Trainer(cfg, tmp_path / "run", stop_on_collapse=True).train().step == 60
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]["monitor/target_rank"] > 5


def test_a_hint_is_said_once_and_ends_no_run(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(collapse, "HINT_STEPS", 0)
    high = HealthyRange(pattern="monitor/*_constant", low=2.0, cause="c", remedy="r", is_hint=True)
    monkeypatch.setattr(collapse, "HEALTHY_RANGES", (high,))
    cfg = replace(_config(dataset), num_steps=14, log_every=1)
    assert Trainer(cfg, tmp_path / "run", stop_on_collapse=True).train().step == 14
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("hint: ")]
    assert len(said) == 2 and all("_constant = " in text for text in said)
    assert "collapse" not in caplog.text


def _saturate(self: MutualInformation) -> None:
    """In place of the clamp: temperatures of nearly zero, whatever the gradients say."""
    with torch.no_grad():
        for term in self._labels():
            term.log_scale.fill_(math.log(1e5))


def test_a_saturated_softmax_is_a_warning_and_the_command_can_stop_at_it(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(MutualInformation, "finish_step", _saturate)
    cfg = replace(_config(dataset), num_steps=30)
    with caplog.at_level(logging.WARNING):
        assert Trainer(cfg, tmp_path / "warned").train().step == 30
    warnings = [r.getMessage() for r in caplog.records if "collapse?" in r.getMessage()]
    assert len(warnings) == 2  # one a temperature, and not one a logged step
    assert all("1e+05" in w and "objective.temperature" in w for w in warnings)
    cfg.save(tmp_path / "config.json")
    request = ["train", "--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "run")]
    assert main([*request, "--stop-on-collapse"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "--stop-on-collapse: step 15: monitor/category_log_scale" in said
    assert [c.step for c in checkpoint.checkpoints(tmp_path / "run" / "checkpoints")] == [15]
    assert TrainConfig.load(tmp_path / "run" / "config.json") == cfg
