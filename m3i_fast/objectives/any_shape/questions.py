"""What the dense decoder is asked of pictures of any shape: where target cells lie in each input.

Legend: A pictures asked, V views, Q target cells of all of them, T tokens of all of them, L local
views.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from m3i_fast.config.objective.objective import Term
from m3i_fast.models.transformer.packing import to_device
from m3i_fast.models.transformer.positions import (
    cells_of_grids,
    fractions_of_centres,
    grid_positions,
)
from m3i_fast.models.transformer.ragged import Ragged, joined
from m3i_fast.objectives.any_shape.draw import PackedMix
from m3i_fast.objectives.heads import PackedQuestion
from m3i_fast.objectives.step_context import StepContext
from m3i_fast.objectives.targets import normalise_patches, standardised


def packed_questions(step: StepContext, term: Term, query: Ragged) -> list[PackedQuestion]:
    """Return what a term asks of its decoder: of its own view, then of all local views together.

    query: [Q] cells of the target view, in its own grid. The answers of local views are those of
    the first one, of all pictures asked, then of the next: [L Q, E].
    """
    mix = cast(PackedMix, step.mix)
    rows, samples = mix.rows(term.asked), mix.samples(term.asked)
    boxes = step.batch.boxes[mix.take(mix.sample, term.asked)]  # [A, V, 5]
    targets = _Targets(query, mix.cells[int(term.view == "other")].grids[rows], boxes, term)
    own = cast(Ragged, mix.own_cells(term.asked))
    grids = mix.cells[0].grids[rows]
    tokens = cast(Ragged, mix.take_cells(step.encoded.views[0], term.asked))
    questions = [PackedQuestion(tokens, _places(own, grids), targets.seen_from(0, grids))]
    if not step.encoded.local or term.view == "same":
        return questions
    all_grids: Tensor = step.batch.grids  # type: ignore[attr-defined]  # [B, V, 2], a PackedBatch's
    first = all_grids.shape[1] - len(step.encoded.local)
    asked, places, positions = [], [], []
    for number, view in enumerate(step.encoded.local, start=first):
        grids = all_grids[samples, number]
        asked.append(cast(Ragged, view).select(samples))
        places.append(to_device(cells_of_grids(grids)[0], query.values.device))
        positions.append(targets.seen_from(number, grids))
    return [*questions, PackedQuestion(joined(asked), torch.cat(places), joined(positions))]


def target_patches(
    step: StepContext, term: Term, view: int, query: Ragged
) -> Tensor:  # [Q, 3 p p] uint8
    """Return the patches of some cells of a view, [Q] of the pictures asked."""
    mix = cast(PackedMix, step.mix)
    patches: Tensor = step.batch.patches[view]  # type: ignore[attr-defined]  # a PackedBatch's
    first = query.spread(mix.cells[view].starts[mix.rows(term.asked)])
    return patches[first + query.values]


def target_pixels(step: StepContext, term: Term, query: Ragged) -> Ragged:  # [Q] -> [Q, 3 p p]
    """Return `normalised_pixels` of cells of the target view, of the pictures asked."""
    patches = target_patches(step, term, int(term.view == "other"), query)
    images = normalise_patches(patches, torch.float32)
    return query.with_values(standardised(images.permute(0, 2, 3, 1).flatten(1)))


class _Targets:
    """Target cells of pictures, and where they lie in views of the same pictures."""

    def __init__(self, query: Ragged, grids: Tensor, boxes: Tensor, term: Term) -> None:
        """query: [Q] cells. grids: [A, 2] of the target views. boxes: [A, V, 5] of all views."""
        self._query, self._boxes = query, boxes
        self._extent = query.spread(grids)
        self._centre = (_places(query, grids) + 0.5) / self._extent
        self._box = query.spread(boxes[:, int(term.view == "other")])

    def seen_from(self, view: int, grids: Tensor) -> Ragged:  # [A, 2] -> [Q, 4]
        """Return the positions in a view, whose grids are given."""
        query = self._query
        box = query.spread(self._boxes[:, view])
        fraction, ratio = fractions_of_centres(box, self._box, self._centre)
        position = grid_positions(
            fraction, ratio, input_grid=query.spread(grids), target_grid=self._extent
        )
        return query.with_values(position)


def _places(cells: Ragged, grids: Tensor) -> Tensor:  # [T], [A, 2] -> [T, 2]
    """Return the rows and columns of cells of these grids."""
    columns = cells.spread(grids[:, 1])
    return torch.stack([cells.values // columns, cells.values % columns], 1)
