"""How much of a card a node's training uses, and of a CPU, of which no rate is published."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from m3i_fast.benchmarks.core.harness import measure
from m3i_fast.costs.gpus import Card, card_of
from m3i_fast.engine.run.mfu import efficiency
from m3i_fast.engine.trainer import Trainer

GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
PUBLISHED, MEASURED = "published", "a matrix product of this machine, in the same run"


def efficiency_figures(trainer: Trainer, *, images_s: float) -> dict[str, Any]:
    """Return the MFU and HFU of a rank, and the peak that they are shares of.

    All ranks call this at once: a product on a CPU has the cores that a rank's training had.
    """
    cfg, card, why = trainer.cfg, *_card(trainer.device)
    peak = _gemm_flop_s(trainer) if card is None else None
    try:
        figures = efficiency(
            cfg, trainer.arithmetic, images_s=images_s, card=card, num_ranks=trainer.world.size
        )
    except ValueError as error:  # a frozen teacher
        return {"unknown": str(error)}
    if peak is None:
        return {**asdict(figures), "peak_of": PUBLISHED, "card": why}
    return {
        **asdict(figures),
        "mfu": figures.model_flop_s / peak,
        "hfu": figures.hardware_flop_s / peak,
        "peak_of": MEASURED,
        "peak_flop_s": peak,
        "card": why,
    }


def _card(device: torch.device) -> tuple[Card | None, str]:
    """Return the card and its name, or None and why."""
    if device.type != "cuda":
        return None, "a CPU: no rate is published"
    card = card_of(torch.cuda.get_device_name(device))
    return (None, card) if isinstance(card, str) else (card, card.name)


def _gemm_flop_s(trainer: Trainer) -> float:
    """Of a large square product in the type that the step computes with: the mean over ranks."""
    size, device = GEMM_SIZE[trainer.device.type], trainer.device
    dtype = trainer.arithmetic.compute_dtype
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    trainer.world.wait_for_all()
    timing = measure({"gemm": lambda: a @ b}, device=device, num_samples=10)["gemm"]
    rates = trainer.world.gather(2e3 * size**3 / timing.median_ms)
    return sum(rates) / len(rates)
