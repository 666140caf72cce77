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
from m3i_fast.objectives.monitors import watch_prediction
from m3i_fast.objectives.standardise import Standardise
from m3i_fast.objectives.step_context import Monitor, Seen
from m3i_fast.objectives.targets import (
    cell_contrast,
    normalise_tokens,
    normalise_views,
    normalised_pixels,
    prefer,
)
from m3i_fast.objectives.terms.base import Sizes, TermModule, follower, watch


class Dense(TermModule):
    """z: pixels or features of single cells, of the input's view or of another one."""

    decoder_key: str | None
    """Of the decoder that terms of one kind of target share; None for a linear predictor."""
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
        seen: Seen,
        monitor: Monitor | None,
        decoder: DenseDecoder | None = None,
        project: nn.Module | None = None,
    ) -> tuple[Tensor, Tensor | int]:
        """project: what follows the decoder's projector by EMA, of targets."""
        term, mix = self.term, seen.mix
        rows = mix.asked(term.asked)
        query = self._query(seen, rows)
        target = self._target(seen, rows, query, project)
        tokens = seen.encoded.views[0][rows]
        if decoder is None:
            z_hat = self.predictor(take(tokens, query))
        else:
            index = mix.token_index[rows]
            position = self._position(seen, rows, query, view=0, input_grid=self.grid)
            z_hat = decoder(tokens, index, position)
        if monitor is not None:
            z = normalise_tokens(target) if term.target == "features" else target
            watch_prediction(monitor, term.name, z_hat=z_hat, z=z)
        of_views = [z_hat]
        if term.view == "other" and decoder is not None and seen.encoded.local:
            of_views += self._from_local(seen, rows, query, decoder)
        losses = [self.loss(z_hat, target) for z_hat in of_views]
        return torch.stack(losses).mean(), len(rows)

    def _query(self, seen: Seen, rows: Tensor) -> Tensor:  # [A, Q] int64
        """The cells that are predicted: where min_contrast asks for it, those with a content."""
        term = self.term
        query = seen.mix.queries(term.asked, own=term.view == "same")
        if not self.min_contrast:
            return query
        views = seen.batch.global_views[int(term.view == "other")]
        contrast = cell_contrast(views[seen.mix.sample[rows]], self.patch_size)
        most = query.shape[1]
        return prefer(query, contrast >= self.min_contrast, min(self.num_queries or most, most))

    @torch.no_grad()
    def _target(
        self, seen: Seen, rows: Tensor, query: Tensor, project: nn.Module | None
    ) -> Tensor:  # [A, Q, E]
        term, view = self.term, int(self.term.view == "other")
        if term.target == "features":
            tokens = take(seen.target_tokens(term.encoder, view, term.asked), query)
            tokens = tokens if project is None else project(tokens)
            return tokens if self.standardise is None else self.standardise(tokens)
        images = normalise_views(
            seen.batch.global_views[view], seen.mix.sample[rows], torch.float32
        )
        return take(normalised_pixels(images, self.patch_size), query)

    def _position(
        self, seen: Seen, rows: Tensor, query: Tensor, *, view: int, input_grid: int
    ) -> Tensor:  # [A, Q, 4]
        boxes = seen.batch.boxes[seen.mix.sample[rows]]  # [A, V + L, 5]
        return relative_positions(
            boxes[:, view],
            boxes[:, int(self.term.view == "other")],
            query,
            input_grid=input_grid,
            target_grid=self.grid,
        )

    def _from_local(
        self,
        seen: Seen,
        rows: Tensor,
        query: Tensor,
        decoder: DenseDecoder,
    ) -> tuple[Tensor, ...]:  # [A, Q, E] of each local view
        """Local views of the asked images predict the same cells of the other view, in one call."""
        samples, local = seen.mix.sample[rows], seen.encoded.local
        side = math.isqrt(local[0].shape[1])
        first = len(seen.batch.global_views)
        position = [
            self._position(seen, rows, query, view=first + number, input_grid=side)
            for number in range(len(local))
        ]
        tokens = torch.cat([view[samples] for view in local])
        # Cell (u, v) of a smaller grid has the position code of cell (u, v) of the large one.
        line = torch.arange(side, device=tokens.device)
        index = (line[:, None] * self.grid + line[None, :]).flatten().expand(len(tokens), -1)
        return decoder(tokens, index, torch.cat(position)).split(len(samples))


def dense_dim(term: Term, cfg: ObjectiveConfig, sizes: Sizes) -> int:
    """Width of a dense target."""
    if cfg.projects(term):
        return cfg.decoder.dim
    if term.target == "features":
        return sizes.target_dim[term.encoder]
    return 3 * (sizes.vision.image_size // sizes.vision.grid) ** 2


def take(tokens: Tensor, index: Tensor) -> Tensor:  # [R, N, C], [R, Q] -> [R, Q, C]
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


class DenseContrast(TermModule):
    """z: a projection of each cell's features, among those of other pictures (DenseCL)."""

    def __init__(self, term: Term, cfg: ObjectiveConfig, sizes: Sizes) -> None:
        sized = cfg.projector
        super().__init__(term, cfg, sized.output_dim, sizes)
        dims = sizes.vision.dim, sized.hidden_dim, sized.output_dim
        self.projector = Mlp(*dims, batch_norm=False)
        self.momentum = follower(self.projector, sizes)

    def momentum_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        yield self.momentum, self.projector

    def forward(self, seen: Seen, monitor: Monitor | None) -> tuple[Tensor, Tensor | int]:
        term = self.term
        rows = seen.mix.asked(term.asked)
        tokens = seen.encoded.views[0][rows]
        of_target = seen.target_tokens(term.encoder, int(term.view == "other"), term.asked)
        z_hat = self.projector(tokens)
        with torch.no_grad():
            z = self.momentum(of_target)
        watch(monitor, term.name, z_hat=None, z=z.flatten(0, 1))
        return self.loss(z_hat, z, tokens.detach(), of_target), len(rows)
