"""How long a step can take: published peaks and assumptions, each named; nothing is measured here.

A step takes as long as its matrix products at a share of the card's peak rate, or as its traffic
with the card's memory at the full rate, whichever is more; gradients are sent during the backward
pass, as far as that lasts; candidates of the likelihood over all pairs travel in its forward.
Images cannot come faster than the loader gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from m3i_fast.config.objective.flops import Flops
from m3i_fast.costs.gpus import UTILISATION, Card
from m3i_fast.costs.step_flops import without_sampling
from m3i_fast.costs.traffic import Traffic

OPTIMISER_BYTES = 28  # a parameter: reads of it, its gradient and two states; three are written
AVERAGE_BYTES = 12  # a parameter that follows by EMA: two reads, one write
CANDIDATES = "candidates"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """Hold what one rank does in a step."""

    batch_size: int
    flops: Mapping[str, Flops]
    bf16: bool
    moved_bytes: float
    """Bytes moved between the card and its memory, at least."""
    sent: Mapping[str, Traffic]
    loader_images_s: float
    """Images a second that the rank's loader can give."""
    loader_bound: str = "loader"
    """What bounds the loader."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictedSpeed:
    """Hold predictions: seconds of each part of a step by itself, and what follows from them."""

    compute_s: float
    memory_s: float
    gradients_s: float
    candidates_s: float
    loader_s: float
    step_s: float
    """Seconds of a step that does not wait for the loader."""
    step_without_overlap_s: float
    """The same, with gradients sent after the backward pass."""
    images_s: float
    """Images a second of all ranks, as the slower of step and loader allows."""
    images_without_overlap_s: float
    loader_images_s: float
    mfu: float
    """Model FLOPs over the peak rate, at images_s."""
    bottleneck: str


def predict(
    cost: StepCost, card: Card, *, num_ranks: int, utilisation: float = UTILISATION
) -> PredictedSpeed:
    """Predict the time of a step on `num_ranks` of these cards."""
    products = without_sampling(cost.flops)
    peak = card.bf16_flop_s if cost.bf16 else card.fp32_flop_s
    compute_s = products.hardware / (peak * utilisation)
    memory_s = cost.moved_bytes / card.memory_byte_s
    own_s = max(compute_s, memory_s)
    candidates_s = sum(_seconds(v, card) for k, v in cost.sent.items() if k == CANDIDATES)
    gradients_s = sum(_seconds(v, card) for k, v in cost.sent.items() if k != CANDIDATES)
    backward_s = own_s * (1 - products.forward / products.hardware)
    step_s = own_s + candidates_s + max(gradients_s - backward_s, 0.0)
    plain_s = own_s + candidates_s + gradients_s
    loader_s = cost.batch_size / cost.loader_images_s
    alone = {
        "compute": compute_s,
        "card memory": memory_s,
        "communication": gradients_s + candidates_s,
    }
    slowest = max(alone, key=alone.__getitem__)
    images = cost.batch_size * num_ranks
    return PredictedSpeed(
        compute_s=compute_s,
        memory_s=memory_s,
        gradients_s=gradients_s,
        candidates_s=candidates_s,
        loader_s=loader_s,
        step_s=step_s,
        step_without_overlap_s=plain_s,
        images_s=images / max(step_s, loader_s),
        images_without_overlap_s=images / max(plain_s, loader_s),
        loader_images_s=cost.loader_images_s * num_ranks,
        mfu=products.model / (peak * max(step_s, loader_s)),
        bottleneck=cost.loader_bound if loader_s > step_s else slowest,
    )


def assumptions(card: Card, *, utilisation: float) -> list[str]:
    """Return what the prediction of a step rests on, a sentence each."""
    shown = [
        f"matrix products reach {utilisation:.0%} of the published rate, recomputed ones included "
        "(--utilisation)",
        "links run at their published rates, one network adapter a GPU; latencies are left out",
        "card memory moves activations in and out once, weights, states and averages: a lower "
        "bound; DCNv3's samples are in neither rate",
    ]
    if not card.is_gpu:
        shown.insert(0, "card cpu: every rate is assumed, of two cores of a server")
    return shown


def _seconds(sent: Traffic, card: Card) -> float:
    return max(sent.nvlink / card.nvlink_byte_s, sent.network / card.network_byte_s)
