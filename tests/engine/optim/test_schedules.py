"""Schedules, EMA and optimiser against torch's own."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from m3i_fast.config.models.vit import vit_demo
from m3i_fast.config.optim import EmaConfig, OptimConfig
from m3i_fast.engine.optim.ema import update_ema
from m3i_fast.engine.optim.optimizers import build_optimizer, set_schedules
from m3i_fast.engine.optim.schedules import cosine, warmup_cosine
from m3i_fast.models.transformer.vit import ViT
from tests.shared.engine.optimiser_runs import set_gradients


def test_warmup_cosine_equals_torchs_schedulers() -> None:
    num_steps, warmup_steps, peak = 50, 8, 2e-3
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    warmup = LinearLR(optimizer, start_factor=1 / warmup_steps, total_iters=warmup_steps - 1)
    decay = CosineAnnealingLR(optimizer, T_max=num_steps - warmup_steps - 1, eta_min=1e-5)
    schedule = SequentialLR(optimizer, [warmup, decay], milestones=[warmup_steps])
    expected = []
    for _ in range(num_steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    ours = warmup_cosine(peak, num_steps=num_steps, warmup_steps=warmup_steps, final=1e-5)
    np.testing.assert_allclose(ours, expected, rtol=1e-9)


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_cosine_ends(num_steps: int) -> None:
    values = cosine(0.9, 1.0, num_steps=num_steps)
    assert len(values) == num_steps and values[0] == pytest.approx(0.9)
    if num_steps > 1:
        assert values[-1] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="warmup_steps"):
        warmup_cosine(1.0, num_steps=num_steps, warmup_steps=num_steps + 1)


def test_ema_equals_torchs() -> None:
    torch.manual_seed(0)
    online = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    theirs = AveragedModel(online, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=False)
    theirs.update_parameters(online)  # the first update copies
    ours = copy.deepcopy(online)
    for _ in range(5):
        with torch.no_grad():
            for p in online.parameters():
                p.add_(torch.randn_like(p))
        online(torch.randn(16, 4))
        theirs.update_parameters(online)
        update_ema(ours, online, 0.9)
    for a, b in zip(ours.parameters(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(ours.buffers(), online.buffers(), strict=True):
        assert torch.equal(a, b)


def test_decay_spares_norms_biases_and_tables() -> None:
    model = ViT(vit_demo(depth=1, class_token=True, num_registers=2, layer_scale_init=1e-5))
    optimizer = build_optimizer(OptimConfig(weight_decay=0.1), model)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert sorted(decayed) == [
        "blocks.0.layernorm_mlp.fc1_weight",
        "blocks.0.layernorm_mlp.fc2_weight",
        "blocks.0.layernorm_qkv.weight",
        "blocks.0.proj.weight",
        "patch_embed.weight",
    ]
    assert {"pos_embed", "class_token", "register_tokens", "norm.weight"} <= set(others)
    assert len(decayed) + len(others) == len(names)
    set_schedules(optimizer, lr=3.0, weight_decay=0.25)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0]
    assert all(group["lr"] == 3.0 for group in optimizer.param_groups)


def test_muon_takes_the_matrices_of_blocks_and_follows_the_schedule() -> None:
    torch.manual_seed(0)
    model, twin = (ViT(vit_demo(depth=1)) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    optimizer = build_optimizer(OptimConfig(lr=1e-3, matrices="muon", muon_lr=0.02), model)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    assert sorted(found[2]) == [
        "blocks.0.layernorm_mlp.fc1_weight",
        "blocks.0.layernorm_mlp.fc2_weight",
        "blocks.0.layernorm_qkv.weight",
        "blocks.0.proj.weight",
    ]
    assert sorted(sum(found, [])) == sorted(names.values())
    set_schedules(optimizer, lr=5e-4, weight_decay=0.25)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-4, 5e-4, 0.01])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0, 0.25]

    matrices = [dict(twin.named_parameters())[name] for name in found[2]]
    alone = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.25)
    for vit in (model, twin):  # of full rank: of less, bf16 gives noise in the other directions
        set_gradients(vit, 0)
    optimizer.step()
    alone.step()
    for name, parameter in zip(found[2], matrices, strict=True):  # torch's multiplies in bf16
        got = dict(model.named_parameters())[name]
        torch.testing.assert_close(got, parameter, rtol=0.0, atol=2e-4)
    assert {len(state) for state in optimizer.state.values()} == {1, 3}  # momentum; AdamW's three


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: OptimConfig(lr=0.0), "optim.lr"),
        (lambda: OptimConfig(muon_lr=0.0), "optim.muon_lr"),
        (lambda: OptimConfig(warmup_fraction=1.5), "optim.warmup_fraction"),
        (lambda: OptimConfig(clip_grad_norm=-1.0), "optim.clip_grad_norm"),
        (lambda: EmaConfig(momentum=0.9, final_momentum=0.8), "ema.momentum"),
    ],
)
def test_wrong_values_are_named(make, word: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=word):
        make()
