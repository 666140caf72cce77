"""mask_mix beside the torch expressions that it replaces.

    m3i-fast bench mask_mix [--device cuda] [--no-record]

`torch`: normalise every view in floating point, then choose pixels (the reference, as it is mostly
written). `bytes first`: choose bytes, then normalise, the least work in plain torch. `compiled`:
that through torch.compile. `copy`: the output's bytes from as many others into memory that is
there already, what memory allows. All others allocate their output, as in training: on the CPU
glibc maps one above 32 MiB afresh at every call, and its page faults can outlast the mixing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from m3i_fast.benchmarks.core.command import read_command
from m3i_fast.benchmarks.core.harness import Device, Timing, measure, publish, resolve
from m3i_fast.ops import IMAGENET_MEAN, IMAGENET_STD, mask_mix, reference

SUBJECT = "mask_mix"
OURS, COPY = "m3i_fast", "copy"
DTYPES = (torch.float32, torch.bfloat16)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    image_size: int
    patch_size: int


SIZES = (Size(image_size=64, patch_size=8), Size(image_size=224, patch_size=16))


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    device: Device = "auto"
    """auto: the GPU where torch sees one."""
    batch_size: int = 64
    """Views, and as many pictures mixed of two."""
    num_samples: int = 50
    """Samples of each function, interleaved."""
    compile: bool = True
    """Also time the expression through torch.compile; where that fails, the reason is logged."""
    record: bool = True
    """Append the rows to the ledger, benchmarks/results/mask_mix.jsonl."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


def bytes_first(
    views: Tensor,  # [B, 3, H, W] uint8
    choice: Tensor,  # [P, h, w] uint8, 0 or 1
    members: Tensor,  # [P, 2] int64
    scale: Tensor,  # [3, 1, 1] float32
    shift: Tensor,  # [3, 1, 1] float32
    dtype: torch.dtype,
) -> Tensor:  # [P, 3, H, W] dtype
    """Return the views by the least that plain torch does: bytes chosen, one multiply-add."""
    height, width = views.shape[2:]
    first = choice == 0
    first = first.repeat_interleave(height // choice.shape[1], dim=1)
    first = first.repeat_interleave(width // choice.shape[2], dim=2)
    mixed = torch.where(first[:, None], views[members[:, 0]], views[members[:, 1]])
    return torch.addcmul(shift, mixed.float(), scale).to(dtype)


def make_functions(cfg: Config, size: Size, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Return the timed functions, over the same inputs; all that mix give the same pictures."""
    device, batch = resolve(cfg.device), cfg.batch_size
    generator = torch.Generator().manual_seed(0)
    image, cells = (size.image_size,) * 2, (size.image_size // size.patch_size,) * 2
    views = torch.randint(256, (batch, 3, *image), dtype=torch.uint8, generator=generator)
    choice = torch.randint(2, (batch, *cells), dtype=torch.uint8, generator=generator)
    members = torch.randint(batch, (batch, 2), generator=generator)
    inputs = views.to(device), choice.to(device), members.to(device)
    std = torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)
    scale = 1 / (255 * std)
    shift = -torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1) / std

    ours = mask_mix(*inputs, dtype=dtype)
    source, target = ours.clone(), ours.clone()
    functions: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: mask_mix(*inputs, dtype=dtype),
        "torch": lambda: reference.mask_mix(*inputs, dtype=dtype),
        "bytes first": lambda: bytes_first(*inputs, scale, shift, dtype),
        COPY: lambda: target.copy_(source),
    }
    if cfg.compile:
        torch._dynamo.reset()  # or another size would make it compile for any size, slower
        compiled = torch.compile(bytes_first, fullgraph=True, dynamic=False)
        functions["compiled"] = lambda: compiled(*inputs, scale, shift, dtype)
    for name in [name for name in functions if name != COPY]:
        try:
            result = functions[name]()
        except torch._dynamo.exc.BackendCompilerFailed as error:  # no C++ compiler, say
            logger.warning("%s left out: %s", name, str(error).splitlines()[0])
            del functions[name]
            continue
        torch.testing.assert_close(result, ours, rtol=0, atol=1e-5 if ours.itemsize == 4 else 0.02)
    return functions


def figures_of(cfg: Config, size: Size, dtype: torch.dtype) -> dict[str, Any]:
    """One row's figures. Bytes: each output pixel is written once and read once, as a byte."""
    timings = measure(
        make_functions(cfg, size, dtype),
        device=resolve(cfg.device),
        num_samples=cfg.num_samples,
    )
    num_pixels = cfg.batch_size * 3 * size.image_size**2
    ours = timings[OURS].median_ms
    return {
        "device": resolve(cfg.device),
        "num_threads": torch.get_num_threads(),
        "batch_size": cfg.batch_size,
        **asdict(size),
        "dtype": str(dtype).removeprefix("torch."),
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "times_slower_than_ours": {name: t.median_ms / ours for name, t in timings.items()},
        "gb_s": num_pixels * (1 + dtype.itemsize) / (ours * 1e6),
        "copy_gb_s": num_pixels * 2 * dtype.itemsize / (timings[COPY].median_ms * 1e6),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    title = f"mask_mix on {rows[0]['device']}, {rows[0]['num_threads']} threads"
    shown = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("views", "dtype", "", "ms", "p20 - p80", "x ours", "GB/s"):
        shown.add_column(
            column, justify="left" if column in ("", "dtype") else "right", no_wrap=True
        )
    for row in rows:
        for name, timing in row["timings"].items():
            t = Timing(**timing)
            bandwidth = {OURS: f"{row['gb_s']:.1f}", COPY: f"{row['copy_gb_s']:.1f}"}.get(name, "")
            shown.add_row(
                f"{row['batch_size']}x{row['image_size']}^2",
                row["dtype"],
                name,
                f"{t.median_ms:.3g}",
                f"{t.p20_ms:.3g} - {t.p80_ms:.3g}",
                f"{row['times_slower_than_ours'][name]:.2f}",
                bandwidth,
            )
        shown.add_section()
    return shown


def main(argv: list[str] | None = None) -> None:
    cfg = read_command(Config, SUBJECT, argv)
    rows = (figures_of(cfg, size, dtype) for size in SIZES for dtype in DTYPES)
    publish(SUBJECT, rows, table, record=cfg.record)
