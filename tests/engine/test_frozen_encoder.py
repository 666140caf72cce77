"""Heads that train on an image encoder which stays as it began (LiT, arXiv 2111.07991)."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from m3i_fast.config import TrainConfig
from m3i_fast.config.models.vit import dinov3_s_plus
from m3i_fast.engine import build
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.engine.trainer import Trainer
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.observe.metrics import read_jsonl
from tests.shared.engine.small_run import assert_same_run, small_run

NAME = "vit_small_plus_patch16_dinov3_qkvb"
VISION = dinov3_s_plus(image_size=32, patch_size=8, dim=32, depth=2, num_heads=2)
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture
def cfg(dataset: Path, tmp_path: Path) -> TrainConfig:
    """The demo from a file of DINOv3's network; an average that would soon have moved away."""
    torch.manual_seed(1)
    file = tmp_path / "dinov3.safetensors"
    save_file(timm.create_model(NAME, **SIZES, num_classes=0).state_dict(), file)
    cfg = small_run(dataset, vision=VISION, num_steps=20, checkpoint_every=15)
    return replace(
        cfg,
        init=f"timm:{file}",
        optim=replace(cfg.optim, freeze_encoder=True),
        ema=replace(cfg.ema, momentum=0.9),
    )


def test_heads_learn_on_an_encoder_that_stays_also_after_a_resume(
    cfg: TrainConfig, tmp_path: Path
) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    trainer = Trainer(cfg, whole)
    objective = trainer.objective
    start = {name: value.clone() for name, value in objective.state_dict().items()}
    trainer.train()
    rows = read_jsonl(whole / "metrics.jsonl")
    assert rows[-1]["loss/total"] < rows[0]["loss/total"]
    assert rows[0]["optim/grad_norm"] > 0
    assert not [name for name in rows[0] if name.startswith("gradient")]  # by the encoder: none

    newest = checkpoint.latest(whole / "checkpoints")
    end = newest.shards("model").read()
    parameters = dict(objective.named_parameters())
    still = {name for name in parameters if torch.equal(start[name], end[name])}
    encoders = {name for name in parameters if name.startswith(("encoder.", "target_encoder."))}
    assert still == encoders and len(encoders) == 2 * len(list(objective.encoder.parameters()))
    moments = {key.rpartition("/")[0] for key in newest.shards("optimizer").sizes}
    assert moments == parameters.keys() - encoders

    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "step_00000020")
    Trainer(cfg, again, resume=True).train()
    assert_same_run(whole, again)


def test_a_frozen_encoder_asks_for_something_else_to_train(
    cfg: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Untrained(MutualInformation):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.terms.requires_grad_(False)
            self.decoders.requires_grad_(False)

    monkeypatch.setattr(build, "MutualInformation", Untrained)
    with pytest.raises(ValueError, match=r"optim\.freeze_encoder: expected a term .*--optim\.no-"):
        build.build_objective(cfg)


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("optim", {"layer_decay": 0.9}, "optim.layer_decay: expected 1 with .*, got 0.9"),
        ("optim", {"dcn_lr_scale": 0.1}, "optim.dcn_lr_scale: expected 1 with .*, got 0.1"),
        ("optim", {"freeze_patch_embed": True}, "freeze_patch_embed: expected False with"),
        ("vision", {"drop_path_rate": 0.1}, "vision.drop_path_rate: expected 0 with .*, got 0.1"),
        ("balance", {"mode": "gradient_norm"}, "objective.balance.mode: expected fixed or unc"),
    ],
)
def test_what_has_nothing_to_act_on_is_refused(
    part: str, changes: dict[str, Any], said: str, cfg: TrainConfig
) -> None:
    with pytest.raises(ValueError, match=said):
        if part == "balance":
            balance = replace(cfg.objective.balance, **changes)
            replace(cfg, objective=replace(cfg.objective, balance=balance))
        else:
            replace(cfg, **{part: replace(getattr(cfg, part), **changes)})
