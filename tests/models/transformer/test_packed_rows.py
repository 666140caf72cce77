"""Packed rows filled up to a multiple of 16, as FP8 asks: tokens and gradients stay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from m3i_fast.models.transformer import blocks, float8
from m3i_fast.models.transformer.blocks import TORCH_LAYERS, BlockLayers
from m3i_fast.models.transformer.float8 import FLOAT8_LAYERS
from m3i_fast.models.transformer.packing import sort_by_length
from m3i_fast.models.transformer.vit import ViT
from tests.models.transformer.test_packed_pictures import (
    ENCODERS,
    GRIDS,
    TOLERANCE,
    build,
    draw,
    gradients_of,
    one_kernel,
    packed,
    priorities,
)

ALIGNED = replace(TORCH_LAYERS, row_multiple=16)


def with_layers(vit: ViT, layers: BlockLayers) -> ViT:
    """The same weights in other layers."""
    other = ViT(vit.cfg, layers=layers).to(next(vit.parameters()).dtype)
    other.load_state_dict(vit.state_dict())
    return other.train(vit.training)


def rows_of(vit: ViT, pictures: list[Tensor]) -> set[int]:
    """Rows of the products of all blocks."""
    rows: set[int] = set()
    hooks = [
        block.proj.register_forward_pre_hook(lambda _, given: rows.add(given[0].shape[0]))
        for block in vit.blocks
    ]
    packed(vit, pictures)
    for hook in hooks:
        hook.remove()
    return rows


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ENCODERS)
def test_tokens_and_gradients_are_those_of_rows_as_they_are(
    name: str, dtype: torch.dtype, varlen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit = build(dtype, **ENCODERS[name])
    aligned, pictures = with_layers(vit, ALIGNED), draw(dtype)
    if varlen:
        monkeypatch.setattr(blocks, "runs_varlen", lambda q: True)
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", one_kernel([]))
    priority = priorities(vit.cfg.depth) if vit.cfg.drop_path_rate else None
    found = gradients_of(aligned, pictures, lambda: packed(aligned, pictures, priority))
    expected = gradients_of(vit, pictures, lambda: packed(vit, pictures, priority))
    tolerance = TOLERANCE[dtype]
    for a, b in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert found[1].keys() == expected[1].keys() and len(found[1]) > len(GRIDS) + 10
    for key, gradient in expected[1].items():
        size = float(gradient.abs().max())
        assert float((found[1][key] - gradient).abs().max()) <= tolerance * (1 + size), key
    whole = sum(rows * columns for rows, columns in GRIDS) + len(GRIDS) * vit.num_prefix
    assert rows_of(vit, pictures) == {whole}
    assert rows_of(aligned, pictures) == {-(-whole // 16) * 16}


def test_branches_are_dropped_by_the_same_draws() -> None:
    vit = build(drop_path_rate=0.6)
    aligned, pictures = with_layers(vit, ALIGNED), draw(torch.float32)
    found = []
    for model in (vit, aligned):
        torch.manual_seed(7)
        with torch.no_grad():
            found.append(packed(model, pictures).cells)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths, padding", [([5, 3, 9, 3], 8), ([16], 15), ([15], 0), ([47], 0)])
def test_padding_is_one_sequence_behind_all(lengths: list[int], padding: int) -> None:
    packing = sort_by_length(lengths, num_prefix=1, multiple=16)
    plain = sort_by_length(lengths, num_prefix=1)
    of_padding = packing.packed
    assert of_padding.num_padding == padding and len(packing.order) % 16 == 0
    assert of_padding.num_sequences == plain.packed.num_sequences == len(lengths)
    assert torch.equal(packing.back, plain.back)
    assert torch.equal(packing.order[: len(plain.order)], plain.order)
    own = 1 if padding else 0
    assert of_padding.ends is not None and plain.packed.ends is not None
    assert torch.equal(of_padding.ends[: len(lengths) + 1], plain.packed.ends)
    assert of_padding.ends.tolist()[-1] == len(packing.order)
    assert len(of_padding.ends) == len(lengths) + 1 + own


@contextmanager
def as_cuda() -> Iterator[list[Tensor]]:
    """Refuse the products in FP8 that CUDA refuses and a CPU computes; yields the others."""
    made, multiply = [], torch._scaled_mm

    def checked(first: Tensor, second: Tensor, *rest: Any, **named: Any) -> Tensor:
        if any(side % 16 for side in (first.shape[1], *second.shape)):
            raise ValueError(f"expected multiples of 16, got {first.shape} @ {second.shape}")
        made.append(multiply(first, second, *rest, **named))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_scaled_mm", checked)
        yield made


def step(vit: ViT, pictures: list[Tensor]) -> tuple[Tensor, Tensor]:
    """All tokens, and all gradients behind one another."""
    with torch.autocast("cpu", torch.bfloat16):
        tokens, gradients = gradients_of(vit, pictures, lambda: packed(vit, pictures))
    in_order = [gradients[name].flatten() for name in sorted(gradients)]
    return torch.cat([part.flatten() for part in tokens]).detach(), torch.cat(in_order)


@pytest.mark.parametrize("name", ["prefix", "rotary", "swiglu"])
def test_fp8_takes_packed_pictures_of_any_number_of_tokens(name: str) -> None:
    """By torchao, all three products of each layer, no further from bf16 than rows as they are."""
    vit, pictures = build(**ENCODERS[name]), draw(torch.float32)
    aligned = with_layers(vit, FLOAT8_LAYERS)
    as_given = with_layers(vit, replace(FLOAT8_LAYERS, row_multiple=1))
    before = float8.PRODUCTS.forward, float8.PRODUCTS.backward
    with as_cuda() as products:
        found = step(aligned, pictures)
        forward = float8.PRODUCTS.forward - before[0]
        assert forward == 4 * vit.cfg.depth and len(products) == 3 * forward
        assert float8.PRODUCTS.backward - before[1] == 2 * forward
        with pytest.raises(ValueError, match="expected multiples of 16, got"):
            step(as_given, pictures)
    exact = step(vit, pictures)
    for ours, plain, wanted in zip(found, step(as_given, pictures), exact, strict=True):
        assert ours.shape == wanted.shape
        error = (ours - wanted).norm() / wanted.norm()
        assert 0 < error <= 1.1 * (plain - wanted).norm() / wanted.norm() + 0.005
