"""Terms with one target a view: its embedding, or its assignment to prototypes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from m3i_fast.config.objective.objective import ObjectiveConfig, Term
from m3i_fast.objectives.heads import Mlp, PrototypeHead
from m3i_fast.objectives.losses.stateful import Prototypes, UniGrad
from m3i_fast.objectives.step_context import Monitor, StepContext
from m3i_fast.objectives.terms.base import Sizes, TermModule, log_spread, momentum_copy
from m3i_fast.ops import SoftTargets


class Embedding(TermModule):
    """A term whose z is the projected mean of a view's features."""

    def __init__(self, term: Term, cfg: ObjectiveConfig, sizes: Sizes) -> None:
        sized, frozen = cfg.projector, term.encoder == "frozen"
        dim = sizes.summary_dim[term.target_encoder] if frozen else sized.output_dim
        super().__init__(term, cfg, dim, sizes)
        self.dim = dim
        hidden = [sized.hidden_dim] * (sized.num_layers - 1)
        dims = sizes.vision.summary_dim, *hidden, dim
        group = sizes.process_group
        self.projector = Mlp(
            *dims, batch_norm=True, output_norm=term.output_norm, process_group=group
        )
        self.predictor: nn.Module = nn.Identity()
        if term.predictor == "projector_predictor":
            self.predictor = Mlp(
                dim, sized.predictor_hidden_dim, dim, batch_norm=True, process_group=group
            )
        self.momentum = momentum_copy(self.projector, sizes) if term.encoder == "momentum" else None

    def momentum_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        if self.momentum is not None:
            yield self.momentum, self.projector

    def forward(self, step: StepContext, monitor: Monitor | None) -> tuple[Tensor, Tensor | int]:
        pairs = [(0, int(self.term.view == "other"))]
        if self.term.symmetric:
            pairs.append((1, 0))
        used_views = {of for of, _ in pairs} | (
            {to for _, to in pairs} if self.term.encoder == "shared" else set()
        )
        projected = {view: self.projector(step.embedding(view)) for view in sorted(used_views)}
        targets = [self._target(step, projected, to) for _, to in pairs]
        if isinstance(self.loss, UniGrad):
            self.loss.observe(targets)
        values = []
        for (of, _), z in zip(pairs, targets, strict=True):
            z_hat = self.predictor(projected[of])
            log_spread(monitor, self.term.name, z_hat=z_hat, z=z)
            values.append(self.loss(z_hat, z, **self.counts(step)))
        return torch.stack(values).mean(), len(step.mix.sample)

    def _target(self, step: StepContext, projected: Mapping[int, Tensor], view: int) -> Tensor:
        if self.term.encoder == "shared":
            stops = self.term.regulariser == "stop_gradient"
            return projected[view].detach() if stops else projected[view]
        with torch.no_grad():
            embedded = step.target_embedding(self.term.target_encoder, view)
            return embedded if self.momentum is None else self.momentum(embedded)


class PrototypeTerm(TermModule):
    """A term whose z is a view's assignment to prototypes.

    The momentum encoder assigns, or the encoder itself where there is none.
    """

    loss: Prototypes

    def __init__(self, term: Term, cfg: ObjectiveConfig, sizes: Sizes) -> None:
        super().__init__(term, cfg, cfg.num_prototypes, sizes)
        self.head = PrototypeHead(sizes.vision.summary_dim, cfg.projector, cfg.num_prototypes)
        self.momentum = momentum_copy(self.head, sizes) if term.encoder == "momentum" else None

    def momentum_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        if self.momentum is not None:
            yield self.momentum, self.head

    def forward(self, step: StepContext, monitor: Monitor | None) -> tuple[Tensor, Tensor | int]:
        """Predict from every view of the picture the assignment of every other target view."""
        views = (0, 1) if self.term.symmetric else (int(self.term.view == "other"),)
        inputs = range(2) if self.term.sees_both_views else range(1)
        order = step.mix.sample.argsort()  # local views are in the order of samples
        prototypes = self.head.directions()
        rows = {n: self.head(step.embedding(n)) for n in (*inputs, *step.local_indices)}
        assigned = self.loss.targets(
            [self._target_rows(step, rows, view) for view in views],
            target_prototypes(self.term, self.momentum, prototypes),
        )
        predictions: list[Tensor] = []
        targets: list[SoftTargets] = []
        for view, z in zip(views, assigned, strict=True):
            if monitor is not None:
                log_assignment(monitor, self.term.name, z)
            for number, z_hat in rows.items():
                if number in step.local_indices:
                    predictions.append(z_hat)
                    targets.append(replace(z, z_hat=z.z_hat[order]))
                elif number != view or self.term.view == "same":
                    predictions.append(z_hat)
                    targets.append(z)
        own = step.weight.own_rows
        weight = {} if own == 1.0 else {"weight": own}
        return self.loss(predictions, targets, prototypes, **weight), len(step.mix.sample)

    @torch.no_grad()
    def _target_rows(
        self, step: StepContext, own: Mapping[int, Tensor], view: int
    ) -> Tensor:  # [I, E]
        if self.momentum is None:
            return own[view].detach()
        return self.momentum(step.target_embedding(self.term.target_encoder, view))


@torch.no_grad()
def target_prototypes(term: Term, momentum: nn.Module | None, own: Tensor) -> Tensor:  # [K, E]
    """Return the prototypes that targets are assigned to, given the unit rows of the head's own.

    MSN learns prototypes with the encoder; DINO's teacher has averaged ones.
    """
    if momentum is None or term.regulariser == "mean_entropy":
        return own.detach()
    assert isinstance(momentum, PrototypeHead)
    return momentum.directions()


@torch.no_grad()
def log_assignment(monitor: Monitor, name: str, z: SoftTargets) -> None:
    """Log `NAME_use` and `NAME_doubt`, relative entropies in [0, 1], of N rows and K prototypes.

    Use: entropy of the mean assignment over the largest one that N sure assignments can have, or 1
    where doubtful ones have more. Doubt: mean entropy of an assignment over log K, 1 where it is
    uniform. Assignments are computed in blocks of rows.
    """
    num_rows, num_prototypes = len(z.z_hat), len(z.z)
    total = doubt = z.scale.new_zeros(num_prototypes)
    for _, share in z.blocks():
        total = total + share.sum(0)
        doubt = doubt - torch.xlogy(share, share).sum(0)
    mean = total / num_rows
    used = -torch.xlogy(mean, mean).sum() / math.log(max(min(num_rows, num_prototypes), 2))
    monitor(f"{name}_use", used.clamp(max=1))
    monitor(f"{name}_doubt", doubt.sum() / num_rows / math.log(num_prototypes))
