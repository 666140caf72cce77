"""A step of our Muon beside torch's, on a GPU, on this CPU, and on it as one without bf16 units.

    m3i-fast bench muon [--isas native avx2] [--no-record]

`torch`: torch.optim.Muon, whose products are bf16 everywhere. Both step the same matrices with the
same gradients. Each set of instructions is measured in a process of its own: avx2 holds torch,
oneDNN and MKL to what most laptops have.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor, nn

from m3i_fast.benchmarks.core.command import read_command
from m3i_fast.benchmarks.core.harness import Device, measure, publish, ratio_table, resolve
from m3i_fast.engine.optim.muon import Muon

SUBJECT = "muon"
OURS, TORCH = "m3i_fast", "torch"
MODULE = ("m3i_fast.benchmarks", "muon")
# Widths and numbers of blocks. The demo: image and text encoder, decoder.
CPU_MODELS = {"demo": {128: 6, 96: 2}}
GPU_MODELS = {"ViT-B": {768: 12}, "ViT-L": {1024: 24}}
HELD_TO = {
    "native": {},
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    device: Device = "auto"
    """auto: the GPU where torch sees one."""
    isas: tuple[Literal["native", "avx2"], ...] = ("native", "avx2")
    """Instructions of the CPU, one after another: all that it has, or no more than AVX2."""
    num_samples: int = 10
    """Samples of each function, interleaved."""
    record: bool = True
    """Append the rows to the ledger, benchmarks/results/muon.jsonl."""
    in_child: bool = False
    """Set by this command where it runs itself: print the rows, one a line."""

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples: expected at least 1, got {self.num_samples}")
        if not self.isas:
            raise ValueError("isas: expected at least one of native, avx2, got none")


def matrices(blocks: dict[int, int], device: str) -> list[nn.Parameter]:
    """Draw the weights of Transformer blocks, by width, and their gradients."""
    generator = torch.Generator().manual_seed(0)
    optimizers = []
    for width, depth in blocks.items():
        for shape in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width)):
            for _ in range(depth):
                weight, grad = (torch.randn(shape, generator=generator) for _ in range(2))
                optimizers.append(nn.Parameter(0.02 * weight.to(device)))
                optimizers[-1].grad = grad.to(device)
    return optimizers


def make_functions(blocks: dict[int, int], device: str) -> dict[str, Callable[[], object]]:
    """Return a step of each optimiser, after one first step that is the same."""
    kinds: dict[str, type[torch.optim.Muon]] = {OURS: Muon, TORCH: torch.optim.Muon}
    weights = {name: matrices(blocks, device) for name in kinds}
    optimizers = {
        name: kind(weights[name], lr=0.02, weight_decay=0.05) for name, kind in kinds.items()
    }
    for optimizer in optimizers.values():
        optimizer.step()
    for ours, theirs, start in zip(*weights.values(), matrices(blocks, device), strict=True):
        _expect_same_change((ours - start).detach(), (theirs - start).detach())
    return {name: optimizer.step for name, optimizer in optimizers.items()}


def _expect_same_change(ours: Tensor, theirs: Tensor) -> None:
    error = float((ours - theirs).norm() / theirs.norm())
    if not error < 0.05:  # torch's rounds to bf16
        raise AssertionError(
            f"a step of {tuple(ours.shape)}: expected torch's, got {error:.1%} off"
        )


# ---- Rows ----------------------------------------------------------------------------------------


def rows_here(cfg: Config, isa: str) -> Iterator[dict[str, Any]]:
    """Measure in this process."""
    device = resolve(cfg.device)
    for model, blocks in (GPU_MODELS if device == "cuda" else CPU_MODELS).items():
        timings = measure(
            make_functions(blocks, device), device=device, num_samples=cfg.num_samples
        )
        ours = timings[OURS].median_ms
        yield {
            "device": device,
            "num_threads": torch.get_num_threads(),
            "isa": isa,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "model": model,
            "dtype": "float32",
            "timings": {name: asdict(timing) for name, timing in timings.items()},
            "times_slower_than_ours": {name: t.median_ms / ours for name, t in timings.items()},
        }


def rows_of_children(cfg: Config) -> Iterator[dict[str, Any]]:
    """Measure in a process for each set of instructions; on a GPU in one."""
    isas = cfg.isas if resolve(cfg.device) == "cpu" else ("native",)
    for isa in isas:
        arguments = ["--in-child", "--isas", isa, "--device", resolve(cfg.device)]
        child = subprocess.run(
            [sys.executable, "-m", *MODULE, *arguments, "--num-samples", str(cfg.num_samples)],
            env={**os.environ, **HELD_TO[isa]},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        yield from map(json.loads, child.stdout.splitlines())


def table(rows: list[dict[str, Any]]) -> Table:
    return ratio_table(
        SUBJECT,
        "matrices, instructions",
        rows,
        lambda row: f"{row['model']}, {row['isa']} ({row['cpu_capability']})",
    )


def main(argv: list[str] | None = None) -> None:
    cfg = read_command(Config, SUBJECT, argv)
    if cfg.in_child:
        for row in rows_here(cfg, cfg.isas[0]):
            sys.stdout.write(json.dumps(row) + "\n")
        return
    publish(SUBJECT, rows_of_children(cfg), table, record=cfg.record)
