"""Dtypes of `boltzmann`, and fake kernels of its compiled ops on vectors of N and M.

Legend: N rows and M columns, D features; K parts of a sum. `cuda/boltzmann/vectors/params.h` says
what each op computes. Wide is fp32, fp64 for fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits, sums and gradients for features of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_features(*features: Tensor) -> list[Tensor]:
    """Cast features to the dtype of autocast where it is on, except float64 ones."""
    device = features[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(features)
    dtype = torch.get_autocast_dtype(device)
    return [rows if rows.dtype == torch.float64 else rows.to(dtype) for rows in features]


def num_parts(rows: int, columns: int) -> int:
    """Return the number of parts in which an op leaves a sum (`boltzmann_parts` in params.h)."""
    return torch.sym_min(torch.sym_max((rows + columns + 31) // 32, 1), 256)


@torch.library.register_fake("m3i::boltzmann_prepare")
def _fake_prepare(
    z_hat: Tensor,  # [N, D]
    z: Tensor,  # [M, D], this rank's columns
    bias: Tensor | None,  # [] or [M] wide
    row_ids: Tensor | None,  # [N] int64
    col_ids: Tensor | None,  # [num_columns] int64
    first_column: int,
    num_columns: int | None,  # of all ranks; None: M
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [N] and [num_columns] int32, [M] wide, [K, 4] wide
    dtype = wide(z_hat.dtype)
    return (
        z_hat.new_empty(z_hat.shape[0], dtype=torch.int32),
        z_hat.new_empty(0 if col_ids is None else col_ids.shape[0], dtype=torch.int32),
        z_hat.new_empty(z.shape[0], dtype=dtype),
        z_hat.new_empty((num_parts(z_hat.shape[0], z.shape[0]), 4), dtype=dtype),
    )


@torch.library.register_fake("m3i::boltzmann_shift")
def _fake_shift(
    extremes: Tensor,  # [K, 4]
    scale: Tensor,  # []
    row_ids: Tensor,  # [N]
    bias: Tensor,  # [M]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [N], [M], [], [] bool
    return (
        scale.new_empty(row_ids.shape[0]),
        scale.new_empty(bias.shape[0]),
        scale.new_empty(()),
        scale.new_empty((), dtype=torch.bool),
    )


@torch.library.register_fake("m3i::boltzmann_exact")
def _fake_exact(
    rows: Tensor,  # [4, N]
    cols: Tensor,  # [4, M or 0]
    run: Tensor,  # [] bool
) -> Tensor:  # [] bool
    return torch.empty_like(run)


@torch.library.register_fake("m3i::boltzmann_exact_shift")
def _fake_exact_shift(
    row_max: Tensor,  # [N]
    col_max: Tensor,  # [M]
    row_shift: Tensor,  # [N]
    col_shift: Tensor,  # [M]
    exact: Tensor,  # [] bool
) -> tuple[Tensor, Tensor]:  # [N], [M]
    return torch.empty_like(row_shift), torch.empty_like(col_shift)


@torch.library.register_fake("m3i::boltzmann_totals")
def _fake_totals(
    rows: Tensor,  # [4, N]
    cols: Tensor,  # [4, M or 0]
    rows_again: Tensor | None,  # [4, N]
    cols_again: Tensor | None,  # [4, M or 0]
    row_shift: Tensor,  # [N]
    col_shift: Tensor,  # [M]
    exact: Tensor,  # [] bool
) -> Tensor:  # [K, 4]
    return rows.new_empty((num_parts(rows.shape[1], cols.shape[1]), 4))


@torch.library.register_fake("m3i::boltzmann_loss")
def _fake_loss(
    rows: Tensor,  # [4, N]
    cols: Tensor,  # [4, M or 0]
    rows_again: Tensor | None,  # [4, N]
    cols_again: Tensor | None,  # [4, M or 0]
    row_shift: Tensor,  # [N]
    col_shift: Tensor,  # [M]
    exact: Tensor,  # [] bool
    totals: Tensor,  # [K, 4]
    bound: Tensor,  # []
    symmetric: bool,
    mean: bool,
    ranks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # [], [], [], [3, N], [3, M]
    value, share, num_rows = (rows.new_empty(()) for _ in range(3))
    row_weights, col_weights = (rows.new_empty((3, of.shape[0])) for of in (row_shift, col_shift))
    return value, share, num_rows, row_weights, col_weights


@torch.library.register_fake("m3i::boltzmann_sigmoid_loss")
def _fake_sigmoid_loss(
    values: Tensor,  # [N]
    extremes: Tensor,  # [K, 4]
    bound: Tensor,  # []
    mean: bool,
    ranks: int,
) -> tuple[Tensor, Tensor]:  # [], []
    return values.new_empty(()), values.new_empty(())


@torch.library.register_fake("m3i::boltzmann_scale")
def _fake_scale(
    grad_out: Tensor,  # [] wide
    share: Tensor | None,  # [] wide
    scale: Tensor | None,  # [] wide
    grad_z_hat: Tensor,  # any shape, wide or `dtype`
    grad_z: Tensor,  # likewise
    grad_scale: Tensor,  # [] wide
    grad_bias: Tensor,  # any shape, wide
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(grad_out),
        torch.empty_like(grad_z_hat, dtype=dtype),
        torch.empty_like(grad_z, dtype=dtype),
        torch.empty_like(grad_scale),
        torch.empty_like(grad_bias),
    )
