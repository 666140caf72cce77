"""The Boltzmann likelihood beside the losses that it replaces, and how each grows.

    m3i-fast bench boltzmann [--device cuda] [--no-record]
    m3i-fast bench boltzmann --growth [--largest 65536]
    m3i-fast bench boltzmann --ranks 1,2,4

Rows of pairs: open_clip's ClipLoss and SigLipLoss. One-sided with classes: F.cross_entropy on
logits, torch's linear_cross_entropy in chunks. With soft targets: F.cross_entropy of both matrices
of logits. On a GPU also siglip-kernel and Liger's fused linear cross-entropy, where they are
installed. `four_gemms`, of the sigmoid form and of classes `three_gemms`, forward alone `one_gemm`
(of soft targets `two_gemms`): the matrix products of ours and nothing else, the least time of its
plan.

`tflop_s` counts the GEMMs that ours runs, 2 N M D flop each: four for forward and backward, three
of the sigmoid form and of classes, one forward (of soft targets two). Of a GPU whose dense bf16
peak is known, `hfu` is that over the peak, and `model_fraction` of every loss counts the GEMMs
that a loss which keeps its logits needs: three, of soft targets four.

Of soft targets, the prototypes of DINO and SwAV, forward and backward has `extra_peak_bytes` as
well: of each loss in a fresh process, the peak above the inputs, less the gradients' bytes.

`--growth` is described in growth.py and `--ranks` in ranks.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from rich.table import Table

from m3i_fast.benchmarks.core.command import read_command
from m3i_fast.benchmarks.core.harness import (
    Device,
    measure,
    parse_counts,
    publish,
    ratio_table,
    resolve,
)
from m3i_fast.benchmarks.ops.boltzmann import growth, ranks
from m3i_fast.benchmarks.ops.boltzmann.losses import (
    MODEL_GEMMS,
    OUR_GEMMS,
    OURS,
    Form,
    Size,
    losses,
    make_functions,
)
from m3i_fast.costs.gpus import card_of

SUBJECT = "boltzmann"
PAIRS: tuple[Form, ...] = ("softmax", "sigmoid")
CPU_SIZES = (
    *(Size(form=form, rows=n, columns=n, dim=512) for form in PAIRS for n in (1024, 8192)),
    Size(form="classes", rows=2048, columns=21841, dim=384),
    Size(form="soft", rows=4096, columns=65536, dim=256),
)
GPU_SIZES = (
    *(
        Size(form=form, rows=n, columns=n, dim=dim)
        for form in PAIRS
        for n in (32768, 65536)
        for dim in (512, 768, 1024)
    ),
    *(Size(form="classes", rows=16384, columns=21841, dim=dim) for dim in (512, 768, 1024)),
    *(Size(form="soft", rows=8192, columns=65536, dim=dim) for dim in (256, 512)),
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    device: Device = "auto"
    """auto: the GPU where torch sees one. A CPU computes in fp32, a GPU in bf16."""
    num_samples: int = 5
    """Samples of each function, interleaved."""
    growth: bool = False
    """Measure instead how seconds and memory grow with N, and draw it."""
    largest: int | None = None
    """Largest N of --growth: 1,024, or a doubling of it. 32,768 on a CPU, 131,072 on a GPU."""
    ranks: str = ""
    """Measure instead weak scaling over so many processes of one CPU thread each: 1,2,4."""
    rows_per_rank: int = 1024
    """Rows that each process of --ranks has."""
    dim: int = 512
    """Features, for --growth and --ranks."""
    record: bool = True
    """Append the rows to the ledger, benchmarks/results/boltzmann.jsonl."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "rows_per_rank", "dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.growth and self.ranks:
            raise ValueError("ranks: expected either --growth or --ranks, got both")
        if self.largest is not None:
            if not self.growth:
                raise ValueError("largest: expected with --growth only")
            growth.counts(self.largest)
        if self.ranks:
            parse_counts(self.ranks)
            if self.device == "cuda":
                raise ValueError("ranks: expected --device cpu, where gloo is, got cuda")


# ---- Rows ----------------------------------------------------------------------------------------


def figures_of(
    cfg: Config, size: Size, dtype: torch.dtype, backward: bool, peak_tflop_s: float | None
) -> dict[str, Any]:
    device = resolve(cfg.device)
    timings = measure(
        make_functions(size, dtype, device, backward=backward),
        device=device,
        num_samples=cfg.num_samples,
    )
    ours = timings[OURS].median_ms
    forward_gemms = 2 if size.form == "soft" else 1
    flop = size.gemm_flop * (OUR_GEMMS[size.form] if backward else forward_gemms)
    figures = {
        "kind": "speed",
        "device": device,
        "num_threads": torch.get_num_threads(),
        **asdict(size),
        "dtype": str(dtype).removeprefix("torch."),
        "pass": "forward+backward" if backward else "forward",
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "times_slower_than_ours": {name: t.median_ms / ours for name, t in timings.items()},
        "tflop_s": flop / (ours * 1e9),
    }
    if peak_tflop_s is not None:
        model_flop = size.gemm_flop * (MODEL_GEMMS[size.form] if backward else forward_gemms)
        figures |= {
            "peak_tflop_s": peak_tflop_s,
            "hfu": flop / (ours * 1e9 * peak_tflop_s),
            "model_fraction": {
                name: model_flop / (t.median_ms * 1e9 * peak_tflop_s)
                for name, t in timings.items()
                if not name.endswith(("_gemm", "_gemms"))
            },
        }
    return figures


@cache  # said once
def peak_of(name: str) -> float | None:
    """Return the dense bf16 peak in TFLOP/s of the card that the driver calls so, where known."""
    card = card_of(name)
    if isinstance(card, str):
        logger.warning("no fraction of a peak: %s", card)
        return None
    return card.bf16_flop_s / 1e12


def measure_speed(cfg: Config) -> Iterator[dict[str, Any]]:
    on_gpu = resolve(cfg.device) == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    peak = peak_of(torch.cuda.get_device_name()) if on_gpu else None
    for size in GPU_SIZES if on_gpu else CPU_SIZES:
        for backward in (False, True):
            figures = figures_of(cfg, size, dtype, backward, peak)
            if backward and size.form == "soft":
                figures["extra_peak_bytes"] = extra_peaks(size, dtype, resolve(cfg.device))
            yield figures


def extra_peaks(size: Size, dtype: torch.dtype, device: str) -> dict[str, int]:
    """Return the memory of each loss above inputs and gradients, in bytes by name."""
    arguments = size, dtype, device, torch.get_num_threads()
    points = {n: growth.measure_apart(n, *arguments) for n in losses(size.form, device)}
    return {name: point.extra_peak_bytes for name, point in points.items() if point is not None}


def table(rows: list[dict[str, Any]]) -> Table:
    def label(row: dict[str, Any]) -> str:
        size = Size(**{name: row[name] for name in Size.__slots__})
        kind = {"forward": "fwd", "forward+backward": "fwd + bwd"}[row["pass"]]
        return f"{size}, {kind}"

    def rate(row: dict[str, Any], name: str) -> str:
        return f"{row['tflop_s']:.3g}" if name == OURS else ""

    shown = ratio_table(SUBJECT, "form, N x M x D", rows, label, {"TFLOP/s": rate})
    for row in rows:
        if extra := row.get("extra_peak_bytes"):
            memory = ", ".join(f"{name} {count / 2**20:,.0f}" for name, count in extra.items())
            shown.caption = f"{label(row)}: MiB above inputs and gradients: {memory}"
    return shown


def main(argv: list[str] | None = None) -> None:
    cfg = read_command(Config, SUBJECT, argv)
    if cfg.growth:
        curves = growth.measure_growth(resolve(cfg.device), cfg.largest, cfg.dim)
        publish(SUBJECT, curves, growth.table, record=cfg.record)
        if cfg.record:
            growth.draw_newest(SUBJECT)
    elif cfg.ranks:
        counts = parse_counts(cfg.ranks)
        rows = ranks.measure_ranks(counts, cfg.rows_per_rank, cfg.dim, cfg.num_samples)
        publish(SUBJECT, rows, ranks.table, record=cfg.record)
    else:
        publish(SUBJECT, measure_speed(cfg), table, record=cfg.record)
