"""Learning rates by layer and by part, against timm's and the official InternImage code's."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vit import vit_demo
from m3i_fast.config.objective.objective import ObjectiveConfig
from m3i_fast.config.optim import OptimConfig
from m3i_fast.engine.optim.ema import update_ema
from m3i_fast.engine.optim.optimizers import Optimizers, build_optimizer, set_schedules
from m3i_fast.engine.optim.param_groups import freeze_patch_embed
from m3i_fast.models.internimage.model import InternImage
from m3i_fast.models.transformer.vit import ViT
from m3i_fast.objectives.methods import METHODS
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.objectives.targets import MomentumEncoder
from tests.shared.official_internimage import TINY_H

# Our name of a ViT's part, and timm's.
VIT_NAMES = {
    "patch_embed.weight": "patch_embed.proj.weight",
    "pos_embed": "pos_embed",
    "class_token": "cls_token",
    "register_tokens": "reg_token",
    "norm.weight": "norm.weight",
    "blocks.{}.layernorm_qkv.layer_norm_weight": "blocks.{}.norm1.weight",
    "blocks.{}.layernorm_qkv.weight": "blocks.{}.attn.qkv.weight",
    "blocks.{}.proj.bias": "blocks.{}.attn.proj.bias",
    "blocks.{}.layernorm_mlp.fc2_weight": "blocks.{}.mlp.fc2.weight",
}


def lr_scales(optimizer: Optimizers, model: nn.Module) -> dict[str, float]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}


def test_layer_decay_is_timms() -> None:
    depth = 5
    theirs = timm.create_model("vit_tiny_patch16_224", depth=depth, reg_tokens=2, num_classes=3)
    names = {id(p): name for name, p in theirs.named_parameters()}
    groups = param_groups_layer_decay(theirs, layer_decay=0.7)
    expected = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    vit = ViT(vit_demo(depth=depth, class_token=True, num_registers=2))
    ours = nn.ModuleDict({"encoder": vit, "head": nn.Linear(2, 2)})
    optimizer = build_optimizer(OptimConfig(layer_decay=0.7), ours)
    found = lr_scales(optimizer, ours)
    for our_name, their_name in VIT_NAMES.items():
        for block in range(depth):
            got = found["encoder." + our_name.format(block)]
            assert got == pytest.approx(expected[their_name.format(block)]), our_name
    assert found["head.weight"] == expected["head.weight"] == 1.0
    # Of stem, blocks and heads what decays and what does not: no group a parameter.
    assert len(optimizer.param_groups) == 2 * (depth + 2)


def test_the_mask_token_learns_as_the_positions_do() -> None:
    cfg = METHODS["ibot"]
    objective = ObjectiveConfig(terms=cfg.terms, mixing=cfg.mixing)
    model = MutualInformation(
        objective, vision=vit_demo(depth=2), text=TextConfig(depth=1), num_classes=2
    )
    found = lr_scales(build_optimizer(OptimConfig(layer_decay=0.7), model), model)
    assert found["mask_token"] == found["encoder.pos_embed"] == pytest.approx(0.7**3)


def official_ratio(name: str, decay: float) -> float:
    """What `lr_decay_keywards` of the official InternImage gives: the first key inside the name.

    Blocks from the last one down; the stem as the first block, a stage's norm and downsampling as
    the next stage's first block, all else 1. Its keys overlook `post_norms`; here they go with
    the norm of their stage.
    """
    depths = TINY_H.depths
    blocks = [(level, block) for level in range(4) for block in range(depths[level])]
    ratios = {
        f"levels.{level}.blocks.{block}.": decay**power
        for power, (level, block) in enumerate(reversed(blocks))
    }
    ratios["patch_embed"] = ratios["levels.0.blocks.0."]
    for level in range(3):
        for part in ("downsample", "norm", "post_norms"):
            ratios[f"levels.{level}.{part}"] = ratios[f"levels.{level + 1}.blocks.0."]
    return next((ratio for key, ratio in ratios.items() if key in name), 1.0)


@pytest.mark.parametrize("dcn_lr_scale", [1.0, 0.1])
def test_internimages_rates_are_the_official_codes(dcn_lr_scale: float) -> None:
    model = InternImage(TINY_H)
    cfg = OptimConfig(layer_decay=0.8, dcn_lr_scale=dcn_lr_scale)
    found = lr_scales(build_optimizer(cfg, model), model)
    steered = 0
    for name, got in found.items():
        # The official code has no key for the masks' projection, which here belongs to the others.
        steers = any(part in name for part in (".offset.", ".mask.", "center_feature_scale_proj"))
        steered += steers
        expected = official_ratio(name, 0.8) * (dcn_lr_scale if steers else 1.0)
        assert got == pytest.approx(expected), name
    assert steered == 6 * sum(TINY_H.depths)
    assert len(found) == len(list(model.parameters()))


def test_dcn_scale_alone_makes_two_groups_more() -> None:
    model = InternImage(TINY_H)
    plain = build_optimizer(OptimConfig(), model)
    assert [g["lr_scale"] for g in plain.param_groups] == [1.0, 1.0]
    scaled = build_optimizer(OptimConfig(dcn_lr_scale=0.1), model)
    assert [g["lr_scale"] for g in scaled.param_groups] == [1.0, 0.1, 1.0, 0.1]
    assert [g["decays"] for g in scaled.param_groups] == [True, True, False, False]
    assert [g["lr"] for g in scaled.param_groups] == pytest.approx([1e-3, 1e-4, 1e-3, 1e-4])


def test_muons_matrices_have_the_rates_of_their_layers() -> None:
    model = ViT(vit_demo(depth=2))
    cfg = OptimConfig(matrices="muon", muon_lr=0.02, lr=1e-3, layer_decay=0.5)
    optimizer = build_optimizer(cfg, model)
    adamw, muon = optimizer.optimizers
    assert [g["lr"] for g in muon.param_groups] == pytest.approx([0.01, 0.005])
    set_schedules(optimizer, lr=5e-4, weight_decay=0.3)
    assert [g["lr"] for g in muon.param_groups] == pytest.approx([0.005, 0.0025])
    assert all(g["weight_decay"] == 0.3 for g in muon.param_groups)
    names = {id(p): name for name, p in model.named_parameters()}
    first = [names[id(p)] for p in muon.param_groups[0]["params"]]
    assert len(first) == 4 and all(name.startswith("blocks.1.") for name in first)


@pytest.mark.parametrize("name", ["adamw", "lamb", "lars"])
@pytest.mark.parametrize("make", [lambda: ViT(vit_demo(depth=1)), lambda: InternImage(TINY_H)])
def test_a_frozen_patch_embedding_stays_and_so_does_its_average(  # type: ignore[no-untyped-def]
    name, make
) -> None:
    model = nn.Module()
    model.encoder = make()
    model.target = MomentumEncoder(model.encoder)
    start = copy.deepcopy(model.encoder.state_dict())
    freeze_patch_embed(model)
    optimizer = build_optimizer(OptimConfig(name=name, lr=0.1, layer_decay=0.9), model)
    for step in range(3):
        torch.manual_seed(step)
        model.encoder.encode_cells(torch.randn(2, 3, 64, 64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        update_ema(model.target.encoder, model.encoder, momentum=0.9)
    still = {n for n, v in model.encoder.named_parameters() if torch.equal(v, start[n])}
    average = {n for n, v in model.target.encoder.named_parameters() if torch.equal(v, start[n])}
    frozen = {n for n in start if n.startswith("patch_embed.")}
    assert frozen <= still and frozen <= average
    trained = {n for n, p in model.encoder.named_parameters() if p.requires_grad} - still
    assert trained and trained.isdisjoint(average)


def test_without_an_encoder_nothing_is_frozen() -> None:
    with pytest.raises(ValueError, match=r"optim\.freeze_patch_embed: expected an image encoder"):
        freeze_patch_embed(nn.Linear(2, 2))


def test_a_target_encoder_is_no_encoder_to_freeze_or_scale() -> None:
    target = MomentumEncoder(ViT(vit_demo(depth=1)))
    model = nn.ModuleDict({"target": target, "head": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"optim\.freeze_patch_embed"):
        freeze_patch_embed(model)
    optimizer = build_optimizer(OptimConfig(layer_decay=0.5), model)
    assert [g["lr_scale"] for g in optimizer.param_groups] == [1.0, 1.0]
