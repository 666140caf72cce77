"""add_layer_norm beside torch's sum, layer_norm and cast.

    m3i-fast bench add_layer_norm [--device cuda] [--no-record]

`torch`: what a pre-norm block was before: the branch is added, in float32, the sum normalised, and
the norm cast to the dtype of the products. `compiled`: the same through torch.compile. `copy`: a
copy that moves as many bytes as an ideal pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from m3i_fast.benchmarks.core.command import read_command
from m3i_fast.benchmarks.core.harness import Device, measure, publish, ratio_table, resolve
from m3i_fast.ops import add_layer_norm

SUBJECT = "add_layer_norm"
OURS, COPY = "m3i_fast", "copy"
DTYPES = (torch.float32, torch.bfloat16)  # of the branch and the norm; the stream is float32
EPS = 1e-6

logger = logging.getLogger(__name__)


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
class Config:
    device: Device = "auto"
    """auto: the GPU where torch sees one."""
    num_samples: int = 50
    """Samples of each function, interleaved."""
    compile: bool = True
    """Also time the expression through torch.compile; where that fails, the reason is logged."""
    record: bool = True
    """Append the rows to the ledger, benchmarks/results/add_layer_norm.jsonl."""

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples: expected at least 1, got {self.num_samples}")

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
        torch._dynamo.reset()  # or another size would make it compile for any size, slower
        candidates["compiled"] = torch.compile(by_torch, fullgraph=True, dynamic=False)
    functions: dict[str, Callable[[], object]] = {}
    expected = _run(by_ours, inputs, (of_sum, of_norm))
    for name, function in candidates.items():
        run = partial(_run, function, inputs, (of_sum, of_norm))
        try:
            values = run()
        except torch._dynamo.exc.BackendCompilerFailed as error:  # no C++ compiler, say
            logger.warning("%s left out: %s", name, str(error).splitlines()[0])
            continue
        for value, other in zip(values, expected, strict=True):
            half = value.dtype != torch.float32
            scale = other.abs().max().item()
            torch.testing.assert_close(value, other, rtol=1e-2 * half, atol=1e-4 * scale)
        functions[name] = run
    source, target = (
        torch.ones(ideal_bytes(size, dtype, backward) // 2, dtype=torch.uint8, device=device)
        for _ in range(2)
    )
    functions[COPY] = lambda: target.copy_(source)
    return functions


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
    timings = measure(
        make_functions(cfg, size, dtype, backward),
        device=resolve(cfg.device),
        num_samples=cfg.num_samples,
    )
    milliseconds = timings[OURS].median_ms
    num_bytes = ideal_bytes(size, dtype, backward)
    return {
        "device": resolve(cfg.device),
        "num_threads": torch.get_num_threads(),
        **asdict(size),
        "dtype": str(dtype).removeprefix("torch."),
        "pass": "forward+backward" if backward else "forward",
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "times_slower_than_ours": {name: t.median_ms / milliseconds for name, t in timings.items()},
        "gb_s": num_bytes / (milliseconds * 1e6),
        "copy_gb_s": num_bytes / (timings[COPY].median_ms * 1e6),
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
