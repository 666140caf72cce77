"""A whole InternImage with our dcnv3 beside itself with a grid_sample core.

    python -m m3i_fast.benchmarks.internimage [--sizes t s b] [--batch-size 64] [--no-record]

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
import torch.nn.functional as F
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from m3i_fast.benchmarks.harness import Timing, append_row, measure
from m3i_fast.models import internimage_config
from m3i_fast.models.deformable import DCNv3, SamplingCore
from m3i_fast.models.internimage import InternImage
from m3i_fast.models.internimage_config import InternImageConfig
from m3i_fast.ops import dcnv3

SUBJECT = "internimage"
OURS, GRID, FREE, ALONE = "m3i_fast", "grid_sample", "no sampling", "op alone"
Size = Literal["demo", "t", "s", "b", "l", "xl", "h", "g"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    device: Literal["auto", "cpu", "cuda"] = "auto"
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

    @property
    def resolved_device(self) -> str:
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"


def grid_sample_core(
    x: Tensor,  # [N, H, W, C]
    offset: Tensor,  # [N, H, W, G*K*2] (x, y) pairs
    mask: Tensor,  # [N, H, W, G*K] logits
    *,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    offset_scale: float,
    softmax: bool,
) -> Tensor:  # [N, H, W, C]
    """dcnv3 as InternImage calls it, in torch: every sample is written to memory, then summed."""
    batch, height, width, channels = x.shape
    if not softmax or stride != 1 or 2 * padding != dilation * (kernel_size - 1):
        raise ValueError("expected softmax = True and a stride and padding that keep the size")
    reach = torch.arange(kernel_size, device=x.device) * dilation - padding
    column, row = torch.meshgrid(reach, reach, indexing="ij")  # points column by column
    kernel = torch.stack([column, row], -1).view(-1, 2)  # [K, 2]
    extent = torch.tensor([width, height], device=x.device, dtype=x.dtype)
    cells = torch.stack(
        torch.meshgrid(
            torch.arange(width, device=x.device),
            torch.arange(height, device=x.device),
            indexing="xy",
        ),
        -1,
    )  # [H, W, 2]
    place = (
        cells[:, :, None, None] + (offset.unflatten(-1, (groups, -1, 2)) + kernel) * offset_scale
    )
    grid = (2 * place + 1) / extent - 1  # [N, H, W, G, K, 2]
    grid = grid.permute(0, 3, 1, 2, 4, 5).reshape(batch * groups, height * width, -1, 2)
    pictures = x.unflatten(-1, (groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)
    samples = F.grid_sample(pictures, grid.to(x.dtype), align_corners=False)  # [N G, D, H W, K]
    weight = mask.unflatten(-1, (groups, -1)).softmax(-1)  # [N, H, W, G, K]
    weight = weight.permute(0, 3, 1, 2, 4).reshape(batch * groups, 1, height * width, -1)
    summed = (samples * weight).sum(-1).view(batch, channels, height, width)
    return summed.permute(0, 2, 3, 1).contiguous()


def model_config(size: Size) -> InternImageConfig:
    return getattr(internimage_config, f"internimage_{size}")()


def build(cfg: Config, size: Size, core: SamplingCore) -> InternImage:
    """The same weights for every core."""
    torch.manual_seed(0)
    with torch.device(cfg.resolved_device):
        model = InternImage(model_config(size), core=core)
        for module in model.modules():
            if isinstance(module, DCNv3):
                for projection in (module.offset, module.mask):
                    nn.init.normal_(projection.weight, std=1.5 * projection.in_features**-0.5)
    return model.to(getattr(torch, cfg.dtype)).train(cfg.train)


def record_calls(cfg: Config, size: Size, images: Tensor) -> list[Callable[[], Tensor]]:
    """The op's calls of one forward pass, ready to be made again."""
    calls: list[Callable[[], Tensor]] = []

    def recording(x: Tensor, offset: Tensor, mask: Tensor, **geometry: Any) -> Tensor:
        inputs = (x.detach(), offset.detach(), mask.detach())
        calls.append(partial(dcnv3, *inputs, **geometry))
        return dcnv3(x, offset, mask, **geometry)

    with torch.no_grad():
        build(cfg, size, recording)(images)
    return calls


def make_functions(cfg: Config, size: Size) -> dict[str, Callable[[], object]]:
    """Everything that is timed, over the same images; both real models give the same outputs."""
    side = cfg.image_size
    images = torch.randn(cfg.batch_size, 3, side, side, generator=torch.Generator().manual_seed(0))
    images = images.to(cfg.resolved_device, getattr(torch, cfg.dtype))
    cores: dict[str, SamplingCore] = {
        OURS: dcnv3,
        GRID: grid_sample_core,
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
    """One row's figures."""
    timings = measure(
        make_functions(cfg, size), device=cfg.resolved_device, num_samples=cfg.num_samples
    )
    ours = timings[OURS].median_ms
    settings = {k: v for k, v in asdict(cfg).items() if k not in ("sizes", "record", "num_samples")}
    return {
        **settings,
        "device": cfg.resolved_device,
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
    cfg = tyro.cli(Config, prog="python -m m3i_fast.benchmarks.internimage", args=argv)
    rows = [figures_of(cfg, size) for size in cfg.sizes]
    console = Console()
    console.print(table(rows))
    if cfg.record:
        paths = {append_row(SUBJECT, row) for row in rows}
        console.print(f"{len(rows)} rows appended to {', '.join(map(str, paths))}", soft_wrap=True)


if __name__ == "__main__":
    main()
