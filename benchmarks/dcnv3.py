"""dcnv3 beside the ways to compute it without a kernel of its own.

    python -m m3i_fast.benchmarks.dcnv3 [--device cuda] [--no-record]

`grid_sample`: normalised places, F.grid_sample for each group, a weighted sum, as the operator is
mostly written in plain torch. `torchvision`: deform_conv2d with a depthwise weight of ones; its
inputs lie in its own layout before the clock starts. `copy`: a copy that moves as many bytes as an
ideal forward, which reads x, offset and mask once and writes the output once. A function that
cannot run in a dtype is left out, and the log says why.

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
import tyro
from rich import box
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from m3i_fast.benchmarks.harness import Device, Timing, measure, publish, resolve
from m3i_fast.ops import dcnv3

SUBJECT = "dcnv3"
OURS, COPY = "m3i_fast", "copy"
KERNEL, POINTS = 3, 9
GEOMETRY: dict[str, Any] = {"kernel_size": KERNEL, "stride": 1, "padding": 1, "dilation": 1}

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
        """What is measured: sizes, dtypes, and the deviation of the offsets in pixels."""
        if resolve(self.device) == "cpu":
            dtypes = torch.float32, torch.bfloat16
            return [(size, dtype, 1.5) for size in CPU_SIZES for dtype in dtypes]
        return [
            (size, dtype, reach)
            for size in GPU_SIZES
            for dtype in (torch.float16, torch.bfloat16)
            for reach in (1.5, 10.0)
        ]


# ---- What is timed -------------------------------------------------------------------------------


def by_grid_sample(
    x: Tensor,  # [N, H, W, C]
    offset: Tensor,  # [N, H, W, G*K*2] (x, y)
    mask: Tensor,  # [N, H, W, G*K]
    *,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    offset_scale: float = 1.0,
    softmax: bool = False,
) -> Tensor:  # [N, H, W, C]
    """dcnv3 in torch, where it keeps the size: all samples are written to memory, then summed."""
    if stride != 1 or 2 * padding != dilation * (kernel_size - 1):
        raise ValueError("expected a stride and padding that keep the size")
    batch, height, width, channels = x.shape
    reach = torch.arange(kernel_size, device=x.device, dtype=x.dtype) * dilation - padding
    if offset_scale != 1:
        reach, offset = reach * offset_scale, offset * offset_scale
    column, row = (
        torch.arange(size, device=x.device, dtype=x.dtype)[:, None] + reach
        for size in (width, height)
    )  # [W, kernel], [H, kernel]
    window = torch.stack(
        torch.broadcast_tensors(column[None, :, :, None], row[:, None, None, :]), dim=-1
    )  # points column by column
    place = window.reshape(height, width, 1, -1, 2) + offset.unflatten(-1, (groups, -1, 2))
    place = (2 * place + 1) / place.new_tensor([width, height]) - 1  # of align_corners=False
    place = place.permute(0, 3, 1, 2, 4, 5).reshape(batch * groups, height * width, -1, 2)
    image = x.permute(0, 3, 1, 2).reshape(batch * groups, -1, height, width)
    sample = F.grid_sample(image, place, align_corners=False)
    mask = mask.unflatten(-1, (groups, -1))
    weight = mask.softmax(-1) if softmax else mask
    weight = weight.permute(0, 3, 1, 2, 4).reshape(batch * groups, 1, height * width, -1)
    out = (sample * weight).sum(-1).view(batch, channels, height, width)
    return out.permute(0, 2, 3, 1)


def torchvision_inputs(inputs: tuple[Tensor, ...], groups: int) -> tuple[Tensor, ...]:
    """In deform_conv2d's layout: channels first, (y, x), points row by row."""
    x, offset, mask = inputs
    shape = *x.shape[:3], groups, KERNEL, KERNEL
    offset = offset.view(*shape, 2).flip(-1).permute(0, 3, 5, 4, 6, 1, 2).flatten(1, 4)
    mask = mask.view(shape).permute(0, 3, 5, 4, 1, 2).flatten(1, 3)
    return tuple(tensor.contiguous() for tensor in (x.permute(0, 3, 1, 2), offset, mask))


def by_torchvision(x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
    """[N, C, H, W] of deform_conv2d's inputs."""
    weight = x.new_ones(x.shape[1], 1, KERNEL, KERNEL)
    return deform_conv2d(x, offset, weight, padding=1, mask=mask)


def make_functions(
    cfg: Config, size: Size, dtype: torch.dtype, reach: float, backward: bool
) -> dict[str, Callable[[], object]]:
    """Forward, or forward and backward, over the same inputs; each gives the same output."""
    generator = torch.Generator().manual_seed(0)
    image = size.batch_size, size.height, size.width
    x, offset, mask, grad = (
        torch.randn(*image, channels, generator=generator)
        for channels in (
            size.channels,
            size.groups * POINTS * 2,
            size.groups * POINTS,
            size.channels,
        )
    )
    device = resolve(cfg.device)
    x, offset, mask, grad = (t.to(device, dtype) for t in (x, offset * reach, mask, grad))
    inputs = x, offset, mask
    theirs = torchvision_inputs(inputs, size.groups)
    ours: Callable[..., Tensor] = partial(dcnv3, **GEOMETRY, groups=size.groups)
    candidates: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], Tensor]] = {
        OURS: (ours, inputs, grad),
        "grid_sample": (partial(by_grid_sample, **GEOMETRY, groups=size.groups), inputs, grad),
        "torchvision": (by_torchvision, theirs, grad.permute(0, 3, 1, 2).contiguous()),
    }
    functions: dict[str, Callable[[], object]] = {}
    expected = ours(*inputs)
    for name, (function, tensors, gradient) in candidates.items():
        leaves = [tensor.clone().requires_grad_(backward) for tensor in tensors]
        run = partial(_run, function, leaves, gradient if backward else None)
        try:
            out = run().detach()
        except RuntimeError as error:
            logger.warning("%s in %s left out: %s", name, dtype, str(error).splitlines()[0])
            continue
        out = out.permute(0, 2, 3, 1) if name == "torchvision" else out
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


def _run(function: Callable[..., Tensor], leaves: list[Tensor], gradient: Tensor | None) -> Tensor:
    out = function(*leaves)
    if gradient is not None:
        torch.autograd.grad(out, leaves, gradient)
    return out


def forward_bytes(size: Size, dtype: torch.dtype) -> int:
    """x, offset and mask read once, the output written once."""
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
    title = f"dcnv3 on {rows[0]['device']}, {rows[0]['num_threads']} threads"
    shown = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("N x H x W x C / groups", no_wrap=True)
    for column in ("ms", "p20 - p80", "x ours"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        size = Size(**{name: row[name] for name in Size.__slots__})
        shown.add_row(f"{size}, {row['dtype']}, {row['offset_px']:g} px, {row['pass']}")
        for name, timing in row["timings"].items():
            t = Timing(**timing)
            shown.add_row(
                f"  {name}",
                f"{t.median_ms:.3g}",
                f"{t.p20_ms:.3g} - {t.p80_ms:.3g}",
                f"{row['times_slower_than_ours'][name]:.2f}",
            )
        shown.add_section()
    return shown


def main(argv: list[str] | None = None) -> None:
    cfg = tyro.cli(Config, prog="python -m m3i_fast.benchmarks.dcnv3", args=argv)
    rows = [
        figures_of(cfg, *row, backward=backward) for row in cfg.rows for backward in (False, True)
    ]
    publish(SUBJECT, rows, table(rows), record=cfg.record)


if __name__ == "__main__":
    main()
