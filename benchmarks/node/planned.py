"""What `m3i-fast plan` predicts of the node that was measured, to stand beside the figures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from m3i_fast.costs.gpus import CARDS, Card, card_of
from m3i_fast.costs.traffic import Nodes
from m3i_fast.engine.trainer import Trainer
from m3i_fast.planning.plan import make_plan, source_of


def planned(
    trainer: Trainer,
    efficiency: Mapping[str, Any],
    *,
    nodes: Nodes,
    cores: int,
    picture_bytes: float,
) -> dict[str, Any]:
    """Return the plan's source images a second of a rank, or why there is none, as `unknown`.

    A CPU is planned with the rate of the matrix product that `efficiency` has timed. Pictures have
    the mean size of the next batch. cores: of a node.
    """
    cfg, card = trainer.cfg, _card(trainer.device, efficiency)
    if isinstance(card, str):
        return {"unknown": card}
    height, width = next(trainer.loader).image_size.cpu().mean(0).round().int().tolist()
    source = source_of(cfg, card, nodes, picture=(height, width), kilobytes=picture_bytes / 1e3)
    try:
        plan = make_plan(cfg, card=card, nodes=nodes, source=source, cores=cores / nodes.local)
    except (ValueError, FileNotFoundError) as error:  # a frozen teacher
        return {"unknown": str(error)}
    asked, loader = plan.asked_images_s, plan.loader
    return {
        "card": card.name,
        "picture_hw": [height, width],
        "loader_parts": dict(loader.rates),
        "loader": loader.images_s,
        "training": asked,
        "both": min(loader.images_s, asked),
        "bound": plan.chosen.speed.bottleneck,
        "decode_ms": 1e3 * loader.decode_s,
        "views_ms": 1e3 * loader.views_s,
    }


def cores_of_node(allowed: Sequence[frozenset[int]], nodes: Nodes) -> int:
    """Return how many cores the ranks of the first node may use together.

    allowed: the cores of each rank, a part of its node's or all of them; none where the system does
    not tell, and all count.
    """
    return len(frozenset().union(*allowed[: nodes.local])) or os.cpu_count() or 1


def _card(device: torch.device, efficiency: Mapping[str, Any]) -> Card | str:
    if device.type == "cuda":
        return card_of(torch.cuda.get_device_name(device))
    if "unknown" in efficiency:
        return str(efficiency["unknown"])
    peak = efficiency["peak_flop_s"]
    return replace(CARDS["cpu"], fp32_flop_s=peak, bf16_flop_s=peak)
