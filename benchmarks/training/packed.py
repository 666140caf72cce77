"""Pictures of any size and aspect through a ViT, packed, beside padding them to one length.

    m3i-fast bench packed [--num-pictures 64] [--no-record]

One batch, forward and backward of the same encoder, to the same loss and gradients, which are
compared before they are timed. `m3i_fast`: `ViT.encode_pictures`, sequences behind one another,
each attending to itself alone. `padded`: every picture to the length of the longest, with a key
mask. `bucketed`: sorted by length and dealt to buckets of as many pictures each, every bucket
padded to its longest and computed by itself. Heights and widths are drawn uniformly, in pixels,
again where the aspect is outside 1:2 to 2:1, and rounded to patches. Tokens a second are those of
pictures; padding counts for nothing. Memory is what one forward and backward pass adds at its peak.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from torch import Tensor

from m3i_fast.benchmarks.core.command import read_command
from m3i_fast.benchmarks.core.harness import Device, Timing, measure, publish, resolve
from m3i_fast.benchmarks.core.peak_memory import measure_peak
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.models.transformer.layers import Residual
from m3i_fast.models.transformer.positions import cells_of_grids, resample_to_grids
from m3i_fast.models.transformer.vit import ViT

SUBJECT = "packed"
OURS, PADDED, BUCKETED = "m3i_fast", "padded", "bucketed"
MOST_ASPECT = 2.0
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
ALIKE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of gradients, beside their norm


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    device: Device = "auto"
    """auto: the GPU where torch sees one, and there bf16; a CPU computes in fp32."""
    num_pictures: int = 64
    """Pictures of the batch."""
    sides: tuple[int, int] = (64, 224)
    """Least and most pixels of a picture's height and width."""
    dim: int = 192
    """Width of the encoder, of heads of 64."""
    depth: int = 12
    """Its blocks."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    num_buckets: int = 4
    """Buckets of `bucketed`."""
    num_samples: int = 10
    """Samples of each function, interleaved."""
    record: bool = True
    """Append the row to the ledger, benchmarks/results/packed.jsonl."""

    def __post_init__(self) -> None:
        for name in ("num_pictures", "depth", "patch_size", "num_buckets", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.dim < 64 or self.dim % 64:
            raise ValueError(f"dim: expected a multiple of 64, got {self.dim}")
        low, high = self.sides
        if not self.patch_size <= low <= high:
            raise ValueError(
                f"sides: expected patch_size = {self.patch_size} <= low <= high, got {low} {high}"
            )


def draw_grids(cfg: Config) -> Tensor:  # [N, 2] int64
    """Draw the rows and columns of patches of the pictures, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    low, high = cfg.sides
    found: list[list[int]] = []
    while len(found) < cfg.num_pictures:
        sides = torch.rand(2, generator=generator, dtype=torch.float64) * (high - low) + low
        if float(sides.max() / sides.min()) <= MOST_ASPECT:
            found.append((sides / cfg.patch_size).round().long().tolist())
    return torch.tensor(found)


class Pictures:
    """Pictures as patches, the encoder, and the weights of a loss over all of their cells."""

    def __init__(self, cfg: Config, grids: Tensor, device: str) -> None:
        generator = torch.Generator().manual_seed(1)
        torch.manual_seed(0)
        vision = ViTConfig(
            image_size=cfg.sides[1] // cfg.patch_size * cfg.patch_size,
            patch_size=cfg.patch_size,
            dim=cfg.dim,
            depth=cfg.depth,
            num_heads=cfg.dim // 64,
        )
        self.vit = ViT(vision).to(device)
        self.grids, self.device = grids, device
        self.lengths: list[int] = grids.prod(1).tolist()
        num_tokens, size = sum(self.lengths), 3 * cfg.patch_size**2
        self.patches = torch.randn(num_tokens, size, generator=generator).to(device)
        self.weights = torch.randn(num_tokens, cfg.dim, generator=generator).to(device)

    def run(self, cells: Callable[[], list[tuple[Tensor, Tensor]]]) -> Callable[[], Tensor]:
        """Return a forward and backward pass; cells: tokens [n, D] and the cells that they are."""

        def step() -> Tensor:
            self.vit.zero_grad()
            with torch.autocast(self.device, DTYPE["cuda"], enabled=self.device == "cuda"):
                found = cells()
            loss = torch.stack([(x.float() * self.weights[at]).sum() for x, at in found]).sum()
            loss = loss / len(self.patches)
            loss.backward()
            return loss.detach()

        return step

    def packed(self) -> list[tuple[Tensor, Tensor]]:
        tokens = self.vit.encode_pictures(self.patches, self.grids).cells
        return [(tokens, torch.arange(len(tokens), device=self.device))]

    def padded(self, num_buckets: int) -> Callable[[], list[tuple[Tensor, Tensor]]]:
        """Return the encoder's call on buckets of pictures, each padded to its longest."""
        by_length = torch.tensor(self.lengths).argsort(stable=True)
        buckets = [PaddedPictures(self, part) for part in by_length.tensor_split(num_buckets)]
        return lambda: [(bucket.encode(), bucket.cell) for bucket in buckets if len(bucket.cell)]


class PaddedPictures:
    """Some pictures of a batch as rows of one length, zeros after their own patches."""

    def __init__(self, batch: Pictures, pictures: Tensor) -> None:
        self.vit, self.grids = batch.vit, batch.grids[pictures]
        own = self.grids.prod(1)
        starts = torch.tensor(batch.lengths).cumsum(0) - torch.tensor(batch.lengths)
        place = torch.arange(int(own.max()) if len(own) else 0)
        shown = place < own[:, None]  # [N, L]
        self.shown = shown.to(batch.device)
        self.cell = (starts[pictures][:, None] + place)[shown].to(batch.device)
        self.row = shown.flatten().nonzero()[:, 0].to(batch.device)
        self.patches = self._spread(batch.patches[self.cell])
        self.place, self.extent = (x.to(batch.device) for x in cells_of_grids(self.grids))

    def _spread(self, rows: Tensor) -> Tensor:  # [n, X] -> [N, L, X], zeros elsewhere
        empty = rows.new_zeros(self.shown.numel(), rows.shape[1])
        return empty.index_copy(0, self.row, rows).view(*self.shown.shape, -1)

    def encode(self) -> Tensor:  # [n, D]: without the padding
        vit = self.vit
        tokens = F.linear(self.patches, vit.patch_embed.weight.flatten(1), vit.patch_embed.bias)
        assert vit.pos_embed is not None
        position = resample_to_grids(
            vit.pos_embed, vit.cfg.grid, self.place, self.extent, largest=int(self.grids.max())
        )
        stream = Residual(tokens + self._spread(position))
        dtype = DTYPE["cuda" if tokens.is_cuda else "cpu"]
        mask = vit.blocks[0].prepare_mask(self.shown, dtype)  # type: ignore[operator]
        for block in vit.blocks:
            stream = block(stream, mask)
        return vit.norm(stream.total()).flatten(0, 1).index_select(0, self.row)

    @property
    def num_rows(self) -> int:
        """Return the tokens that are computed, padding among them."""
        return self.shown.numel()


def make_functions(cfg: Config, batch: Pictures) -> dict[str, Callable[[], Tensor]]:
    """Return a forward and backward pass of each, after a first one whose gradients are alike."""
    functions = {
        OURS: batch.run(batch.packed),
        PADDED: batch.run(batch.padded(1)),
        BUCKETED: batch.run(batch.padded(cfg.num_buckets)),
    }
    found = {}
    for name, function in functions.items():
        function()
        grads = [p.grad for p in batch.vit.parameters() if p.grad is not None]
        found[name] = torch.cat([grad.flatten().double() for grad in grads])
    most = ALIKE[DTYPE[batch.device]]
    for name, gradient in found.items():
        error = float((gradient - found[OURS]).norm() / found[OURS].norm())
        if not error <= most:
            raise AssertionError(
                f"gradients of {name}: expected those of {OURS} within {most}, got {error:.2g} off"
            )
    return functions


def computed_tokens(cfg: Config, grids: Tensor) -> dict[str, int]:
    """Return the tokens that each computes, padding among them."""
    lengths = grids.prod(1).sort().values
    buckets = [part for part in lengths.tensor_split(cfg.num_buckets) if len(part)]
    return {
        OURS: int(lengths.sum()),
        PADDED: len(lengths) * int(lengths.max()),
        BUCKETED: sum(len(part) * int(part.max()) for part in buckets),
    }


def measure_row(cfg: Config) -> dict[str, Any]:
    """Measure one batch of pictures."""
    device, grids = resolve(cfg.device), draw_grids(cfg)
    batch = Pictures(cfg, grids, device)
    functions = make_functions(cfg, batch)
    timings = measure(functions, device=device, num_samples=cfg.num_samples)
    peaks = {name: measure_peak(function, device)[1] for name, function in functions.items()}
    ours, num_tokens = timings[OURS].median_ms, sum(batch.lengths)
    return {
        "device": device,
        "num_threads": torch.get_num_threads(),
        "dtype": str(DTYPE[device]).removeprefix("torch."),
        "num_pictures": cfg.num_pictures,
        "num_tokens": num_tokens,
        "least_side": cfg.sides[0],
        "most_side": cfg.sides[1],
        "dim": cfg.dim,
        "depth": cfg.depth,
        "patch_size": cfg.patch_size,
        "num_buckets": cfg.num_buckets,
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "times_slower_than_ours": {name: t.median_ms / ours for name, t in timings.items()},
        "tokens_per_s": {name: num_tokens / t.median_ms * 1e3 for name, t in timings.items()},
        "pictures_per_s": {
            name: cfg.num_pictures / t.median_ms * 1e3 for name, t in timings.items()
        },
        "computed_tokens": computed_tokens(cfg, grids),
        "peak_mib": {name: peak / 2**20 for name, peak in peaks.items()},
    }


def table(rows: list[dict[str, Any]]) -> Table:
    (row,) = rows
    shown = Table(
        title=f"{row['num_pictures']} pictures of {row['least_side']} to {row['most_side']} "
        f"pixels, {row['num_tokens']:,} tokens, through a ViT of {row['dim']} x {row['depth']}, "
        f"forward and backward, on {row['device']}, {row['num_threads']} threads, {row['dtype']}",
        box=box.SIMPLE_HEAD,
    )
    shown.add_column("")
    for column in ("ms", "p20 - p80", "x ours", "tokens/s", "computed", "MiB"):
        shown.add_column(column, justify="right", no_wrap=True)
    for name, timing in row["timings"].items():
        t = Timing(**timing)
        shown.add_row(
            name,
            f"{t.median_ms:.0f}",
            f"{t.p20_ms:.0f} - {t.p80_ms:.0f}",
            f"{row['times_slower_than_ours'][name]:.2f}",
            f"{row['tokens_per_s'][name]:,.0f}",
            f"{row['computed_tokens'][name]:,}",
            f"{row['peak_mib'][name]:,.0f}",
        )
    return shown


def main(argv: list[str] | None = None) -> None:
    cfg = read_command(Config, SUBJECT, argv)
    publish(SUBJECT, [measure_row(cfg)], table, record=cfg.record)
