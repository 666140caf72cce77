"""Views of any size and aspect through the objective: terms of whole pictures on packed tokens.

Terms of a category, a caption or a whole view read a picture by the mean of its tokens, whatever
their number. So a packed picture is handed to them as one token, that mean.
Legend: B samples, V views of each, P pixels along a side of a patch, T patches of a view of all
samples, I images in inputs, C width of a token, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from m3i_fast.config.any_shape import objective_conflicts
from m3i_fast.config.fields import refuse
from m3i_fast.models.encoder import ImageEncoder
from m3i_fast.models.transformer.packing import to_device
from m3i_fast.objectives.mixing import Mix
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.objectives.step_context import Encoded, Source, Targets, target_rows
from m3i_fast.objectives.targets import autocast_dtype, normalise_views


class PackedViews(Protocol):
    """Views as patches behind one another, for instance a `PackedBatch`."""

    @property
    def patches(self) -> tuple[Tensor, ...]:  # V x [T, 3 P P] uint8
        """Return the patches of each view, global views first, picture after picture."""

    @property
    def grids(self) -> Tensor:  # [B, V, 2] int64, on the CPU
        """Return rows and columns of patches of each view."""

    @property
    def num_global(self) -> int:
        """Return how many of the views are global."""


def encode_packed(
    objective: MutualInformation, views: PackedViews, mix: Mix
) -> tuple[Encoded, Targets]:
    """Encode views of any size: what `encode_inputs` and `encode_targets` return of squares.

    Raises ValueError as `encode_packed_inputs` and `encode_packed_targets`.
    """
    inputs = encode_packed_inputs(objective, views, mix)
    return inputs, encode_packed_targets(objective, views, mix)


def encode_packed_inputs(objective: MutualInformation, views: PackedViews, mix: Mix) -> Encoded:
    """Encode the views that the trained encoder sees, in one pass.

    Each picture is one token, the mean over its cells: [I, 1, C] and [B, 1, C]. Raises ValueError
    where the objective has terms of cells or mixes images, and where the encoder needs whole
    batches.
    """
    refuse(objective_conflicts(objective.cfg))
    num_inputs = objective.cfg.num_encoded_views
    local = range(views.num_global, len(views.patches))
    means = _means(
        objective.encoder, views, [*range(num_inputs), *local], _priority(mix, num_inputs)
    )
    inputs = tuple(mean[mix.sample] for mean in means[:num_inputs])
    return Encoded(inputs, tuple(means[num_inputs:]))


@torch.no_grad()
def encode_packed_targets(objective: MutualInformation, views: PackedViews, mix: Mix) -> Targets:
    """Encode the target views that a term uses, in one pass of each target encoder: [I, 1, C].

    Raises ValueError where an encoder needs whole batches.
    """
    sources = target_rows(objective.cfg.active_terms)
    tokens: dict[Source, Tensor] = {}
    for name, encoder in objective.encoders().items():
        of_encoder = [source for source in sources if source[0] == name]
        means = _means(encoder, views, [view for _, view in of_encoder], None)
        tokens |= {source: mean[mix.sample] for source, mean in zip(of_encoder, means, strict=True)}
    return Targets(tokens, sources)


def _means(
    encoder: ImageEncoder,
    views: PackedViews,
    used: Sequence[int],
    priority: Tensor | None,  # [len(used) B, 2 L] int32
) -> list[Tensor]:  # [B, 1, C] each
    """Average the tokens of each picture of the views in use, encoded in one pass."""
    if not used:
        return []
    patches = torch.cat([views.patches[view] for view in used])
    grids = torch.cat([views.grids[:, view] for view in used])
    cells = encoder.encode_pictures(_normalised(patches), grids, priority).cells
    lengths = to_device(grids.prod(1), cells.device)
    means = torch.segment_reduce(cells, "mean", lengths=lengths, unsafe=True)
    return list(means[:, None].chunk(len(used)))


def _normalised(patches: Tensor) -> Tensor:  # [T, 3 P P] uint8 -> [T, 3 P P]
    """Normalise patches as views are, each as a picture of its own."""
    side = round((patches.shape[1] // 3) ** 0.5)
    every = torch.arange(len(patches), device=patches.device)
    pictures = patches.view(-1, 3, side, side)
    return normalise_views(pictures, every, autocast_dtype(patches.device.type)).flatten(1)


def _priority(mix: Mix, num_inputs: int) -> Tensor | None:  # [V B, 2 L] int32
    """Return the priorities of pictures in the order of samples, view after view."""
    if mix.branch_priority is None:
        return None
    order = mix.sample.argsort()
    of_inputs = mix.branch_priority.unflatten(0, (num_inputs, -1))[:, order].flatten(0, 1)
    local = mix.local_branch_priority
    return of_inputs if local is None else torch.cat([of_inputs, local])
