"""A whole InternImage with our dcnv3 beside itself with a grid_sample core.

    m3i-fast bench internimage [--sizes t s b] [--batch-size 64] [--no-record]

`grid_sample`: the same model, weights and outputs, its sampling written with torch's grid_sample,
as the op is mostly written where its CUDA extension is not built. `no sampling`: the same model
again with the op left out, the least time that any op could reach. `op alone`: our op's calls of
one forward pass, on the inputs that it had there; its share is of the whole forward pass. Offsets
are about a pixel, as in a trained network; a fresh one samples whole pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from m3i_fast.benchmarks.core.command import read_command
from m3i_fast.benchmarks.core.harness import Device, Timing, measure, publish, resolve
from m3i_fast.config.models import internimage as internimage_config
from m3i_fast.config.models.internimage import InternImageConfig
from m3i_fast.models.internimage.deformable import DCNv3, SamplingCore
from m3i_fast.models.internimage.model import InternImage
from m3i_fast.ops import dcnv3
from m3i_fast.ops.grid_sample import dcnv3_by_grid_sample

SUBJECT = "internimage"
OURS, GRID, FREE, ALONE = "m3i_fast", "grid_sample", "no sampling", "op alone"
Size = Literal["demo", "t", "s", "b", "l", "xl", "h", "g"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    device: Device = "auto"
    """auto: the GPU where torch sees one."""
    sizes: tuple[Size, ...] = ("t",)
    """Models, one after another."""
    batch_size: int = 1
    """Images a call."""
    image_size: int = 224
    """Side of an image in pixels, a multiple of 32."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and images."""
    train: bool = False
    """Time forward and backward, in place of the forward pass."""
    num_samples: int = 20
    """Samples of each function, interleaved."""
    record: bool = True
    """Append the rows to the ledger, benchmarks/results/internimage.jsonl."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.image_size < 32 or self.image_size % 32:
            raise ValueError(f"image_size: expected a multiple of 32, got {self.image_size}")


def model_config(size: Size) -> InternImageConfig:
    return getattr(internimage_config, f"internimage_{size}")()


def build(cfg: Config, size: Size, core: SamplingCore) -> InternImage:
    """Build the model with the same weights for every core."""
    torch.manual_seed(0)
    with torch.device(resolve(cfg.device)):
        model = InternImage(model_config(size), core=core)
        for module in model.modules():
            if isinstance(module, DCNv3):
                for projection in (module.offset, module.mask):
                    nn.init.normal_(projection.weight, std=1.5 * projection.in_features**-0.5)
    return model.to(getattr(torch, cfg.dtype)).train(cfg.train)


def record_calls(cfg: Config, size: Size, images: Tensor) -> list[Callable[[], Tensor]]:
    """Return the op's calls of one forward pass, ready to be made again."""
    calls: list[Callable[[], Tensor]] = []

    def recording(x: Tensor, offset: Tensor, mask: Tensor, **geometry: Any) -> Tensor:
        inputs = (x.detach(), offset.detach(), mask.detach())
        calls.append(partial(dcnv3, *inputs, **geometry))
        return dcnv3(x, offset, mask, **geometry)

    with torch.no_grad():
        build(cfg, size, recording)(images)
    return calls


def make_functions(cfg: Config, size: Size) -> dict[str, Callable[[], object]]:
    """Return the timed functions, over the same images; both models give the same outputs."""
    side = cfg.image_size
    images = torch.randn(cfg.batch_size, 3, side, side, generator=torch.Generator().manual_seed(0))
    images = images.to(resolve(cfg.device), getattr(torch, cfg.dtype))
    cores: dict[str, SamplingCore] = {
        OURS: dcnv3,
        GRID: dcnv3_by_grid_sample,
        FREE: lambda x, offset, mask, **_: x + 0 * (offset.sum() + mask.sum()) if cfg.train else x,
    }
    models = {name: build(cfg, size, core) for name, core in cores.items()}
    with torch.no_grad():
        expected = models[GRID].eval()(images).float()
        got = models[OURS].eval()(images).float()
    tolerance = 1e-3 if cfg.dtype == "float32" else 0.1
    torch.testing.assert_close(
        got, expected, rtol=tolerance, atol=tolerance * float(expected.std())
    )
    functions: dict[str, Callable[[], object]] = {
        name: partial(_run, model.train(cfg.train), images) for name, model in models.items()
    }
    if not cfg.train:
        calls = record_calls(cfg, size, images)
        functions[ALONE] = lambda: [call() for call in calls]
    return functions


def _run(model: InternImage, images: Tensor) -> None:
    if not model.training:
        with torch.no_grad():
            model(images)
        return
    model(images).float().square().mean().backward()
    model.zero_grad(set_to_none=True)


def figures_of(cfg: Config, size: Size) -> dict[str, Any]:
    """Return a row's figures."""
    timings = measure(
        make_functions(cfg, size), device=resolve(cfg.device), num_samples=cfg.num_samples
    )
    ours = timings[OURS].median_ms
    settings = {k: v for k, v in asdict(cfg).items() if k not in ("sizes", "record", "num_samples")}
    return {
        **settings,
        "device": resolve(cfg.device),
        "num_threads": torch.get_num_threads(),
        "size": size,
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "images_per_s": {
            name: 1e3 * cfg.batch_size / t.median_ms for name, t in timings.items() if name != ALONE
        },
        "times_slower_than_ours": {name: t.median_ms / ours for name, t in timings.items()},
        "op_share": timings[ALONE].median_ms / ours if ALONE in timings else None,
    }


def table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    what = "forward and backward" if first["train"] else "forward"
    title = (
        f"InternImage {what} on {first['device']}, {first['num_threads']} threads, {first['dtype']}"
    )
    shown = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("model", "images", "", "ms", "p20 - p80", "images/s", "x ours"):
        justify: Literal["left", "right"] = "left" if column in ("model", "") else "right"
        shown.add_column(column, justify=justify, no_wrap=True)
    for row in rows:
        for name, timing in row["timings"].items():
            t = Timing(**timing)
            rate = row["images_per_s"].get(name)
            shown.add_row(
                row["size"].upper(),
                f"{row['batch_size']}x{row['image_size']}^2",
                name,
                f"{t.median_ms:.3g}",
                f"{t.p20_ms:.3g} - {t.p80_ms:.3g}",
                "" if rate is None else f"{rate:.3g}",
                f"{row['times_slower_than_ours'][name]:.2f}",
            )
        shown.add_section()
    return shown


def main(argv: list[str] | None = None) -> None:
    cfg = read_command(Config, SUBJECT, argv)
    rows = (figures_of(cfg, size) for size in cfg.sizes)
    publish(SUBJECT, rows, table, record=cfg.record)
