"""gaussian beside torch's layer_norm and mse_loss.

    m3i-fast bench gaussian [--device cuda] [--no-record]

`torch`: what the dense terms were before, in float32: the target is widened and layer-normalised,
the prediction widened, both subtracted. `same dtype`: layer_norm and mse_loss in the dtype of the
arguments, the least that plain torch does, with its rounding. `compiled`: the first of them through
torch.compile. `copy`: a copy that moves as many bytes as an ideal pass. Half of the rows are with
SiameseIM's decorrelation, whose products of matrices are torch's in every column.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from m3i_fast.benchmarks.core.command import read_command
from m3i_fast.benchmarks.core.harness import publish, ratio_table, resolve
from m3i_fast.benchmarks.ops.passes import (
    COPY,
    OURS,
    PassConfig,
    compiled,
    copy_of,
    expect_equal,
    timed,
)
from m3i_fast.ops import gaussian

SUBJECT = "gaussian"
DTYPES = (torch.float32, torch.bfloat16)
WEIGHTS = (0.0, 0.02)
SIGMA = 0.5**0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    batch_size: int
    queries: int
    width: int


# The demo's batch; ViT-B and ViT-L at 224 pixels, 128 images a GPU.
CPU_SIZES = (
    Size(batch_size=64, queries=64, width=192),
    Size(batch_size=32, queries=196, width=768),
)
GPU_SIZES = (
    Size(batch_size=128, queries=196, width=768),
    Size(batch_size=128, queries=196, width=1024),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(PassConfig):
    @property
    def sizes(self) -> tuple[Size, ...]:
        return GPU_SIZES if resolve(self.device) == "cuda" else CPU_SIZES


def in_dtype(
    z_hat: Tensor,  # [N, Q, D]
    z: Tensor,  # [N, Q, D]
    weight: float,
) -> Tensor:  # []
    """Return the likelihood by plain torch in its arguments' dtype."""
    z = F.layer_norm(z, z.shape[-1:])
    value = F.mse_loss(z_hat, z) / (2 * SIGMA**2)
    if not weight:
        return value
    p_RD, t_RD = z_hat.flatten(0, -2), z.flatten(0, -2)
    covariance_DD = t_RD.T @ t_RD / t_RD.shape[0]
    return value + weight * ((p_RD @ covariance_DD) * p_RD).sum(-1).mean() / p_RD.shape[-1]


def in_float32(
    z_hat: Tensor,  # [N, Q, D]
    z: Tensor,  # [N, Q, D]
    weight: float,
) -> Tensor:  # [] float32
    return in_dtype(z_hat.float(), z.float(), weight)


def by_ours(
    z_hat: Tensor,  # [N, Q, D]
    z: Tensor,  # [N, Q, D]
    weight: float,
) -> Tensor:  # [] float32
    return gaussian(z_hat, z, sigma=SIGMA, normalise=True, decorrelation_weight=weight)


def make_functions(
    cfg: Config, size: Size, dtype: torch.dtype, weight: float, backward: bool
) -> dict[str, Callable[[], object]]:
    """Return the timed functions, over the same inputs; each gives the same value."""
    device = resolve(cfg.device)
    generator = torch.Generator().manual_seed(0)
    shape = size.batch_size, size.queries, size.width
    z_hat, z = (
        torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(leaf and backward)
        for leaf in (True, False)
    )
    candidates = {OURS: by_ours, "torch": in_float32}
    if dtype != torch.float32:
        candidates["same dtype"] = in_dtype
    if cfg.compile:
        candidates["compiled"] = compiled(in_float32)
    expected = by_ours(z_hat, z, weight)

    def check(name: str, value: Tensor) -> None:
        tolerance = 1e-4 if name != "same dtype" else 0.02
        torch.testing.assert_close(value.float(), expected, rtol=tolerance, atol=0)

    runs = {name: partial(_run, f, z_hat, z, weight) for name, f in candidates.items()}
    copied = ideal_bytes(size, dtype, backward)
    return expect_equal(runs, check) | {COPY: copy_of(copied, device)}


def _run(function: Callable[..., Tensor], z_hat: Tensor, z: Tensor, weight: float) -> Tensor:
    value = function(z_hat, z, weight)
    if z_hat.requires_grad:
        torch.autograd.grad(value, z_hat)
    return value


def ideal_bytes(size: Size, dtype: torch.dtype, backward: bool) -> int:
    """Return the fewest bytes: both arguments read once a pass, and the gradient written."""
    elements = size.batch_size * size.queries * size.width
    return elements * dtype.itemsize * (5 if backward else 2)


# ---- Rows ----------------------------------------------------------------------------------------


def figures_of(
    cfg: Config, size: Size, dtype: torch.dtype, weight: float, backward: bool
) -> dict[str, Any]:
    functions = make_functions(cfg, size, dtype, weight, backward)
    return {
        **asdict(size),
        "dtype": str(dtype).removeprefix("torch."),
        "decorrelation_weight": weight,
        "pass": "forward+backward" if backward else "forward",
        **timed(cfg, functions, ideal_bytes(size, dtype, backward)),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    def label(row: dict[str, Any]) -> str:
        size = f"{row['batch_size']}x{row['queries']}x{row['width']}"
        return f"{size}, {row['dtype']}, {row['pass']}, {row['decorrelation_weight']:g}"

    return ratio_table(SUBJECT, "N x Q x D, decorrelation weight", rows, label)


def main(argv: list[str] | None = None) -> None:
    cfg = read_command(Config, SUBJECT, argv)
    rows = (
        figures_of(cfg, size, dtype, weight, backward)
        for size in cfg.sizes
        for dtype in DTYPES
        for weight in WEIGHTS
        for backward in (False, True)
    )
    publish(SUBJECT, rows, table, record=cfg.record)
