"""Batches of a rank that mixing and FP8 allow.

Transformer Engine asks that the rows of a product (tokens over all images) are a multiple of 16
for FP8 with one scale a tensor, 32 for MXFP8 and 128 for blocks of 128.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from m3i_fast.config import TrainConfig
from m3i_fast.engine.flops import counts_of
from m3i_fast.models.vit import ViTConfig
from m3i_fast.objectives.counts import Counts
from m3i_fast.objectives.seen import target_rows

ALIGNMENT = {"bf16": 1, "fp8_current": 16, "mxfp8": 32, "fp8_block": 128}


@dataclass(frozen=True, kw_only=True, slots=True)
class Legal:
    recipe: str
    alignment: int
    is_legal: bool
    reason: str
    """What does not fit; empty where all does."""
    below: int | None
    """Nearest legal batch that is no larger."""
    above: int | None


def legal_batches(cfg: TrainConfig) -> list[Legal]:
    """One row a recipe of arithmetic, for the batch of a rank."""
    size, found = cfg.data.batch_size, []
    multiple = cfg.objective.mixing.images_per_input
    for recipe, alignment in ALIGNMENT.items():
        # rows are linear in the batch but for the rounding of dense_fraction
        reach = range(multiple, size + 4 * multiple * alignment + 1, multiple)
        fits = [batch for batch in reach if not _misfit(cfg, batch, alignment)]
        reason = _misfit(cfg, size, alignment)
        found.append(
            Legal(
                recipe=recipe,
                alignment=alignment,
                is_legal=not reason,
                reason=reason,
                below=max((batch for batch in fits if batch <= size), default=None),
                above=min((batch for batch in fits if batch >= size), default=None),
            )
        )
    return found


def token_rows(counts: Counts) -> dict[str, int]:
    """Tokens of all images in each pass."""
    return _rows(counts, stride=counts.vision.image_size // counts.vision.grid)


def _rows(counts: Counts, *, stride: int) -> dict[str, int]:
    """`stride`: pixels a side of an encoder's cell; a convolutional one has larger ones, too."""
    found = _encoder_rows(counts, stride)
    for term in counts.objective.active_terms:
        if term.target == "caption":
            found["text encoder"] = counts.batch_size * counts.text.context_length
        if term.predictor == "decoder":
            asked, queries = counts.num_asked(term.asked), counts.num_queries(term)
            found[f"decoder of {term.name}"] = asked * (counts.num_own + queries)
            found[f"cells asked by {term.name}"] = asked * queries
    return found


def _encoder_rows(counts: Counts, stride: int) -> dict[str, int]:
    vision, mode = counts.vision, counts.objective.mixing.mode
    prefix = vision.num_prefix if isinstance(vision, ViTConfig) else 0
    whole = (vision.image_size // stride) ** 2 + prefix
    inputs = counts.num_inputs * whole
    if mode in ("own_image", "masked"):
        inputs = counts.num_images * (counts.num_own + prefix)
    targets = target_rows(counts.objective.active_terms).values()
    found = {
        "encoder": inputs * counts.num_views,
        "target encoder": sum(counts.num_asked(rows) for rows in targets) * whole,
        "local views": counts.num_local
        * counts.batch_size
        * ((counts.local_size // stride) ** 2 + prefix),
    }
    return {part: rows for part, rows in found.items() if rows}


def _misfit(cfg: TrainConfig, batch_size: int, alignment: int) -> str:
    multiple = cfg.objective.mixing.images_per_input
    if batch_size % multiple:
        return f"{batch_size} images do not divide into inputs of {multiple}"
    counts = replace(counts_of(cfg), batch_size=batch_size)
    for part, rows in _rows(counts, stride=cfg.vision.size_multiple).items():
        if rows % alignment:
            return f"{part}: {rows} tokens, {rows % alignment} more than a multiple of {alignment}"
    return ""
