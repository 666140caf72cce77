"""Stochastic depth by subset: the masked form without the work of what it masks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from m3i_fast.config.fields import Recompute
from m3i_fast.config.models.internimage import InternImageConfig, internimage_demo
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.costs.encoder_flops import internimage, internimage_sampling, vit
from m3i_fast.models.internimage.model import InternImage, _stages
from m3i_fast.models.transformer.blocks import TORCH_LAYERS, Block
from m3i_fast.models.transformer.drop_path import DropPath, num_kept
from m3i_fast.models.transformer.vit import ViT
from m3i_fast.ops import reference
from tests.shared.flop_formulas import FORMULAS

CFG = ViTConfig(
    image_size=32, patch_size=8, dim=32, depth=3, num_heads=2, drop_path_rate=0.5,
    drop_path_mode="subset",
)  # fmt: skip


class Drawn(DropPath):
    """Draws as it is told, for either form."""

    def __init__(self, rows: list[Tensor], mode: str) -> None:
        super().__init__(0.4, mode)  # type: ignore[arg-type]
        self.rows = iter(rows)

    def forward(self, branch: Tensor, priority: Tensor | None = None) -> Tensor:
        rows = next(self.rows)
        mask = torch.zeros(len(branch), *(1,) * (branch.ndim - 1), dtype=branch.dtype)
        mask[rows] = len(branch) / len(rows)
        return branch * mask

    def draw(self, x: Tensor, priority: Tensor | None = None) -> Tensor | None:
        return next(self.rows) if self.mode == "subset" else None


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("num_last", [None, 2])
def test_it_equals_the_masked_form_of_the_same_samples(
    scale: float | None, num_last: int | None
) -> None:
    block = Block(32, 2, layer_scale_init=scale).double()
    for parameter in block.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    x = torch.randn(5, 7, 32, dtype=torch.float64, requires_grad=True)
    key_mask = torch.arange(7) < torch.tensor([7, 4, 1, 6, 2])[:, None]
    rows = [torch.tensor([3, 0, 4]), torch.tensor([1, 2, 0])]
    found = []
    for mode in ("mask", "subset"):
        block.drop_path = Drawn(rows, mode)
        y = block(x, key_mask, num_last=num_last)
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        found.append([y, *torch.autograd.grad((y * weight).sum(), [x, *block.parameters()])])
    for masked, subset in zip(*found, strict=True):
        torch.testing.assert_close(subset, masked, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    "norms", [{}, {"layer_scale": 0.3, "post_norm": True}, {"res_post_norm": True}]
)
def test_internimages_layers_equal_their_masked_form(norms: dict[str, Any]) -> None:
    cfg = InternImageConfig(channels=16, groups=(1, 2, 4, 8), depths=(1, 1, 1, 1), **norms)
    layer = _stages(cfg, reference.dcnv3, TORCH_LAYERS)[0].blocks[0].double()
    for parameter in layer.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    x = torch.randn(5, 4, 4, 16, dtype=torch.float64, requires_grad=True)
    rows = [torch.tensor([3, 0, 4]), torch.tensor([1, 2, 0])]
    found = []
    for mode in ("mask", "subset"):
        layer.drop_path = Drawn(rows, mode)
        y = layer(x)
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        found.append([y, *torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()])])
    for masked, subset in zip(*found, strict=True):
        torch.testing.assert_close(subset, masked, atol=1e-12, rtol=1e-12)


def test_every_sample_is_kept_as_often_and_their_number_is_exact() -> None:
    drop, x = DropPath(0.3, "subset"), torch.zeros(10, 1)
    kept = torch.zeros(10)
    for _ in range(2000):
        rows = drop.draw(x)
        assert rows is not None and len(set(rows.tolist())) == 7
        kept[rows] += 1
    assert (kept / 2000 - 0.7).abs().max() < 5 * (0.21 / 2000) ** 0.5
    assert [num_kept(n, 0.9) for n in (1, 4, 10, 26)] == [1, 1, 1, 3]
    assert drop.eval().draw(x) is None
    assert DropPath(0.0, "subset").draw(x) is None


def test_priorities_decide_what_is_dropped() -> None:
    quarter = 2**22
    priority = torch.tensor([quarter, 0, 2**24 - 1, quarter - 1], dtype=torch.int32)
    x = torch.ones(4, 3, dtype=torch.float64)
    masked = DropPath(0.25)(x, priority)
    assert masked[:, 0].tolist() == [1 / 0.75, 0, 1 / 0.75, 0]
    subset = DropPath(0.5, "subset")
    assert subset.draw(x, priority).tolist() == [2, 0]  # type: ignore[union-attr]
    added = subset.add(x, x[:2], None, torch.tensor([2, 0]), priority)
    assert added[:, 0].tolist() == [3, 1, 3, 1]
    assert subset.eval().draw(x, priority) is None
    assert DropPath(0.25).eval()(x, priority) is x


@pytest.mark.parametrize("way", ["none", "full"])
@pytest.mark.parametrize("name", ["vit", "internimage"])
def test_a_row_drops_the_same_branches_in_any_batch(name: str, way: Recompute) -> None:
    """And every branch has a column of its own, which decides that branch alone."""
    if name == "vit":
        cfg = replace(CFG, drop_path_mode="mask", activation_checkpointing=way)
        model, images = ViT(cfg), torch.randn(6, 3, 32, 32)
    else:
        small = replace(internimage_demo(), drop_path_rate=0.5, activation_checkpointing=way)
        model, images = InternImage(small), torch.randn(6, 3, 64, 64)
        cfg = small
    count = 2 * cfg.num_layers
    priority = torch.randint(2**24, (6, count), dtype=torch.int32)
    whole = model.encode_cells(images, priority)
    parts = [model.encode_cells(images[i::2], priority[i::2]) for i in (0, 1)]
    for i, part in enumerate(parts):
        torch.testing.assert_close(part, whole[i::2], atol=1e-5, rtol=1e-4)
    kept = torch.full((6, count), 2**24 - 1, dtype=torch.int32)
    everything = model.encode_cells(images, kept)
    for column in range(2, count):  # the first layer drops nothing
        dropped = kept.clone()
        dropped[3, column] = 0
        changed = (model.encode_cells(images, dropped) != everything).flatten(1).any(1)
        assert changed.tolist() == [False, False, False, True, False, False]


def test_what_is_dropped_is_not_computed() -> None:
    model, images = ViT(CFG), torch.randn(6, 3, 32, 32)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        model(images)
    assert counter.get_total_flops() == vit(CFG, 6).forward
    assert vit(CFG, 6).forward < 0.8 * vit(replace(CFG, drop_path_mode="mask"), 6).forward
    assert vit(replace(CFG, drop_path_rate=0.0), 6) == vit(
        replace(CFG, drop_path_rate=0.0, drop_path_mode="mask"), 6
    )


@pytest.mark.parametrize("way", ["none", "full"])
def test_internimage_computes_as_little_as_its_formula(way: Recompute) -> None:
    cfg = replace(
        internimage_demo(),
        drop_path_rate=0.5,
        drop_path_mode="subset",
        activation_checkpointing=way,
    )
    model, images = InternImage(cfg), torch.randn(6, 3, 64, 64)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        model.encode_cells(images).square().sum().backward()
    found = internimage(cfg, 6, 64)
    assert counter.get_total_flops() == found.hardware
    masked = replace(cfg, drop_path_mode="mask")
    assert found.forward < 0.85 * internimage(masked, 6, 64).forward
    # 6, 5, 4, 4 and 3 images: cells x channels of each stage, 5 operations at each of 9 points
    places = 6 * 256 * 32 + 5 * 64 * 64 + (4 + 4) * 16 * 128 + 3 * 4 * 256
    assert internimage_sampling(cfg, 6, 64).forward == 5 * 9 * places


@pytest.mark.parametrize("way", ["selective", "full"])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_same_samples_are_drawn_when_a_block_is_computed_again(
    way: Recompute, bf16: bool
) -> None:
    images, grads = torch.randn(6, 3, 32, 32), []
    for recompute in ("none", way):
        torch.manual_seed(0)
        model = ViT(replace(CFG, layer_scale_init=0.1, activation_checkpointing=recompute))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model(images).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        assert plain is not None and torch.equal(plain, again)


def test_it_compiles_whole() -> None:
    block = Block(32, 2, drop_path=0.5, drop_path_mode="subset")
    x = torch.randn(6, 3, 32)
    compiled = torch.compile(block, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.manual_seed(0)
    expected = block(x)
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(x), expected)
