"""Terms whose z is a cell's assignment to prototypes, as iBOT's and DINOv2's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from m3i_fast.config.objective.objective import ObjectiveConfig, Term
from m3i_fast.models.transformer.ragged import (
    Cells,
    Ragged,
    alike,
    gather_cells,
    rows_of,
)
from m3i_fast.objectives.heads import PrototypeHead
from m3i_fast.objectives.losses.stateful import Prototypes
from m3i_fast.objectives.step_context import Monitor, StepContext
from m3i_fast.objectives.terms.base import Sizes, momentum_copy
from m3i_fast.objectives.terms.dense import Asked, Dense
from m3i_fast.objectives.terms.views import log_assignment, target_prototypes


class CellPrototypes(Dense):
    """A term whose z is the momentum encoder's assignment of single cells to prototypes.

    The projector predicts at the encoder's tokens of hidden cells, which are mask tokens in its
    input (iBOT, arXiv 2111.07832); symmetric, of both views. The decoder predicts from the cells
    shown, of either view. The mean is over pictures, of the mean over each picture's masked cells,
    as the paper's: over all rows where pictures have as many cells each.
    """

    loss: Prototypes

    def __init__(self, term: Term, cfg: ObjectiveConfig, sizes: Sizes) -> None:
        super().__init__(term, cfg, sizes)
        self.head = PrototypeHead(sizes.vision.dim, cfg.projector, cfg.num_prototypes)
        self.momentum = momentum_copy(self.head, sizes)

    def momentum_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        yield self.momentum, self.head

    def forward(
        self,
        step: StepContext,
        monitor: Monitor | None,
        project: nn.Module | None = None,
        asked: Asked | None = None,
        answers: Sequence[Cells] = (),
    ) -> tuple[Tensor, Tensor | int]:
        """Compute the loss as `TermModule.forward`; asked and answers as in `Dense`."""
        term = self.term
        views = (0, 1) if term.symmetric else (int(term.view == "other"),)
        queries = [asked.query if asked is not None else self._query(step, v) for v in views]
        if not answers:
            shown = (step.mix.take_cells(step.encoded.views[view], term.asked) for view in views)
            answers = [gather_cells(tokens, q) for tokens, q in zip(shown, queries, strict=True)]
        prototypes = self.head.directions()
        pairs = zip(views, queries, strict=True)
        with torch.no_grad():
            assigned = self.loss.targets(
                [self.momentum(self._target_tokens(step, *pair)) for pair in pairs],
                target_prototypes(term, self.momentum, prototypes),
            )
        if monitor is not None:
            for z in assigned:
                log_assignment(monitor, term.name, z)
        # Of a decoder the input's answers come first, then those of all local views together.
        z_hats: list[Tensor] = []
        for number, cells in enumerate(answers):
            of_view = rows_of(queries[number if term.symmetric else 0])
            z_hats += self.head(rows_of(cells)).split(len(of_view))
        if not alike(queries):
            assigned = [
                replace(z, row_weights=query.shares(z.z_hat.dtype))
                for z, query in zip(assigned, queries, strict=True)
                if isinstance(query, Ragged)
            ]
        targets = assigned if len(z_hats) == len(assigned) else assigned * len(z_hats)
        own = step.weight.own_rows
        weight = {} if own == 1.0 else {"weight": own}
        value = self.loss(z_hats, targets, prototypes, **weight)
        return value, len(queries[0]) * len(views)

    def _target_tokens(self, step: StepContext, view: int, query: Cells) -> Tensor:  # [A Q, C]
        tokens = step.target_tokens(self.term.target_encoder, view, self.term.asked)
        return rows_of(gather_cells(tokens, query))
