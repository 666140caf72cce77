"""dcnv3 beside the ways to compute it without a kernel of its own.

    m3i-fast bench dcnv3 [--device cuda] [--no-record]

`grid_sample`: normalised places, F.grid_sample for each group, a weighted sum, as the operator is
mostly written in plain torch. `torchvision`: deform_conv2d with a depthwise weight of ones.
`DCNv3` and `DCNv4`: InternImage's official extension and its successor's operator, where they are
installed. Inputs lie in each one's own layout before the clock starts. `copy`: a copy that moves as
many bytes as an ideal forward, which reads x, offset and mask once and writes the output once. What
is not installed or cannot run in a dtype is left out, and the log says why.

A CPU runs the layers of InternImage-T at 224 pixels, a GPU those that DCNv3 and DCNv4 were
published with and InternImage's own, with offsets of a trained network and with far ones.
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

from m3i_fast.benchmarks.core.command import read_command
from m3i_fast.benchmarks.core.harness import Device, measure, publish, ratio_table, resolve
from m3i_fast.benchmarks.ops.dcnv3_others import GEOMETRY, POINTS, others
from m3i_fast.ops import dcnv3

SUBJECT = "dcnv3"
OURS, COPY = "m3i_fast", "copy"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    batch_size: int
    height: int
    width: int
    channels: int
    groups: int

    def __str__(self) -> str:
        return f"{self.batch_size}x{self.height}x{self.width}x{self.channels} / {self.groups}"


def _sizes(*rows: tuple[int, int, int, int, int]) -> tuple[Size, ...]:
    return tuple(
        Size(batch_size=batch, height=height, width=width, channels=channels, groups=groups)
        for batch, height, width, channels, groups in rows
    )


CPU_SIZES = _sizes(
    (4, 56, 56, 64, 4), (4, 28, 28, 128, 8), (4, 14, 14, 256, 16), (4, 7, 7, 512, 32)
)
# 16 and 32 channels a group at each size, then InternImage's own layers: T, B, L, H, G.
GPU_SIZES = _sizes(
    *(
        (batch, height, width, channels, channels // group_size)
        for group_size in (16, 32)
        for batch, height, width, channels in (
            (64, 56, 56, 128),
            (64, 28, 28, 256),
            (64, 14, 14, 512),
            (64, 7, 7, 1024),
            (64, 14, 14, 768),
            (1, 200, 320, 128),
            (1, 100, 160, 256),
            (1, 50, 80, 512),
            (1, 25, 40, 1024),
            (1, 64, 64, 768),
        )
    ),
    (64, 56, 56, 64, 4),
    (64, 28, 28, 128, 8),
    (64, 14, 14, 256, 16),
    (64, 7, 7, 512, 32),
    (64, 56, 56, 112, 7),
    (64, 14, 14, 448, 28),
    (16, 96, 96, 160, 10),
    (16, 24, 24, 640, 40),
    (1, 160, 160, 320, 10),
    (1, 40, 40, 1280, 40),
    (1, 32, 32, 2048, 64),
    (1, 200, 334, 160, 10),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    device: Device = "auto"
    """auto: the GPU where torch sees one."""
    num_samples: int = 20
    """Samples of each function, interleaved."""
    record: bool = True
    """Append the rows to the ledger, benchmarks/results/dcnv3.jsonl."""

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples: expected at least 1, got {self.num_samples}")

    @property
    def rows(self) -> list[tuple[Size, torch.dtype, float]]:
        """Return what is measured: sizes, dtypes, and the deviation of the offsets in pixels."""
        if resolve(self.device) == "cpu":
            dtypes = torch.float32, torch.bfloat16, torch.float16
            return [(size, dtype, 1.5) for size in CPU_SIZES for dtype in dtypes]
        return [
            (size, dtype, reach)
            for size in GPU_SIZES
            for dtype in (torch.float16, torch.bfloat16)
            for reach in (1.5, 10.0)
        ]


# ---- What is timed -------------------------------------------------------------------------------


def make_functions(
    cfg: Config, size: Size, dtype: torch.dtype, reach: float, backward: bool
) -> dict[str, Callable[[], object]]:
    """Return the timed functions, over the same inputs; each gives the same output."""
    device = resolve(cfg.device)
    generator = torch.Generator(device).manual_seed(0)
    image = size.batch_size, size.height, size.width
    x, offset, mask, grad = (
        torch.randn(*image, channels, generator=generator, device=device)
        for channels in (
            size.channels,
            size.groups * POINTS * 2,
            size.groups * POINTS,
            size.channels,
        )
    )
    x, offset, mask, grad = (t.to(dtype) for t in (x, offset * reach, mask, grad))
    inputs = x, offset, mask
    ours: Callable[..., Tensor] = partial(dcnv3, **GEOMETRY, groups=size.groups)
    functions: dict[str, Callable[[], object]] = {
        OURS: _ready(ours, inputs, grad if backward else None)
    }
    expected = ours(*inputs)
    for name, other in others(size.groups).items():
        run = _ready(other.function, other.inputs(*inputs), other.grad(grad) if backward else None)
        try:
            out = other.out(run().detach())
        except (RuntimeError, TypeError) as error:  # a dtype, a device, another release's arguments
            logger.warning("%s in %s left out: %s", name, dtype, str(error).splitlines()[0])
            continue
        if dtype == torch.float32:  # plain torch's places are coarse in a half type
            torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
        functions[name] = run
    if not backward:
        source, target = (
            torch.ones(forward_bytes(size, dtype) // 2, dtype=torch.uint8, device=device)
            for _ in range(2)
        )
        functions[COPY] = lambda: target.copy_(source)
    return functions


def _ready(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], gradient: Tensor | None
) -> Callable[[], Tensor]:
    """Return a call over inputs of its own; with a gradient of the output, both passes."""
    leaves = [tensor.clone().requires_grad_(gradient is not None) for tensor in inputs]
    return partial(_run, function, leaves, gradient)


def _run(function: Callable[..., Tensor], leaves: list[Tensor], gradient: Tensor | None) -> Tensor:
    out = function(*leaves)
    if gradient is not None:
        torch.autograd.grad(out, leaves, gradient)
    return out


def forward_bytes(size: Size, dtype: torch.dtype) -> int:
    """Return the bytes of x, offset and mask read once and of the output written once."""
    pixels = size.batch_size * size.height * size.width
    return pixels * (2 * size.channels + 3 * size.groups * POINTS) * dtype.itemsize


# ---- Rows ----------------------------------------------------------------------------------------


def figures_of(
    cfg: Config, size: Size, dtype: torch.dtype, reach: float, backward: bool
) -> dict[str, Any]:
    timings = measure(
        make_functions(cfg, size, dtype, reach, backward),
        device=resolve(cfg.device),
        num_samples=cfg.num_samples,
        warmup_s=0.05 if resolve(cfg.device) == "cuda" else 0.2,  # of 128 rows on a GPU
    )
    milliseconds = timings[OURS].median_ms
    figures = {
        "device": resolve(cfg.device),
        "num_threads": torch.get_num_threads(),
        **asdict(size),
        "dtype": str(dtype).removeprefix("torch."),
        "offset_px": reach,
        "pass": "forward+backward" if backward else "forward",
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "times_slower_than_ours": {name: t.median_ms / milliseconds for name, t in timings.items()},
    }
    if not backward:
        figures["gb_s"] = forward_bytes(size, dtype) / (milliseconds * 1e6)
    return figures


def table(rows: list[dict[str, Any]]) -> Table:
    def label(row: dict[str, Any]) -> str:
        size = Size(**{name: row[name] for name in Size.__slots__})
        return f"{size}, {row['dtype']}, {row['offset_px']:g} px, {row['pass']}"

    return ratio_table(SUBJECT, "N x H x W x C / groups", rows, label)


def main(argv: list[str] | None = None) -> None:
    cfg = read_command(Config, SUBJECT, argv)
    rows = (
        figures_of(cfg, *row, backward=backward) for row in cfg.rows for backward in (False, True)
    )
    publish(SUBJECT, rows, table, record=cfg.record)
