"""add_layer_norm beside torch's sum, layer_norm and cast.

    m3i-fast bench add_layer_norm [--device cuda] [--no-record]

`torch`: what a pre-norm block was before: the branch is added, in float32, the sum normalised, and
the norm cast to the dtype of the products. `compiled`: the same through torch.compile. `copy`: a
copy that moves as many bytes as an ideal pass.
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
from m3i_fast.ops import add_layer_norm

SUBJECT = "add_layer_norm"
DTYPES = (torch.float32, torch.bfloat16)  # of the branch and the norm; the stream is float32
EPS = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    batch_size: int
    tokens: int
    width: int


# The demo's batch and ViT-S; ViT-B and ViT-L at 224 pixels, 128 images a GPU.
CPU_SIZES = (
    Size(batch_size=64, tokens=64, width=192),
    Size(batch_size=32, tokens=196, width=384),
)
GPU_SIZES = (
    Size(batch_size=128, tokens=196, width=768),
    Size(batch_size=128, tokens=196, width=1024),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(PassConfig):
    @property
    def sizes(self) -> tuple[Size, ...]:
        return GPU_SIZES if resolve(self.device) == "cuda" else CPU_SIZES


def by_torch(
    x: Tensor,  # [B, T, D] fp32
    branch: Tensor,  # [B, T, D]
    weight: Tensor,  # [D]
    bias: Tensor,  # [D]
) -> tuple[Tensor, Tensor]:  # [B, T, D] fp32, [B, T, D]
    """Return the sum and its norm by plain torch."""
    total = x + branch
    return total, F.layer_norm(total, weight.shape, weight, bias, EPS).to(branch.dtype)


def by_ours(
    x: Tensor,  # [B, T, D] fp32
    branch: Tensor,  # [B, T, D]
    weight: Tensor,  # [D]
    bias: Tensor,  # [D]
) -> tuple[Tensor, Tensor]:  # [B, T, D] fp32, [B, T, D]
    return add_layer_norm(x, branch, weight, bias, eps=EPS, dtype=branch.dtype)


def make_functions(
    cfg: Config, size: Size, dtype: torch.dtype, backward: bool
) -> dict[str, Callable[[], object]]:
    """Return the timed functions, over the same inputs; each gives the same values."""
    device = resolve(cfg.device)
    rng = torch.Generator().manual_seed(0)
    shape = size.batch_size, size.tokens, size.width
    x, of_sum = (torch.randn(shape, generator=rng).to(device) for _ in range(2))
    branch, of_norm = (torch.randn(shape, generator=rng).to(device, dtype) for _ in range(2))
    weight, bias = (torch.randn(size.width, generator=rng).to(device) for _ in range(2))
    inputs = [t.requires_grad_(backward) for t in (x, branch, weight, bias)]
    candidates = {OURS: by_ours, "torch": by_torch}
    if cfg.compile:
        candidates["compiled"] = compiled(by_torch)
    expected = _run(by_ours, inputs, (of_sum, of_norm))

    def check(_: str, values: tuple[Tensor, ...]) -> None:
        for value, other in zip(values, expected, strict=True):
            half = value.dtype != torch.float32
            scale = other.abs().max().item()
            torch.testing.assert_close(value, other, rtol=1e-2 * half, atol=1e-4 * scale)

    runs = {name: partial(_run, f, inputs, (of_sum, of_norm)) for name, f in candidates.items()}
    copied = ideal_bytes(size, dtype, backward)
    return expect_equal(runs, check) | {COPY: copy_of(copied, device)}


def _run(
    function: Callable[..., tuple[Tensor, Tensor]],
    inputs: list[Tensor],
    grads: tuple[Tensor, Tensor],
) -> tuple[Tensor, ...]:
    values = function(*inputs)
    return torch.autograd.grad(values, inputs, grads) if inputs[0].requires_grad else values


def ideal_bytes(size: Size, dtype: torch.dtype, backward: bool) -> int:
    """Return the fewest bytes of a pass.

    Forward stream and branch are read, sum and norm written; backward the sum and both gradients
    are read, and those of the stream and, in another dtype, the branch written.
    """
    forward = 2 * 4 + 2 * dtype.itemsize
    own = dtype.itemsize if dtype != torch.float32 else 0
    each = forward + (3 * 4 + dtype.itemsize + own) * backward
    return size.batch_size * size.tokens * size.width * each


# ---- Rows ----------------------------------------------------------------------------------------


def figures_of(cfg: Config, size: Size, dtype: torch.dtype, backward: bool) -> dict[str, Any]:
    functions = make_functions(cfg, size, dtype, backward)
    return {
        **asdict(size),
        "dtype": str(dtype).removeprefix("torch."),
        "pass": "forward+backward" if backward else "forward",
        **timed(cfg, functions, ideal_bytes(size, dtype, backward)),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    def label(row: dict[str, Any]) -> str:
        size = f"{row['batch_size']}x{row['tokens']}x{row['width']}"
        return f"{size}, {row['dtype']}, {row['pass']}"

    return ratio_table(SUBJECT, "B x T x D, dtype of the branch", rows, label)


def main(argv: list[str] | None = None) -> None:
    cfg = read_command(Config, SUBJECT, argv)
    rows = (
        figures_of(cfg, size, dtype, backward)
        for size in cfg.sizes
        for dtype in DTYPES
        for backward in (False, True)
    )
    publish(SUBJECT, rows, table, record=cfg.record)
