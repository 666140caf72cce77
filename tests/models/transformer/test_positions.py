"""Sine-cosine embeddings against fp64 loops and timm; resampled positions against timm."""

import math

import pytest
import torch
from timm.layers import (
    RotaryEmbeddingDinoV3,
    apply_rot_embed_cat,
    build_sincos2d_pos_embed,
    resample_abs_pos_embed,
)
from torch import Tensor

from m3i_fast.models.transformer.positions import (
    grid_embedding,
    patch_centres,
    resample_grid,
    rotary,
    rotate,
    sincos_embedding,
)


def test_embedding_is_the_formula_in_double_precision() -> None:
    dim, values = 16, [-7.25, 0.0, 0.5, 13.0]
    got = sincos_embedding(torch.tensor([values]), dim)
    expected = []
    for p in values:
        angles = [p * 10000 ** (-k / (dim / 4)) for k in range(dim // 4)]
        expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    assert got.shape == (1, len(values) * dim // 2) and got.dtype == torch.float32
    torch.testing.assert_close(got[0].double(), torch.tensor(expected).double(), atol=2e-6, rtol=0)


def test_grid_embedding_equals_timm() -> None:
    expected = build_sincos2d_pos_embed([7, 7], dim=64, interleave_sin_cos=True)
    torch.testing.assert_close(grid_embedding(7, 64), expected)


def test_dim_must_be_a_multiple_of_four() -> None:
    with pytest.raises(ValueError, match="dim: expected a multiple of 4 .* got 6"):
        sincos_embedding(torch.zeros(1), 6)


@pytest.mark.parametrize("new", [(7, 7), (14, 14), (20, 20), (6, 9)])
def test_resampled_positions_equal_timm(new: tuple[int, int]) -> None:
    table = torch.randn(1, 14 * 14, 12)
    expected = resample_abs_pos_embed(table, list(new), [14, 14], num_prefix_tokens=0)
    torch.testing.assert_close(resample_grid(table, (14, 14), new), expected, atol=0, rtol=0)


def test_rotary_positions_are_timms_of_dinov3() -> None:
    rows, columns, heads, dim = 3, 5, 2, 16
    theirs = RotaryEmbeddingDinoV3(dim, temperature=100.0, rotate_half=True)
    angles = theirs.get_embed([rows, columns])  # [N, 2 dim]: sines, cosines
    x = torch.randn(4, rows * columns, heads, dim)
    expected = apply_rot_embed_cat(x.transpose(1, 2), angles, half=True).transpose(1, 2)
    rotation = rotary(patch_centres(rows, columns), dim).expand(4, -1, -1, -1)
    torch.testing.assert_close(rotate(x, rotation), expected, atol=1e-6, rtol=1e-5)
    assert (rotate(x, rotation) - x).abs().mean() > 0.2


def test_only_the_distance_of_two_rotated_tokens_counts() -> None:
    q, k = torch.randn(2, 1, 7, 3, 12, dtype=torch.float64).unbind(0)
    centres = torch.rand(1, 7, 2) * 2 - 1

    def scores(at: Tensor) -> Tensor:
        rotation = rotary(at, 12)
        return torch.einsum("bqhd,bkhd->bhqk", rotate(q, rotation), rotate(k, rotation))

    moved = scores(centres + torch.tensor([0.25, -0.5]))
    torch.testing.assert_close(moved, scores(centres), atol=2e-5, rtol=1e-4)
    assert (scores(1.5 * centres) - moved).abs().max() > 0.5
    nowhere = rotary(torch.zeros(1, 7, 2), 12)
    assert torch.equal(rotate(q, nowhere), q.float().to(q.dtype))
