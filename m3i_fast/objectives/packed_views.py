"""Views of any size and aspect through the objective: the encoders' passes over packed tokens.

Where no term reads single cells, a picture is handed to the terms as one token, the mean of its
tokens; else as all of them (`Ragged`).
Legend: B samples, V views of each, P pixels along a side of a patch, T patches of a view of all
samples, I images in inputs, C width of a token, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from m3i_fast.config.any_shape import objective_conflicts
from m3i_fast.config.fields import refuse
from m3i_fast.models.encoder import PackedCells
from m3i_fast.models.transformer.positions import whole_pictures
from m3i_fast.models.transformer.ragged import Cells, Ragged
from m3i_fast.objectives.any_shape.draw import PackedMix
from m3i_fast.objectives.mixing import Mix
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.objectives.step_context import Encoded, Rows, Source, Targets, target_rows
from m3i_fast.objectives.targets import autocast_dtype, normalise_patches


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

    Raises ValueError for terms and mixing that need squares, for a mix of squares, and where the
    encoder needs whole batches.
    """
    refuse(objective_conflicts(objective.cfg))
    drawn, cfg = _expect_packed(mix), objective.cfg
    inputs = drawn.cells[: cfg.num_encoded_views]
    local = range(views.num_global, len(views.patches))
    parts = [
        _Part(_taken(views.patches[view], cells.patches), cells.inputs)
        for view, cells in enumerate(inputs)
    ]
    parts += [_whole(views.patches[view], views.grids[:, view]) for view in local]
    whole = _joined(parts)
    encoded = objective.encoder.encode_patches(
        _normalised(whole.patches), whole.cells, _priority(mix, len(inputs)), objective.mask_token
    ).cells.split([len(part.patches) for part in parts])
    own = [
        Ragged(_taken(tokens, cells.back), cells.lengths)
        for tokens, cells in zip(encoded, inputs, strict=False)
    ]
    of_local = [
        Ragged(tokens, tuple(part.cells.lengths))
        for tokens, part in zip(encoded[len(inputs) :], parts[len(inputs) :], strict=True)
    ]
    read = _as_read(objective, [*own, *of_local])
    return Encoded(tuple(read[: len(own)]), tuple(read[len(own) :]))


@torch.no_grad()
def encode_packed_targets(objective: MutualInformation, views: PackedViews, mix: Mix) -> Targets:
    """Encode the target views that a term uses, of the images it asks, in one pass of each encoder.

    Raises ValueError for a mix of squares, and where an encoder needs whole batches.
    """
    drawn, rows = _expect_packed(mix), target_rows(objective.cfg.active_terms)
    tokens: dict[Source, Cells] = {}
    for name, encoder in objective.encoders().items():
        sources = [source for source in rows if source[0] == name]
        parts = [_target(views, drawn, view, rows[name, view]) for _, view in sources]
        if not parts:
            continue
        whole = _joined(parts)
        encoded = encoder.encode_patches(_normalised(whole.patches), whole.cells).cells
        split = encoded.split([len(part.patches) for part in parts])
        own = [
            Ragged(of_view, tuple(part.cells.lengths))
            for of_view, part in zip(split, parts, strict=True)
        ]
        tokens |= dict(zip(sources, _as_read(objective, own), strict=True))
    return Targets(tokens, rows)


def _expect_packed(mix: Mix) -> PackedMix:
    if not isinstance(mix, PackedMix):
        raise ValueError(
            "mix: expected that of draw_packed_mix for views of any size, got one of squares"
        )
    return mix


def _as_read(objective: MutualInformation, parts: Sequence[Ragged]) -> list[Cells]:
    """Return the tokens as terms read them: one of each picture where none reads cells."""
    if objective.cfg.reads_cells:
        return list(parts)
    lengths = tuple(n for part in parts for n in part.lengths)
    means = Ragged(torch.cat([part.values for part in parts]), lengths).mean()[:, None]
    return list(means.split([len(part) for part in parts]))


class _Part(NamedTuple):
    """Patches of some views, and which cells they are."""

    patches: Tensor  # [T, 3 P P] uint8
    cells: PackedCells


def _whole(patches: Tensor, grids: Tensor) -> _Part:
    """Return all cells of pictures of these grids, [N, 2] on the CPU."""
    return _Part(patches, whole_pictures(grids, patches.device))


def _target(views: PackedViews, mix: PackedMix, view: int, rows: Rows) -> _Part:
    """Return a target view of the images that `rows` names, in the order of images."""
    samples = mix.samples(rows)
    every = Ragged(views.patches[view], tuple(views.grids[:, view].prod(1).tolist()))
    return _whole(every.select(samples).values, views.grids[samples, view])


def _joined(parts: Sequence[_Part]) -> _Part:
    """Put the sequences of several views behind one another."""
    cells = [part.cells for part in parts]
    hidden = None
    if any(each.hidden is not None for each in cells):
        hidden = torch.cat(
            [
                torch.zeros_like(each.place[:, 0], dtype=torch.bool)
                if each.hidden is None
                else each.hidden
                for each in cells
            ]
        )
    return _Part(
        torch.cat([part.patches for part in parts]),
        PackedCells(
            [n for each in cells for n in each.lengths],
            torch.cat([each.place for each in cells]),
            torch.cat([each.extent for each in cells]),
            max(each.largest for each in cells),
            hidden,
        ),
    )


def _taken(rows: Tensor, index: Tensor | None) -> Tensor:
    return rows if index is None else rows.index_select(0, index)


def _normalised(patches: Tensor) -> Tensor:  # [T, 3 P P] uint8 -> [T, 3 P P]
    """Normalise patches as views are."""
    return normalise_patches(patches, autocast_dtype(patches.device.type)).flatten(1)


def _priority(mix: Mix, num_views: int) -> Tensor | None:  # [sequences, 2 L] int32
    """Return the priorities of the sequences, view after view, and of local views."""
    if mix.branch_priority is None:
        return None
    # Of several images that are encoded alone, those of a view stand apart.
    by_image = mix.branch_priority.unflatten(0, (-1, num_views, mix.num_inputs))
    of_inputs = by_image.transpose(0, 1).flatten(0, 2)
    local = mix.local_branch_priority
    return of_inputs if local is None else torch.cat([of_inputs, local])
