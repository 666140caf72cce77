"""Pictures of any size and aspect in one packed pass against a pass each: tokens and gradients."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from m3i_fast.config.models.internimage import internimage_demo
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.models.activation_checkpointing import _keep_products
from m3i_fast.models.encoder import PackedTokens
from m3i_fast.models.internimage.model import InternImage
from m3i_fast.models.transformer import blocks
from m3i_fast.models.transformer.blocks import Attention
from m3i_fast.models.transformer.drop_path import NUM_PRIORITIES
from m3i_fast.models.transformer.packing import Packed, sort_by_length
from m3i_fast.models.transformer.positions import (
    cells_of_grids,
    grid_centres,
    patch_centres,
    resample_grid,
    resample_to_grids,
)
from m3i_fast.models.transformer.vit import ViT
from m3i_fast.ops.views import cut_patches

PATCH = 4
# Rows and columns: tall and wide, square, one cell, equal lengths of other aspects, the same again.
GRIDS = (3, 5), (4, 4), (1, 1), (5, 3), (2, 8), (1, 6), (4, 4), (6, 7)
SMALL: dict[str, Any] = {
    "image_size": 16, "patch_size": PATCH, "dim": 32, "depth": 3, "num_heads": 4,
}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "prefix": {"class_token": True, "num_registers": 2},
    "rotary": {"position": "rotary", "class_token": True, "key_bias": False},
    "swiglu": {"mlp": "swiglu", "layer_scale_init": 0.5, "num_registers": 1},
    "clip": {"pre_norm": True, "class_token": True, "mlp": "quick_gelu", "final_norm": False},
    "drop_path": {"drop_path_rate": 0.6, "num_registers": 2},
    "rotary, drop_path": {"position": "rotary", "drop_path_rate": 0.6, "layer_scale_init": 0.5},
    "recomputed": {"drop_path_rate": 0.6, "activation_checkpointing": "full"},
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def build(dtype: torch.dtype = torch.float32, **options: Any) -> ViT:
    """An encoder in training whose weights are larger than the first ones."""
    torch.manual_seed(0)
    vit = ViT(ViTConfig(**{**SMALL, **options})).to(dtype)
    for p in vit.parameters():
        nn.init.normal_(p, std=0.1)
    return vit.train()


def draw(dtype: torch.dtype) -> list[Tensor]:
    sizes = [[PATCH * side for side in grid] for grid in GRIDS]
    return [torch.randn(3, *size, dtype=dtype, requires_grad=True) for size in sizes]


def packed(vit: ViT, pictures: list[Tensor], priority: Tensor | None = None) -> PackedTokens:
    patches = torch.cat([cut_patches(picture, PATCH) for picture in pictures])
    return vit.encode_pictures(patches, torch.tensor(GRIDS), priority)


def one_by_one(vit: ViT, pictures: list[Tensor], priority: Tensor | None = None) -> PackedTokens:
    rows = [None if priority is None else priority[i : i + 1] for i in range(len(pictures))]
    each = [vit(picture[None], row)[0] for picture, row in zip(pictures, rows, strict=True)]
    prefix = torch.stack([tokens[: vit.num_prefix] for tokens in each])
    return PackedTokens(prefix, torch.cat([tokens[vit.num_prefix :] for tokens in each]))


def gradients_of(
    vit: ViT, pictures: list[Tensor], run: Callable[[], PackedTokens]
) -> tuple[PackedTokens, dict[str, Tensor]]:
    """Tokens, and the gradients of a sum that weighs all of their numbers differently."""
    vit.zero_grad()
    for picture in pictures:
        picture.grad = None
    tokens = run()
    flat = torch.cat([part.flatten() for part in tokens])
    (flat * torch.linspace(-1, 1, len(flat), dtype=flat.dtype)).sum().backward()
    named = {name: p.grad for name, p in vit.named_parameters()}
    named |= {f"picture {i}": picture.grad for i, picture in enumerate(pictures)}
    return tokens, {name: grad for name, grad in named.items() if grad is not None}


def priorities(depth: int) -> Tensor:
    return torch.randint(NUM_PRIORITIES, (len(GRIDS), 2 * depth), dtype=torch.int32)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ENCODERS)
def test_packed_pictures_are_encoded_as_each_alone(name: str, dtype: torch.dtype) -> None:
    vit = build(dtype, **ENCODERS[name])
    pictures = draw(dtype)
    priority = priorities(vit.cfg.depth) if vit.cfg.drop_path_rate else None
    got, got_gradients = gradients_of(vit, pictures, lambda: packed(vit, pictures, priority))
    expected, gradients = gradients_of(vit, pictures, lambda: one_by_one(vit, pictures, priority))
    tolerance = TOLERANCE[dtype]
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert got_gradients.keys() == gradients.keys() and len(gradients) > len(GRIDS) + 10
    for key, gradient in gradients.items():
        size = float(gradient.abs().max())
        error = float((got_gradients[key] - gradient).abs().max())
        assert error <= tolerance * (1 + size), (key, error, size)


def test_a_picture_s_tokens_do_not_depend_on_the_others() -> None:
    vit = build(class_token=True).eval()
    pictures = draw(torch.float32)
    with torch.no_grad():
        before = packed(vit, pictures)
        pictures[-1].mul_(-3)
        after = packed(vit, pictures)
    last = GRIDS[-1][0] * GRIDS[-1][1]
    assert torch.equal(before.prefix[:-1], after.prefix[:-1])
    assert torch.equal(before.cells[:-last], after.cells[:-last])
    assert (before.cells[-last:] - after.cells[-last:]).abs().amin(1).min() > 0


def test_a_branch_is_dropped_for_all_tokens_of_a_picture() -> None:
    """Without priorities, by draws: each picture has one of the four outcomes of two branches."""
    vit = build(depth=1)
    vit.blocks[0].drop_path.rate = 0.5
    pictures = draw(torch.float32)
    lengths = [rows * columns for rows, columns in GRIDS]
    outcomes = set()
    with torch.no_grad():
        both = torch.cartesian_prod(*(torch.tensor([0, NUM_PRIORITIES - 1]).int(),) * 2)
        ways = [packed(vit, pictures, way.expand(len(GRIDS), 2)).cells for way in both]
        for _ in range(8):
            cells = packed(vit, pictures).cells.split(lengths)
            of_each = zip(cells, *(way.split(lengths) for way in ways), strict=True)
            for drawn, *possible in of_each:
                (way,) = [i for i, found in enumerate(possible) if torch.equal(found, drawn)]
                outcomes.add(way)
    assert outcomes == {0, 1, 2, 3}


class Products(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "bmm")
        return func(*args, **(kwargs or {}))


def test_it_multiplies_once_for_all_pictures() -> None:
    vit = build()
    with torch.no_grad(), Products() as products:
        packed(vit, draw(torch.float32))
    assert products.count == 4 * vit.cfg.depth + 2  # patches, positions


# ---- Positions -----------------------------------------------------------------------------------

SIDES = [(g, h) for g in (1, 4, 7) for h in ((1, 1), (4, 4), (7, 7), (3, 9), (16, 2), (14, 14))]


@pytest.mark.parametrize("old, grid", SIDES)
def test_a_table_is_resampled_as_for_one_picture(old: int, grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    table = torch.randn(1, old * old, 8, dtype=torch.float64, requires_grad=True)
    grids = torch.tensor([(2, 3), grid, (1, 5)])
    place, extent = cells_of_grids(grids)
    got = resample_to_grids(table, old, place, extent, largest=int(grids.max()))
    expected = [resample_grid(table, (old, old), (int(h), int(w)))[0] for h, w in grids]
    torch.testing.assert_close(got, torch.cat(expected), rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(got)
    (a,) = torch.autograd.grad((got * weight).sum(), table)
    (b,) = torch.autograd.grad((torch.cat(expected) * weight).sum(), table)
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_the_square_that_a_table_is_made_for_has_its_own_rows() -> None:
    table = torch.randn(1, 49, 8)
    place, extent = cells_of_grids(torch.tensor([(7, 7), (7, 7)]))
    got = resample_to_grids(table, 7, place, extent, largest=7)
    assert torch.equal(got, table[0].repeat(2, 1))


def test_centres_are_those_of_each_grid() -> None:
    grids = torch.tensor(GRIDS)
    got = grid_centres(*cells_of_grids(grids))
    assert torch.equal(got, torch.cat([patch_centres(*grid) for grid in GRIDS]))


def test_patches_are_cut_row_by_row() -> None:
    picture = torch.arange(3 * 8 * 12).view(3, 8, 12)
    patches = cut_patches(picture, 4)
    rows = [picture[:, y : y + 4, x : x + 4].flatten() for y in (0, 4) for x in (0, 4, 8)]
    assert torch.equal(patches, torch.stack(rows))
    assert torch.equal(cut_patches(torch.stack([picture, -picture]), 4)[1], -patches)


# ---- Attention in one kernel ---------------------------------------------------------------------


def one_kernel(contract: list[tuple[int, int]]) -> Callable[..., Tensor]:
    """What `varlen_attn` computes, sequence by sequence, with its arguments checked."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, ends: Tensor, ends_k: Tensor, max_q: int, max_k: int
    ) -> Tensor:
        assert q.ndim == 3 and q.shape == k.shape == v.shape
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        assert ends.dtype == torch.int32 and ends is ends_k and ends.is_contiguous()
        bounds = ends.tolist()
        assert bounds[0] == 0 and bounds[-1] == len(q)
        lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
        assert max(lengths) == max_q == max_k
        contract.append((len(lengths), max_q))
        parts = [
            F.scaled_dot_product_attention(*(x[None, a:b].transpose(1, 2) for x in (q, k, v)))[0]
            for a, b in zip(bounds, bounds[1:], strict=False)
        ]
        return torch.cat([part.transpose(0, 1) for part in parts])

    return attend


@pytest.mark.parametrize("name", ["prefix", "rotary", "rotary, drop_path", "recomputed"])
def test_one_kernel_is_given_what_it_takes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    vit = build(**ENCODERS[name])
    pictures = draw(torch.float32)
    priority = priorities(vit.cfg.depth) if vit.cfg.drop_path_rate else None
    expected, gradients = gradients_of(vit, pictures, lambda: packed(vit, pictures, priority))
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(blocks, "runs_varlen", lambda q: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", one_kernel(calls))
    got, got_gradients = gradients_of(vit, pictures, lambda: packed(vit, pictures, priority))
    assert len(calls) >= vit.cfg.depth and set(calls) == {(len(GRIDS), 42 + vit.num_prefix)}
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for key, gradient in gradients.items():
        torch.testing.assert_close(got_gradients[key], gradient, rtol=1e-4, atol=1e-4, msg=key)


def test_torch_s_own_kernel_takes_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the shapes that torch's operator and its gradient promise, without a GPU."""
    monkeypatch.setattr(blocks, "runs_varlen", lambda q: True)
    packing = sort_by_length([5, 3, 9, 3], num_prefix=1)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        ends = mode.from_tensor(packing.packed.ends)
        fake = Packed(packing.packed.groups, ends=ends)
        qkv = torch.randn(24, 3 * 32, dtype=torch.bfloat16, requires_grad=True)
        attended = Attention(4, 8).attend_packed(qkv, fake)
        assert attended.shape == (24, 32)
        attended.sum().backward()
        assert qkv.grad is not None and qkv.grad.shape == qkv.shape


def test_selective_recomputation_keeps_its_result() -> None:
    importlib.import_module("torch.nn.attention.varlen")  # which registers it
    op = torch.ops.torch_attn._varlen_attn.default
    assert _keep_products(None, op) == CheckpointPolicy.MUST_SAVE
    assert _keep_products(None, torch.ops.aten.cat.default) != CheckpointPolicy.MUST_SAVE


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["prefix", "rotary"])
def test_a_gpu_s_kernel_is_no_worse_than_a_call_each(name: str) -> None:
    vit = build(**ENCODERS[name]).cuda().eval()
    pictures = [picture.detach().cuda() for picture in draw(torch.float32)]
    with torch.no_grad():
        exact = torch.cat([part.flatten() for part in one_by_one(vit, pictures)])
        with torch.autocast("cuda", torch.bfloat16):
            alone = torch.cat([part.flatten() for part in one_by_one(vit, pictures)])
            together = torch.cat([part.flatten() for part in packed(vit, pictures)])
    assert (together - exact).norm() <= 1.2 * (alone - exact).norm() + 1e-3


# ---- What is refused -----------------------------------------------------------------------------


def test_what_cannot_be_packed_is_refused() -> None:
    grids = torch.tensor(GRIDS)
    patches = torch.cat([cut_patches(picture, PATCH) for picture in draw(torch.float32)])
    subset = build(drop_path_rate=0.5, drop_path_mode="subset")
    with pytest.raises(ValueError, match="drop_path_mode: expected mask with packed .* got subset"):
        subset.encode_pictures(patches, grids)
    subset.eval().encode_pictures(patches, grids)
    with pytest.raises(ValueError, match=r"patches: expected \[127, 48\] for 8 sequences"):
        build().encode_pictures(patches[:-1], grids)
    with pytest.raises(ValueError, match=r"centres: expected \[T, 2\] with position = rotary"):
        build(position="rotary").encode_packed(torch.zeros(3, 32), [1, 2])
    with pytest.raises(ValueError, match=r"lengths: expected at least 1 token a sequence, got \[0"):
        build().encode_packed(torch.zeros(2, 32), [0, 2])
    other = build()
    other.blocks[0].attention = nn.Identity()
    with pytest.raises(ValueError, match="attention by torch with packed .* got Identity of"):
        other.encode_pictures(patches, grids)
    with pytest.raises(ValueError, match="expected a ViT for packed pictures, .* got InternImage"):
        InternImage(internimage_demo()).encode_pictures(patches, grids)
