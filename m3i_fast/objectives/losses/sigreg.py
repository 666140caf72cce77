"""SIGReg: keep embeddings near an isotropic Gaussian, by tests of random slices of them.

LeJEPA, arXiv 2511.08544. Legend: V views, N rows of each, E features, M slices, K knots.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from m3i_fast.objectives.losses.regularisers import invariance
from m3i_fast.objectives.row_statistics import full_precision, num_rows, sum_over_ranks, wide

NUM_KNOTS = 17
LAST_KNOT = 3.0
"""Knots on [0, 3] as in the authors' package; the integrand is even. The paper's listing has 17 on
[-5, 5]."""
_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # SplitMix64's, as `keyed_draws`
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


class _CharacteristicSums(torch.autograd.Function):
    """Sums over rows of cos(t x) and sin(t x), of which no array of rows x knots is stored."""

    @staticmethod
    def forward(ctx: Any, slices: Tensor, knots: Tensor) -> Tensor:  # [V, N, M], [K]
        ctx.save_for_backward(slices, knots)
        views, _, count = slices.shape
        sums = slices.new_empty(2, len(knots), views, count)
        for place, knot in enumerate(knots.unbind()):
            angle = slices * knot
            torch.sum(angle.cos(), 1, out=sums[0, place])
            torch.sum(angle.sin_(), 1, out=sums[1, place])
        return sums  # [2, K, V, M]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        slices, knots = ctx.saved_tensors
        by_slices = torch.zeros_like(slices)
        for place, knot in enumerate(knots.unbind()):
            angle = slices * knot
            by_slices.addcmul_(angle.cos(), (grad[1, place] * knot)[:, None])
            by_slices.addcmul_(angle.sin_(), (grad[0, place] * knot)[:, None], value=-1)
        return by_slices, None


@full_precision
def sigreg(
    z: Tensor,  # [V, N, E] any float
    directions: Tensor,  # [E, M] any float, unit columns
    *,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:  # [] fp32
    """Return mean N integral |phi(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt, Epps-Pulley's statistic.

    phi(t) = mean_n exp(i t z_n . a) is the characteristic function of a view's slice by direction
    a, a mean over the rows of all ranks, and N is their number; the result is the mean over views
    and directions. LeJEPA, arXiv 2511.08544, section 4 and algorithm 1, by the trapezoidal rule on
    [-3, 3], of which the knots of [0, 3] are enough. The gradient keeps [V, N, M] values.
    """
    if z.dim() != 3 or directions.shape[:1] != z.shape[2:]:
        raise ValueError(
            f"z, directions: expected shapes [V, N, E] and [E, M], got {list(z.shape)} and "
            f"{list(directions.shape)}"
        )
    rows = wide(z)
    knots = torch.linspace(0, LAST_KNOT, NUM_KNOTS, dtype=rows.dtype, device=rows.device)
    gaussian = (-knots.square() / 2).exp()
    step = LAST_KNOT / (NUM_KNOTS - 1)
    weights = 2 * step * gaussian  # of both signs of t
    weights[0] /= 2
    weights[-1] /= 2
    sums: Tensor = _CharacteristicSums.apply(rows @ directions.to(rows.dtype), knots)
    count = num_rows(rows[0], process_group)
    cosine, sine = (sum_over_ranks(sums, process_group) / count).unbind()
    error = (cosine - gaussian[:, None, None]).square() + sine.square()  # [K, V, M]
    return count * (weights[:, None, None] * error).sum(0).mean()


@torch.no_grad()
def draw_directions(key: Tensor, dim: int, count: int) -> Tensor:  # [] int64 -> [E, M] fp32
    """Draw unit vectors evenly over the sphere, as columns; the same from the same key.

    They are normal numbers by Box and Muller's transform of SplitMix64's words, scaled to unit
    length. Draws on the key's device, without a host synchronisation.
    """
    pairs = -(-dim * count // 2)
    words = _finalise(key + _GAMMA * torch.arange(1, pairs + 1, device=key.device))
    ones = 2**24 - 1
    first = (((words >> 40) & ones) + 1) * 2.0**-24  # (0, 1], whose logarithm is finite
    turn = ((words >> 8) & ones) * (2.0**-24 * 2 * math.pi)
    radius = (-2 * first.log()).sqrt()
    normal = torch.cat([radius * turn.cos(), radius * turn.sin()])[: dim * count].view(dim, count)
    return normal / torch.linalg.vector_norm(normal, dim=0)


def _finalise(words: Tensor) -> Tensor:  # [N] int64, whose bits are those of 64-bit words
    """Hash words by SplitMix64's finaliser, as `keyed_draws.finalise`."""
    words = (words ^ _shifted(words, 30)) * _FIRST
    words = (words ^ _shifted(words, 27)) * _SECOND
    return words ^ _shifted(words, 31)


def _shifted(words: Tensor, by: int) -> Tensor:
    """Shift right and fill with zeros, where int64's own shift repeats the sign."""
    return (words >> by) & ((1 << (64 - by)) - 1)


class SigReg(nn.Module):
    """Compute SIGReg of views, by directions drawn anew from each step's key."""

    def __init__(self, num_slices: int, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.num_slices, self.group = num_slices, group

    def forward(self, z: Tensor, key: Tensor) -> Tensor:  # [V, N, E], [] int64 -> []
        """Return the mean over views and slices; key: `Mix.slice_key`, alike on all ranks."""
        directions = draw_directions(key, z.shape[-1], self.num_slices)
        return sigreg(z, directions, process_group=self.group)


class LeJepa(nn.Module):
    """Compute LeJEPA's loss of a picture's views, arXiv 2511.08544, algorithm 2.

    It is (1 - w) mean |z_hat - z|^2 / E over rows and views, z the mean embedding of the picture's
    global views and z_hat each view's own, plus w times SIGReg of z_hat.
    """

    def __init__(self, weight: float, num_slices: int, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.weight, self.group = weight, group
        self.spread = SigReg(num_slices, group)

    def forward(self, z_hat: Tensor, z: Tensor, key: Tensor) -> Tensor:
        """Return the loss: [V, N, E], [V, N, E], [] int64 -> []."""
        rows = z_hat.flatten(0, 1), z.flatten(0, 1)
        prediction = invariance(*rows, process_group=self.group)
        return (1 - self.weight) * prediction + self.weight * self.spread(z_hat, key)
