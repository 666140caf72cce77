"""Transformer Engine's body: what it says where it is missing, and on a GPU against torch's body.

That it is called as it wants to be is tested by `make te-contract`, without a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.models.transformer import te_layers
from m3i_fast.models.transformer.blocks import TORCH_LAYERS, BlockLayers
from m3i_fast.models.transformer.layers import LayerNormMLP
from m3i_fast.models.transformer.te_layers import Fp8Recipe
from m3i_fast.models.transformer.text_encoder import TextEncoder
from m3i_fast.models.transformer.vit import ViT

# Widths that FP8 takes, a batch that makes any number of tokens a multiple of 128.
VIT = ViTConfig(image_size=64, patch_size=16, dim=256, depth=3, num_heads=4, class_token=True)
TEXT = TextConfig(vocab_size=90, context_length=13, dim=256, depth=2, num_heads=4, embed_dim=64)
BATCH = 128


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="it is installed"
)
def test_a_missing_library_is_named_with_what_installs_it() -> None:
    for call in (te_layers.te_layers, lambda: te_layers.te_autocast(None)):
        with pytest.raises(ValueError, match=r'got ModuleNotFoundError.*"m3i-fast\[te\]"'):
            call()


def test_the_two_gelus_differ_by_less_than_bf16_rounds() -> None:
    x = torch.linspace(-9, 9, 100_001, dtype=torch.float64, requires_grad=True)
    exact, tanh = F.gelu(x), F.gelu(x, approximate="tanh")
    slopes = [torch.autograd.grad(y.sum(), x)[0] for y in (exact, tanh)]
    value, slope = (exact - tanh).abs().max(), (slopes[0] - slopes[1]).abs().max()
    assert 4.7e-4 < value < 4.8e-4
    assert 8.6e-4 < slope < 8.7e-4
    eighth, quarter = (torch.tensor(v).nextafter(torch.tensor(1.0)) for v in (0.125, 0.25))
    assert value < torch.finfo(torch.bfloat16).eps * eighth / 2
    assert slope < torch.finfo(torch.bfloat16).eps * quarter / 2


def test_the_gelu_moves_an_mlp_by_no_more_than_its_weights_let_it() -> None:
    mlp, x = LayerNormMLP(32, 128).double(), torch.randn(50, 32, dtype=torch.float64)
    nn.init.normal_(mlp.fc1_weight)
    normed = F.layer_norm(x, (32,), mlp.layer_norm_weight, mlp.layer_norm_bias, 1e-6)
    hidden = F.gelu(F.linear(normed, mlp.fc1_weight, mlp.fc1_bias), approximate="tanh")
    difference = mlp(x) - F.linear(hidden, mlp.fc2_weight, mlp.fc2_bias)
    bound = 4.8e-4 * mlp.fc2_weight.abs().sum(1)
    assert difference.any() and (difference.abs() <= bound).all()


# ---- On a GPU ------------------------------------------------------------------------------------


@pytest.fixture
def te() -> BlockLayers:
    pytest.importorskip("transformer_engine.pytorch")
    return te_layers.te_layers()


def vit_inputs() -> tuple[Tensor, ...]:
    return (torch.randn(BATCH, 3, 64, 64, device="cuda"),)


def text_inputs() -> tuple[Tensor, ...]:
    ids = torch.randint(0, 90, (BATCH, 13), device="cuda")
    return ids, torch.arange(BATCH, device="cuda") % 14  # from none to all of the tokens


MODELS: dict[str, tuple[Callable[..., nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "vit": (lambda layers: ViT(VIT, layers=layers), vit_inputs),
    "rotary": (lambda layers: ViT(replace(VIT, position="rotary"), layers=layers), vit_inputs),
    "text": (lambda layers: TextEncoder(TEXT, layers=layers), text_inputs),
}


def twins(name: str, te: BlockLayers) -> tuple[nn.Module, nn.Module, tuple[Tensor, ...]]:
    """The same weights, moved off their start, in torch's body and in Transformer Engine's."""
    build, inputs = MODELS[name]
    ours, theirs = build(TORCH_LAYERS), build(te)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.03)
    theirs.load_state_dict(ours.state_dict())
    return ours.cuda(), theirs.cuda(), inputs()


def run(
    model: nn.Module, inputs: tuple[Tensor, ...], *, bf16: bool, recipe: Any | None = None
) -> dict[str, Tensor]:
    """Output and gradients of all parameters."""
    model.zero_grad()
    te = nullcontext() if recipe is None else te_layers.te_autocast(recipe)
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16), te:
        output = model(*inputs)
    output.float().square().mean().backward()
    grads = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach().double(), **grads}


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == truth.keys()
    return {n: float((found[n] - v).norm() / v.norm().clamp(min=1e-12)) for n, v in truth.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_in_bf16_it_is_as_near_the_truth_as_torchs_body(name: str, te: BlockLayers) -> None:
    ours, theirs, inputs = twins(name, te)
    truth = run(ours.double(), tuple(x.double() if x.is_floating_point() else x for x in inputs),
                bf16=False)  # fmt: skip
    ours.float()
    torchs = errors(run(ours, inputs, bf16=True), truth)
    te_errors = errors(run(theirs, inputs, bf16=True), truth)
    for part, error in te_errors.items():
        assert error <= 2 * torchs[part] + 2e-3, (part, error, torchs[part])


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [None, "fp8_current", "fp8_delayed"])
def test_computing_blocks_again_changes_no_gradient(fp8: Fp8Recipe | None, te: BlockLayers) -> None:
    recipe, found = _usable(fp8), []
    inputs = vit_inputs()
    for way in ("none", "full"):
        torch.manual_seed(1)
        cfg = replace(VIT, activation_checkpointing=way, drop_path_rate=0.3)
        model = ViT(cfg, layers=te).cuda()
        torch.manual_seed(2)
        found.append(run(model, inputs, bf16=True, recipe=recipe))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-6, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", ["fp8_current", "fp8_delayed", "fp8_block", "mxfp8"])
def test_200_steps_in_fp8_end_within_the_spread_of_bf16(fp8: Fp8Recipe, te: BlockLayers) -> None:
    recipe = _usable(fp8)
    low = [losses(te, None, seed) for seed in range(4)]
    got = losses(te, recipe, 0)
    assert not torch.equal(got, low[0])  # or nothing was in FP8
    windows, window = (x.unfold(-1, 20, 20).mean(-1) for x in (torch.stack(low), got))
    assert windows[:, -1].max() < 0.5 * windows[:, 0].min(), "nothing was learnt"
    least, most = windows.aminmax(dim=0)
    margin = most - least + 0.05
    assert ((least - margin < window) & (window < most + margin)).all(), (window, windows)


def _usable(fp8: Fp8Recipe | None) -> Any | None:
    """The recipe, or a skip with Transformer Engine's reason."""
    if fp8 is None:
        return None
    reason = te_layers.te_unavailable(fp8)
    if reason is not None:
        pytest.skip(reason)
    return te_layers.te_recipe(fp8)


def losses(layers: BlockLayers, recipe: Any | None, seed: int) -> Tensor:
    """200 losses of a ViT that learns to tell 16 faint pictures from each other."""
    torch.manual_seed(seed)
    model, head = ViT(VIT, layers=layers).cuda(), nn.Linear(VIT.dim, 16).cuda()
    optimizer = torch.optim.AdamW(chain(model.parameters(), head.parameters()), lr=3e-4)
    draw = torch.Generator("cuda").manual_seed(7)
    pictures = 0.2 * torch.randn(16, 3, 64, 64, device="cuda", generator=draw)
    found = []
    for _ in range(200):
        label = torch.randint(0, 16, (BATCH,), device="cuda", generator=draw)
        images = torch.randn(BATCH, 3, 64, 64, device="cuda", generator=draw) + pictures[label]
        te = nullcontext() if recipe is None else te_layers.te_autocast(recipe)
        with torch.autocast("cuda", torch.bfloat16):
            with te:
                tokens = model(images)
            loss = F.cross_entropy(head(tokens[:, 0]).float(), label)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found).cpu()
