"""Terms of annotations beside classes and captions' embeddings, and batches that have some of them.

Samples 1, 4 and 10 of `make_batch` have no caption; others lack labels, some of their numbers, or
regions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from m3i_fast.config.columns import NO_LABELS, REGION_UNIT, REGION_WIDTH, ColumnConfig
from m3i_fast.config.objective.heads import CaptionerConfig, DecoderConfig
from m3i_fast.config.objective.mixing import MixingConfig
from m3i_fast.config.objective.objective import ObjectiveConfig, Term
from m3i_fast.objectives.mixing import Mix
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.objectives.step_context import Encoded, Targets
from m3i_fast.pipelines.batch import Batch
from tests.shared.small_objective import NUM_CLASSES, TEXT, VISION, make_batch

COLUMNS = (
    ColumnConfig(name="tags", kind="labels", num_names=7, size=3),
    ColumnConfig(
        name="sizes", kind="numbers", num_names=2, size=2, mean=(1.0, -2.0), std=(2.0, 0.5)
    ),
    ColumnConfig(name="alt", kind="text", size=6),
    ColumnConfig(name="genus", kind="class", num_names=4),
    ColumnConfig(name="objects", kind="regions", size=5),
)
MOST_REGIONS = 3
"""Of a view."""
TERMS = {
    "tokens": Term(
        name="tokens",
        target="caption_tokens",
        predictor="captioner",
        likelihood="boltzmann",
        regulariser="negatives",
    ),
    "tags": Term(
        name="tags",
        target="labels",
        column="tags",
        predictor="head",
        likelihood="sigmoid",
        regulariser="negatives",
    ),
    "sizes": Term(
        name="sizes",
        target="numbers",
        column="sizes",
        predictor="head",
        likelihood="gaussian",
        regulariser="fixed",
    ),
    "genus": Term(
        name="genus",
        target="category",
        column="genus",
        predictor="head",
        likelihood="boltzmann",
        regulariser="negatives",
    ),
    "alt": Term(
        name="alt",
        target="caption",
        column="alt",
        predictor="head",
        likelihood="boltzmann",
        regulariser="negatives",
    ),
    "boxes": Term(
        name="boxes",
        target="grounded_caption",
        column="objects",
        predictor="captioner",
        likelihood="boltzmann",
        regulariser="negatives",
    ),
    "places": Term(
        name="places",
        target="referring_box",
        column="objects",
        predictor="captioner",
        likelihood="boltzmann",
        regulariser="negatives",
    ),
}


def objective(
    *names: str, parallel: float = 0.0, mode: str = "none", **facts: Any
) -> ObjectiveConfig:
    """The named terms, changed by `facts`, on networks of a few rows."""
    return ObjectiveConfig(
        terms=tuple(replace(TERMS[name], **facts) for name in names or TERMS),
        mixing=MixingConfig(mode=mode, mask_block=1),  # type: ignore[arg-type]
        decoder=DecoderConfig(dim=32, depth=1, num_heads=2),
        captioner=CaptionerConfig(
            dim=16, depth=2, num_heads=2, parallel=parallel, coordinate_bins=20
        ),
        head_hidden_dim=12,
    )


def build(cfg: ObjectiveConfig, **facts: Any) -> MutualInformation:
    """The model of a config, from one seed."""
    torch.manual_seed(0)
    return MutualInformation(
        cfg, vision=VISION, text=TEXT, num_classes=NUM_CLASSES, columns=COLUMNS, **facts
    )


def encode(model: MutualInformation, mix: Mix, seed: int = 3) -> Encoded:
    """Tokens that an encoder might say of the inputs, in fp64, as leaves."""
    rng = torch.Generator().manual_seed(seed)
    shape = *mix.token_index.shape, VISION.dim
    return Encoded((torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_(),))


NO_TARGETS = Targets({}, {})


def annotated_batch(size: int = 8) -> Batch:
    """A batch whose samples have some of the columns."""
    batch, rng = make_batch(size), torch.Generator().manual_seed(5)
    tags = torch.rand(size, 7, generator=rng).argsort(1)[:, :3]
    tags[0::4, 1:], tags[1] = -1, -1
    tags[2::4] = NO_LABELS
    sizes = torch.randn(size, 2, generator=rng) * 2 - 1
    sizes[1::3, 0], sizes[3] = torch.nan, torch.nan
    lengths = torch.randint(2, 7, (size,), generator=rng)
    lengths[5::4] = 0
    alt = torch.randint(1, 50, (size, 6), generator=rng, dtype=torch.int32)
    alt[torch.arange(6) >= lengths[:, None]] = -1
    genus = torch.randint(0, 4, (size,), generator=rng)
    genus[3::4] = -1
    columns = {"tags": tags, "sizes": sizes, "alt": alt, "genus": genus}
    return replace(batch, columns={**columns, "objects": regions(size, views=2)})


def regions(size: int, *, views: int, words: int = 50) -> Tensor:
    """Up to three regions of each view; the first and every third sample have none."""
    rng = torch.Generator().manual_seed(7)
    shape = size, views, MOST_REGIONS
    corner = torch.rand(*shape, 2, generator=rng, dtype=torch.float64) * 0.6
    side = 0.05 + torch.rand(*shape, 2, generator=rng, dtype=torch.float64) * 0.35
    box = (torch.cat([corner, corner + side], -1) * REGION_UNIT).round().int()
    num_tokens = torch.randint(2, 7, shape, generator=rng)
    ids = torch.randint(1, words, (*shape, REGION_WIDTH - 4), generator=rng, dtype=torch.int32)
    ids[torch.arange(REGION_WIDTH - 4) >= num_tokens[..., None]] = -1
    found = torch.cat([box, ids], -1)
    count = torch.randint(1, MOST_REGIONS + 1, shape[:2], generator=rng)
    count[0::3] = 0
    found[torch.arange(MOST_REGIONS) >= count[..., None]] = -1
    return found
