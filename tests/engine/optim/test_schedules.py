"""Schedules, EMA and optimiser against torch's own."""

import copy

import numpy as np
import pytest
import torch
from lightly.utils.scheduler import cosine_schedule
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import get_wsd_schedule

from m3i_fast.config.models.vit import vit_demo
from m3i_fast.config.optim import EmaConfig, OptimConfig
from m3i_fast.engine.optim.ema import update_ema
from m3i_fast.engine.optim.optimizers import build_optimizer, set_schedules
from m3i_fast.engine.optim.schedules import (
    lr_schedule,
    momentum_schedule,
    weight_decay_schedule,
)
from m3i_fast.models.transformer.vit import ViT
from tests.shared.engine.optimiser_runs import set_gradients


def test_warmup_and_cosine_equal_torchs_schedulers() -> None:
    num_steps, warmup_steps, peak = 50, 8, 2e-3
    cfg = OptimConfig(lr=peak, final_lr=1e-5, warmup_fraction=warmup_steps / num_steps)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    warmup = LinearLR(optimizer, start_factor=1 / warmup_steps, total_iters=warmup_steps - 1)
    decay = CosineAnnealingLR(optimizer, T_max=num_steps - warmup_steps - 1, eta_min=1e-5)
    schedule = SequentialLR(optimizer, [warmup, decay], milestones=[warmup_steps])
    expected = []
    for _ in range(num_steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(lr_schedule(cfg, num_steps), expected, rtol=1e-9)


@pytest.mark.parametrize("decay", ["cosine", "linear", "sqrt"])
@pytest.mark.parametrize("fraction", [0.0, 0.2, 1.0])
def test_a_constant_part_and_the_fall_equal_transformers(decay: str, fraction: float) -> None:
    """Ours is at its lowest at the last step; theirs has a step more than it counts."""
    num_steps, peak, final = 40, 2e-3, 1e-5
    cfg = OptimConfig(
        lr=peak,
        final_lr=final,
        warmup_fraction=0.0,
        lr_decay=decay,  # type: ignore[arg-type]
        lr_decay_fraction=fraction,
    )
    falling = round(fraction * num_steps)
    is_constant_before = falling < num_steps
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    theirs = get_wsd_schedule(
        optimizer,
        num_warmup_steps=0,
        num_stable_steps=num_steps - falling - is_constant_before if falling else num_steps + 1,
        num_decay_steps=falling - 1 + is_constant_before,
        decay_type={"sqrt": "1-sqrt"}.get(decay, decay),
        min_lr_ratio=final / peak,
    )
    expected = []
    for _ in range(num_steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    ours = lr_schedule(cfg, num_steps)
    np.testing.assert_allclose(ours, expected, rtol=1e-9)
    assert ours[-1] == pytest.approx(final if fraction else peak)


def test_what_is_constant_so_far_is_the_same_in_a_longer_run() -> None:
    """So that one run gives several, each with its own fall."""
    cfg = OptimConfig(warmup_fraction=0.0, lr_decay_fraction=0.1)
    assert np.array_equal(lr_schedule(cfg, 100)[:90], lr_schedule(cfg, 200)[:90])
    for decay in ("cosine", "linear", "sqrt"):  # a fall of one step is at its end
        one = OptimConfig(lr_decay_fraction=0.1, lr_decay=decay)  # type: ignore[arg-type]
        assert lr_schedule(one, 10).tolist() == [1e-3] * 9 + [0]
    everything = OptimConfig(lr_decay_fraction=1 - OptimConfig().warmup_fraction)
    assert np.array_equal(lr_schedule(OptimConfig(), 400), lr_schedule(everything, 400))


@pytest.mark.parametrize("num_steps", [2, 7, 50])
def test_weight_decay_and_momentum_equal_lightlys_schedule(num_steps: int) -> None:
    decay = OptimConfig(weight_decay=0.04, final_weight_decay=0.4)
    ema = EmaConfig(momentum=0.9, final_momentum=1.0)
    for ours, ends in (
        (weight_decay_schedule(decay, num_steps), (0.04, 0.4)),
        (momentum_schedule(ema, num_steps), (0.9, 1.0)),
    ):
        expected = [cosine_schedule(step, num_steps, *ends) for step in range(num_steps)]
        np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_a_run_of_one_step_has_the_first_value() -> None:
    assert momentum_schedule(EmaConfig(momentum=0.9), 1).tolist() == [0.9]


def test_all_fractions_that_add_up_to_one_are_taken() -> None:
    for percent in range(101):
        warm, fall = percent / 100, (100 - percent) / 100
        assert len(lr_schedule(OptimConfig(warmup_fraction=warm, lr_decay_fraction=fall), 50)) == 50


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
        (lambda: OptimConfig(lr_decay_fraction=0.99), "optim.lr_decay_fraction: expected none, or"),
        (lambda: OptimConfig(warmup_fraction=0.9, lr_decay_fraction=0.11), "optim.lr_decay_f"),
        (lambda: OptimConfig(lr_decay_fraction=-0.1), "optim.lr_decay_fraction"),
        (lambda: EmaConfig(momentum=0.9, final_momentum=0.8), "ema.momentum"),
    ],
)
def test_wrong_values_are_named(make, word: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=word):
        make()
