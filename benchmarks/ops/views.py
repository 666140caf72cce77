"""views beside torchvision's transforms, which cut the same views of the same decoded pictures.

    m3i-fast bench views [--device cuda] [--no-record]

`torchvision`: transforms.v2 on uint8 tensors, in the memory layout that its resize is fastest on.
`Pillow`: the same transforms on Pillow's images, to tensors at the end (on a CPU alone). All draw
their own parameters, by the same distributions, and all begin with decoded pictures in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import torch
from PIL import Image
from rich import box
from rich.table import Table
from torch import Tensor

from m3i_fast.benchmarks.core.command import read_command
from m3i_fast.benchmarks.core.harness import Device, Timing, measure, publish, resolve
from m3i_fast.benchmarks.core.torchvision_views import colour_transforms
from m3i_fast.config.data import ViewConfig
from m3i_fast.ops.views import draw_views, make_views, view_specs

SUBJECT = "views"
OURS, TORCHVISION, PILLOW = "m3i_fast", "torchvision", "Pillow"
HEIGHT, WIDTH = 375, 500  # pixels of ImageNet's most frequent picture

logger = logging.getLogger(__name__)

_PLAIN: dict[str, Any] = {"jitter_probability": 0.0, "gray_probability": 0.0}
_SSL: dict[str, Any] = {"blur_probability": 0.5, "solarize_probability": 0.1}
GLOBAL = ViewConfig(count=2, **_SSL)
CASES: dict[str, tuple[ViewConfig, ...]] = {
    "2 x 224, resize alone": (ViewConfig(count=2, **_PLAIN),),
    "2 x 224": (GLOBAL,),
    "2 x 224 + 8 x 96": (GLOBAL, ViewConfig(count=8, size=96, scale=(0.05, 0.3), **_SSL)),
    "2 x 64": (ViewConfig(count=2, size=64, **_SSL),),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    device: Device = "auto"
    """auto: the GPU where torch sees one."""
    batch_size: int = 16
    """Pictures of 375 x 500 pixels."""
    num_samples: int = 20
    """Samples of each function, interleaved."""
    num_threads: int = 1
    """Threads of ours and of torch; torchvision takes pictures one after the other."""
    record: bool = True
    """Append the rows to the ledger, benchmarks/results/views.jsonl."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_samples", "num_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


def pictures(batch: int) -> Tensor:  # [B, HEIGHT, WIDTH, 3] uint8
    """Return pictures whose colours change slowly, with a little noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, HEIGHT // 12, WIDTH // 12, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic") * 255
    noise = torch.randn(fine.shape, generator=generator) * 4
    return (fine + noise).clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()


def by_torchvision(cfg: ViewConfig) -> list[Callable[[Any], Any]]:
    """Return torchvision's transforms of a group of views."""
    v2 = import_module("torchvision.transforms.v2")
    modes = import_module("torchvision.transforms").InterpolationMode
    mode = modes.BICUBIC if cfg.interpolation == "cubic" else modes.BILINEAR
    return [
        v2.RandomResizedCrop(cfg.size, cfg.scale, cfg.ratio, interpolation=mode, antialias=True),
        v2.RandomHorizontalFlip(cfg.flip_probability),
        *colour_transforms(cfg),
    ]


def views_by(
    transforms: list[tuple[int, Callable[[Any], Any]]], images: list[Any]
) -> list[list[Any]]:
    """Return the views of each group: `count` times its transform of every picture."""
    return [
        [transform(image) for image in images for _ in range(count)]
        for count, transform in transforms
    ]


def make_functions(cfg: Config, groups: tuple[ViewConfig, ...]) -> dict[str, Callable[[], object]]:
    """Return the timed functions, over the same pictures."""
    device, batch = resolve(cfg.device), cfg.batch_size
    decoded = pictures(batch)
    specs = view_specs(*groups)
    sizes = torch.tensor([HEIGHT, WIDTH]).expand(batch, 1, 2).contiguous()
    offset = (torch.arange(batch) * decoded[0].numel()).view(batch, 1).to(device)
    pixels, device_sizes = decoded.flatten().to(device), sizes.to(device)
    position = torch.arange(batch)

    def ours() -> object:
        params = draw_views(sizes, position, seed=0, views=specs).to(device)
        return make_views(
            pixels, offset, device_sizes, params, views=specs, num_threads=cfg.num_threads
        )

    functions: dict[str, Callable[[], object]] = {OURS: ours}
    try:
        compose = import_module("torchvision.transforms.v2").Compose
    except ModuleNotFoundError:
        logger.warning("torchvision left out: it is not installed")
        return functions
    tensors = list(decoded.to(device).permute(0, 3, 1, 2))
    on_tensors = [(group.count, compose(by_torchvision(group))) for group in groups]
    functions[TORCHVISION] = lambda: views_by(on_tensors, tensors)
    if device == "cpu":
        to_tensor = import_module("torchvision.transforms.v2").PILToTensor()
        images = [Image.fromarray(image.numpy()) for image in decoded]
        on_images = [
            (group.count, compose([*by_torchvision(group), to_tensor])) for group in groups
        ]
        functions[PILLOW] = lambda: views_by(on_images, images)
    return functions


def figures_of(cfg: Config, views: str) -> dict[str, Any]:
    """Return one row's figures."""
    groups = CASES[views]
    device = resolve(cfg.device)
    timings = measure(make_functions(cfg, groups), device=device, num_samples=cfg.num_samples)
    ours = timings[OURS].median_ms
    return {
        "device": device,
        "num_threads": cfg.num_threads,
        "batch_size": cfg.batch_size,
        "picture": f"{HEIGHT} x {WIDTH}",
        "views": views,
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "times_slower_than_ours": {name: t.median_ms / ours for name, t in timings.items()},
        "view_ms": ours / (cfg.batch_size * sum(group.count for group in groups)),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    title = f"views on {rows[0]['device']}, {rows[0]['num_threads']} threads"
    shown = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("views", "", "ms a batch", "p20 - p80", "x ours", "ms a view"):
        shown.add_column(
            column, justify="left" if column in ("", "views") else "right", no_wrap=True
        )
    for row in rows:
        for name, timing in row["timings"].items():
            t = Timing(**timing)
            shown.add_row(
                row["views"],
                name,
                f"{t.median_ms:.3g}",
                f"{t.p20_ms:.3g} - {t.p80_ms:.3g}",
                f"{row['times_slower_than_ours'][name]:.2f}",
                f"{row['view_ms'] * row['times_slower_than_ours'][name]:.3f}",
            )
        shown.add_section()
    return shown


def main(argv: list[str] | None = None) -> None:
    cfg = read_command(Config, SUBJECT, argv)
    torch.set_num_threads(cfg.num_threads)
    publish(SUBJECT, (figures_of(cfg, views) for views in CASES), table, record=cfg.record)
