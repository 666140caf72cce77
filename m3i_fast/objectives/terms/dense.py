"""Dense targets: pixels, features or projections of single cells."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from m3i_fast.config.objective.objective import ObjectiveConfig, Term
from m3i_fast.models.transformer.layers import Linear
from m3i_fast.models.transformer.positions import grid_positions, relative_fractions
from m3i_fast.models.transformer.ragged import (
    Cells,
    Ragged,
    alike,
    gather_cells,
    mapped,
    prefer_rows,
    tensor_of,
)
from m3i_fast.objectives.any_shape.questions import (
    packed_questions,
    target_patches,
    target_pixels,
)
from m3i_fast.objectives.heads import Mlp, PackedQuestion, Question
from m3i_fast.objectives.losses.dense import gaussian_of_rows
from m3i_fast.objectives.monitors import log_prediction
from m3i_fast.objectives.phi_s import PhiStandardise, read_statistics
from m3i_fast.objectives.row_statistics import wide
from m3i_fast.objectives.standardise import Standardise
from m3i_fast.objectives.step_context import Monitor, StepContext
from m3i_fast.objectives.targets import (
    cell_contrast,
    normalise_tokens,
    normalise_views,
    normalised_pixels,
    patch_contrast,
    prefer_cells,
)
from m3i_fast.objectives.terms.base import Sizes, TermModule, log_spread, momentum_copy


class Asked(NamedTuple):
    """What a term asks of its decoder, of its own view and then of all local views together."""

    query: Cells  # [A, Q] int64, the cells to predict
    questions: list[Question] | list[PackedQuestion]


class Dense(TermModule):
    """A term whose z are pixels or features of single cells, of the input's view or another one."""

    decoder_key: str | None
    """Key of the decoder that terms of one kind of target share; None for another predictor."""
    standardise: Standardise | PhiStandardise | None

    def __init__(self, term: Term, cfg: ObjectiveConfig, sizes: Sizes) -> None:
        vision = sizes.vision
        dim = dense_dim(term, cfg, sizes)
        super().__init__(term, cfg, dim, sizes)
        self.grid, self.patch_size = vision.grid, vision.image_size // vision.grid
        self.num_queries, self.min_contrast = cfg.mixing.num_queries, cfg.mixing.min_contrast
        self.standardise = _standardise(term, dim, sizes)
        self.decoder_key = None
        if term.predictor == "decoder":
            # A teacher's own name is no name of a module.
            source = term.encoder if term.teacher is None else term.name
            self.decoder_key = f"{term.target}_{source}"
        if term.predictor == "linear":
            self.predictor = Linear(vision.dim, dim)

    def ask(self, step: StepContext) -> Asked:
        """Return what is asked of the decoder of `decoder_key`, and which cells it predicts."""
        term, mix = self.term, step.mix
        query = self._query(step, int(term.view == "other"))
        if isinstance(query, Ragged):
            return Asked(query, packed_questions(step, term, query))
        local = list(map(tensor_of, step.encoded.local))
        samples = mix.take(mix.sample, term.asked)
        boxes = step.batch.boxes[samples]  # [A, V + L, 5]
        inputs = [boxes[:, :1]]
        if asks_local := bool(local) and term.view == "other":
            first = len(step.batch.global_views)
            inputs.append(boxes[:, first : first + len(local)])
        fraction, ratio = relative_fractions(
            torch.cat(inputs, 1).transpose(0, 1),  # [1 + L, A, 5]
            boxes[:, int(term.view == "other")],
            query,
            target_grid=self.grid,
        )
        place = partial(grid_positions, target_grid=self.grid)
        own = Question(
            mix.take(tensor_of(step.encoded.views[0]), term.asked),
            mix.take(mix.token_index, term.asked),
            place(fraction[0], ratio[0], input_grid=self.grid),
        )
        if not asks_local:
            return Asked(query, [own])
        side = math.isqrt(local[0].shape[1])
        position = place(fraction[1:], ratio[1:], input_grid=side).flatten(0, 1)
        tokens = torch.cat([view.index_select(0, samples) for view in local])
        # Cell (u, v) of a smaller grid has the position code of cell (u, v) of the large one.
        line = torch.arange(side, device=tokens.device)
        index = (line[:, None] * self.grid + line[None, :]).flatten().expand(len(tokens), -1)
        return Asked(query, [own, Question(tokens, index, position)])

    def forward(
        self,
        step: StepContext,
        monitor: Monitor | None,
        project: nn.Module | None = None,
        asked: Asked | None = None,
        answers: Sequence[Cells] = (),
    ) -> tuple[Tensor, Tensor | int]:
        """Compute the loss as `TermModule.forward`.

        project: the EMA of the decoder's projector, applied to targets. asked, answers: the
        questions and the decoder's predictions, [A, Q, E] and of local views [L A, Q, E].
        """
        term = self.term
        query = asked.query if asked is not None else self._query(step, int(term.view == "other"))
        target = self._target(step, query, project)
        if not answers:
            tokens = step.mix.take_cells(step.encoded.views[0], term.asked)
            answers = [mapped(self.predictor, gather_cells(tokens, query))]
        if monitor is not None:
            z = tensor_of(target)
            z = normalise_tokens(z) if term.layer_norms else z
            log_prediction(monitor, term.name, z_hat=tensor_of(answers[0]), z=z)
            if isinstance(self.standardise, PhiStandardise):
                monitor(f"{term.name}_scale", self.standardise.scale)
        z_hat = (
            tensor_of(answers[0]) if len(answers) == 1 else torch.cat([*map(tensor_of, answers)])
        )
        return self._mean_loss(z_hat, target, step), len(query)

    def _mean_loss(self, z_hat: Tensor, target: Cells, step: StepContext) -> Tensor:  # -> []
        """Return the mean loss over V predictions of one target, [V A, Q, E] and [A, Q, E].

        Each picture counts alike, also where pictures have unequal numbers of cells to predict.
        """
        z, options = tensor_of(target), self._weights(target, step)
        count = len(z_hat) // len(z)
        if count == 1:
            return self.loss(z_hat, z, **options)
        if getattr(self.loss, "func", None) is gaussian_of_rows:  # itself a mean over rows
            if "shares" in options:
                options["shares"] = options["shares"].repeat(count) / count
            return self.loss(z_hat, z.repeat(count, *(1,) * (z.dim() - 1)), **options)
        return torch.stack([self.loss(each, z, **options) for each in z_hat.chunk(count)]).mean()

    def _weights(self, target: Cells, step: StepContext) -> dict[str, Any]:
        """Return what the loss is told where rows, or ranks, count unequally."""
        options: dict[str, Any] = {}
        if isinstance(target, Ragged) and not alike([target]):
            options["shares"] = target.shares(wide(target.values[:0]).dtype)
        if self.term.decorrelates and step.weight.counts:
            options["rank_weight"] = step.weight.own_rows / step.weight.all_rows
        return options

    def _query(self, step: StepContext, view: int) -> Cells:  # [A, Q] int64
        """Return the cells of a view to predict; with min_contrast those of enough contrast."""
        term = self.term
        query = step.mix.queries_of(view, term.asked, own=term.view == "same")
        if not self.min_contrast:
            return query
        if isinstance(query, Ragged):
            patches = target_patches(step, term, view, query)
            return prefer_rows(
                query, patch_contrast(patches) >= self.min_contrast, self.num_queries
            )
        samples = step.mix.take(step.mix.sample, term.asked)
        contrast = cell_contrast(step.batch.global_views[view][samples], self.patch_size)
        most = query.shape[1]
        number = min(self.num_queries or most, most)
        return prefer_cells(query, contrast >= self.min_contrast, number)

    @torch.no_grad()
    def _target(
        self, step: StepContext, query: Cells, project: nn.Module | None
    ) -> Cells:  # [A, Q, E]
        term, view = self.term, int(self.term.view == "other")
        if term.target == "features":
            tokens = gather_cells(step.target_tokens(term.target_encoder, view, term.asked), query)
            tokens = tokens if project is None else mapped(project, tokens)
            return tokens if self.standardise is None else mapped(self.standardise, tokens)
        if isinstance(query, Ragged):
            return target_pixels(step, term, query)
        samples = step.mix.take(step.mix.sample, term.asked)
        images = normalise_views(step.batch.global_views[view], samples, torch.float32)
        return gather_cells(normalised_pixels(images, self.patch_size), query)


def _standardise(term: Term, dim: int, sizes: Sizes) -> Standardise | PhiStandardise | None:
    match term.standardise:
        case "none":
            return None
        case "phi_s":
            known = read_statistics(Path(term.statistics), dim) if term.statistics else None
            return PhiStandardise(dim, sizes.process_group, known)
        case over:
            return Standardise(dim, over, sizes.process_group)


def dense_dim(term: Term, cfg: ObjectiveConfig, sizes: Sizes) -> int:
    """Return the width of a dense term's target."""
    if cfg.projects(term):
        return cfg.decoder.dim
    if term.encoder != "none":
        return sizes.target_dim[term.target_encoder]
    return 3 * (sizes.vision.image_size // sizes.vision.grid) ** 2


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
        tokens = step.mix.take_cells(step.encoded.views[0], term.asked)
        view = int(term.view == "other")
        target_tokens = step.target_tokens(term.target_encoder, view, term.asked)
        assert isinstance(tokens, Tensor)  # any_shape_conflicts
        assert isinstance(target_tokens, Tensor)
        z_hat = self.projector(tokens)
        with torch.no_grad():
            z = self.momentum(target_tokens)
        log_spread(monitor, term.name, z_hat=None, z=z.flatten(0, 1))
        return self.loss(z_hat, z, tokens.detach(), target_tokens), len(tokens)


def build(term: Term, cfg: ObjectiveConfig, sizes: Sizes) -> TermModule:
    """Build a term of cells by its predictor."""
    contrasts = term.predictor == "projector"
    return DenseContrast(term, cfg, sizes) if contrasts else Dense(term, cfg, sizes)
