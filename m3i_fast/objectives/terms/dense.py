"""Dense targets: pixels, features or projections of single cells."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from m3i_fast.config.objective import ObjectiveConfig, Term
from m3i_fast.models.transformer.blocks import Linear
from m3i_fast.models.transformer.positions import relative_positions
from m3i_fast.objectives.heads import DenseDecoder, Mlp
from m3i_fast.objectives.monitors import log_prediction
from m3i_fast.objectives.standardise import Standardise
from m3i_fast.objectives.step_context import Monitor, StepContext
from m3i_fast.objectives.targets import (
    cell_contrast,
    normalise_tokens,
    normalise_views,
    normalised_pixels,
    prefer_cells,
)
from m3i_fast.objectives.terms.base import Sizes, TermModule, log_spread, momentum_copy


class Dense(TermModule):
    """A term whose z are pixels or features of single cells, of the input's view or another one."""

    decoder_key: str | None
    """Key of the decoder that terms of one kind of target share; None for a linear predictor."""
    standardise: Standardise | None

    def __init__(self, term: Term, cfg: ObjectiveConfig, sizes: Sizes) -> None:
        vision = sizes.vision
        dim = dense_dim(term, cfg, sizes)
        super().__init__(term, cfg, dim, sizes)
        self.grid, self.patch_size = vision.grid, vision.image_size // vision.grid
        self.num_queries, self.min_contrast = cfg.mixing.num_queries, cfg.mixing.min_contrast
        self.standardise = None
        if term.standardise != "none":
            self.standardise = Standardise(dim, term.standardise, sizes.process_group)
        self.decoder_key = None if term.predictor == "linear" else f"{term.target}_{term.encoder}"
        if term.predictor == "linear":
            self.predictor = Linear(vision.dim, dim)

    def forward(
        self,
        step: StepContext,
        monitor: Monitor | None,
        decoder: DenseDecoder | None = None,
        project: nn.Module | None = None,
    ) -> tuple[Tensor, Tensor | int]:
        """Compute the loss as `TermModule.forward`.

        decoder: the one of `decoder_key`. project: the EMA of its projector, applied to targets.
        """
        term, mix = self.term, step.mix
        rows = mix.asked(term.asked)
        query = self._query(step, rows)
        target = self._target(step, rows, query, project)
        tokens = step.encoded.views[0][rows]
        if decoder is None:
            z_hat = self.predictor(gather_cells(tokens, query))
        else:
            index = mix.token_index[rows]
            position = self._position(step, rows, query, view=0, input_grid=self.grid)
            z_hat = decoder(tokens, index, position)
        if monitor is not None:
            z = normalise_tokens(target) if term.target == "features" else target
            log_prediction(monitor, term.name, z_hat=z_hat, z=z)
        of_views = [z_hat]
        if term.view == "other" and decoder is not None and step.encoded.local:
            of_views += self._from_local(step, rows, query, decoder)
        losses = [self.loss(z_hat, target) for z_hat in of_views]
        return torch.stack(losses).mean(), len(rows)

    def _query(self, step: StepContext, rows: Tensor) -> Tensor:  # [A, Q] int64
        """Return the cells to predict; with min_contrast those of enough contrast first."""
        term = self.term
        query = step.mix.queries(term.asked, own=term.view == "same")
        if not self.min_contrast:
            return query
        views = step.batch.global_views[int(term.view == "other")]
        contrast = cell_contrast(views[step.mix.sample[rows]], self.patch_size)
        most = query.shape[1]
        number = min(self.num_queries or most, most)
        return prefer_cells(query, contrast >= self.min_contrast, number)

    @torch.no_grad()
    def _target(
        self, step: StepContext, rows: Tensor, query: Tensor, project: nn.Module | None
    ) -> Tensor:  # [A, Q, E]
        term, view = self.term, int(self.term.view == "other")
        if term.target == "features":
            tokens = gather_cells(step.target_tokens(term.encoder, view, term.asked), query)
            tokens = tokens if project is None else project(tokens)
            return tokens if self.standardise is None else self.standardise(tokens)
        images = normalise_views(
            step.batch.global_views[view], step.mix.sample[rows], torch.float32
        )
        return gather_cells(normalised_pixels(images, self.patch_size), query)

    def _position(
        self, step: StepContext, rows: Tensor, query: Tensor, *, view: int, input_grid: int
    ) -> Tensor:  # [A, Q, 4]
        boxes = step.batch.boxes[step.mix.sample[rows]]  # [A, V + L, 5]
        return relative_positions(
            boxes[:, view],
            boxes[:, int(self.term.view == "other")],
            query,
            input_grid=input_grid,
            target_grid=self.grid,
        )

    def _from_local(
        self,
        step: StepContext,
        rows: Tensor,
        query: Tensor,
        decoder: DenseDecoder,
    ) -> tuple[Tensor, ...]:  # [A, Q, E] of each local view
        """Predict the same cells of the other view from all local views, in one decoder call."""
        samples, local = step.mix.sample[rows], step.encoded.local
        side = math.isqrt(local[0].shape[1])
        first = len(step.batch.global_views)
        position = [
            self._position(step, rows, query, view=first + number, input_grid=side)
            for number in range(len(local))
        ]
        tokens = torch.cat([view[samples] for view in local])
        # Cell (u, v) of a smaller grid has the position code of cell (u, v) of the large one.
        line = torch.arange(side, device=tokens.device)
        index = (line[:, None] * self.grid + line[None, :]).flatten().expand(len(tokens), -1)
        return decoder(tokens, index, torch.cat(position)).split(len(samples))


def dense_dim(term: Term, cfg: ObjectiveConfig, sizes: Sizes) -> int:
    """Return the width of a dense term's target."""
    if cfg.projects(term):
        return cfg.decoder.dim
    if term.target == "features":
        return sizes.target_dim[term.encoder]
    return 3 * (sizes.vision.image_size // sizes.vision.grid) ** 2


def gather_cells(tokens: Tensor, index: Tensor) -> Tensor:  # [R, N, C], [R, Q] -> [R, Q, C]
    """Gather the tokens of Q cells of each row; index: int64."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


class DenseContrast(TermModule):
    """A term whose z is a projection of each cell, contrasted with other pictures' (DenseCL)."""

    def __init__(self, term: Term, cfg: ObjectiveConfig, sizes: Sizes) -> None:
        sized = cfg.projector
        super().__init__(term, cfg, sized.output_dim, sizes)
        dims = sizes.vision.dim, sized.hidden_dim, sized.output_dim
        self.projector = Mlp(*dims, batch_norm=False)
        self.momentum = momentum_copy(self.projector, sizes)

    def momentum_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        yield self.momentum, self.projector

    def forward(self, step: StepContext, monitor: Monitor | None) -> tuple[Tensor, Tensor | int]:
        term = self.term
        rows = step.mix.asked(term.asked)
        tokens = step.encoded.views[0][rows]
        target_tokens = step.target_tokens(term.encoder, int(term.view == "other"), term.asked)
        z_hat = self.projector(tokens)
        with torch.no_grad():
            z = self.momentum(target_tokens)
        log_spread(monitor, term.name, z_hat=None, z=z.flatten(0, 1))
        return self.loss(z_hat, z, tokens.detach(), target_tokens), len(rows)
