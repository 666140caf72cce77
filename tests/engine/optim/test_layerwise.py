"""AdamW, LAMB and LARS against timm's and against fp64 loops, with schedules and groups."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm.optim
import torch
from torch import nn

from m3i_fast.config.optim import OptimConfig
from m3i_fast.engine.optim import skippable_step
from m3i_fast.engine.optim.layerwise import Lars
from m3i_fast.engine.optim.optimizers import build_optimizer
from tests.shared.engine import optimiser_runs as runs

CONFIGS = {
    "adamw": OptimConfig(lr=0.01, weight_decay=0.1, layer_decay=0.5),
    "lamb": OptimConfig(name="lamb", lr=0.02, weight_decay=0.1, layer_decay=0.5),
    "lamb_eps": OptimConfig(name="lamb", lr=0.02, eps=0.01, final_weight_decay=0.3),
    "lars": OptimConfig(name="lars", lr=4.0, weight_decay=0.1, layer_decay=0.5, final_lr=1.0),
}
RULES = {"adamw": runs.adamw, "lamb": runs.lamb, "lars": runs.lars}


@pytest.mark.parametrize("case", CONFIGS)
def test_steps_are_those_of_an_fp64_loop(case: str) -> None:
    cfg, model, start = CONFIGS[case], runs.small_vit(), runs.small_vit()
    runs.run(cfg, model)
    runs.assert_same_change(model, runs.loop(RULES[cfg.name], cfg, start), start)


def test_lars_is_the_papers_where_the_learning_rate_is_constant() -> None:
    cfg = OptimConfig(name="lars", lr=4.0, final_lr=4.0, warmup_fraction=0.0)
    model, start = runs.small_vit(), runs.small_vit()
    for vit in (model, start):  # of a norm of 0 the paper says nothing: such a tensor stays 0 there
        nn.init.normal_(vit.blocks[0].proj.weight, generator=torch.Generator().manual_seed(1))
    runs.run(cfg, model)
    expected = runs.loop(runs.lars_of_the_paper, cfg, start)
    del expected["blocks.1.proj.weight"]  # nor of a gradient of 0, which this one has once
    runs.assert_same_change(model, expected, start)


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_steps_are_timms(name: str) -> None:
    cfg, model, twin, start = CONFIGS[name], *(runs.small_vit() for _ in range(3))
    for vit in (model, twin):
        vit.norm.bias.requires_grad_(False)  # timm counts the steps of a group, not of a parameter
    runs.run(cfg, model)
    # timm's optimiser in the place of ours, in the very groups that ours has.
    optimizer = build_optimizer(cfg, twin)
    (ours,) = optimizer.optimizers
    groups = [{k: v for k, v in g.items() if k != "betas"} for g in ours.param_groups]
    if name == "lamb":
        theirs: torch.optim.Optimizer = timm.optim.Lamb(groups, betas=cfg.betas, max_grad_norm=None)
    else:
        theirs = timm.optim.Lars(groups, momentum=cfg.betas[0])
    optimizer.optimizers, optimizer.param_groups = (theirs,), theirs.param_groups
    runs.run(cfg, twin, optimizer)
    runs.assert_same_change(
        model, {n: p for n, p in twin.named_parameters() if p.requires_grad}, start
    )


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_what_does_not_decay_is_not_adapted(name: str) -> None:
    """Ten times the weight changes a scaled step, and that of a bias or a table not at all."""
    cfg = replace(CONFIGS[name], layer_decay=1.0)
    changes = []
    for factor in (1.0, 10.0):
        model = runs.small_vit()
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(factor)
        runs.run(cfg, model, steps=range(3, 4))
        changes.append({n: (factor - p.detach()).abs().mean() for n, p in model.named_parameters()})
    one, ten = changes
    for other in ("blocks.0.proj.bias", "norm.weight", "pos_embed", "class_token"):
        torch.testing.assert_close(ten[other], one[other], rtol=1e-4, atol=0.0)
    for matrix in ("blocks.0.proj.weight", "patch_embed.weight"):
        assert float(ten[matrix]) > 3 * float(one[matrix])


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_steps_in_parts_are_those_of_all_at_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, model, twin = CONFIGS[name], runs.small_vit(), runs.small_vit()
    runs.run(cfg, model)
    matrices = [p for p in twin.parameters() if p.ndim > 1]
    monkeypatch.setattr(skippable_step, "_MAX_ELEMENTS_CPU", 1024)
    chunks = list(skippable_step.split_by_size(matrices))
    assert 1 < len(chunks) < len(matrices)
    assert [id(p) for chunk in chunks for p in chunk] == [id(p) for p in matrices]
    assert all(len(chunk) == 1 or sum(p.numel() for p in chunk) <= 1024 for chunk in chunks)
    runs.run(cfg, twin)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_a_closure_is_refused() -> None:
    optimizer = Lars([nn.Parameter(torch.ones(2, 2))], lr=1.0)
    with pytest.raises(AssertionError, match="closure: expected none"):
        optimizer.step(lambda: 0.0)  # type: ignore[arg-type]
