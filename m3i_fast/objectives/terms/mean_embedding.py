"""A term whose target is the mean over a picture's global views: LeJEPA."""

from __future__ import annotations

import torch
from torch import Tensor

from m3i_fast.config.objective.objective import ObjectiveConfig, Term
from m3i_fast.objectives.heads import Mlp
from m3i_fast.objectives.losses.sigreg import LeJepa
from m3i_fast.objectives.step_context import Monitor, StepContext
from m3i_fast.objectives.terms.base import Sizes, TermModule, log_spread


class MeanEmbedding(TermModule):
    """A term whose z is the mean of the projected global views, which every view is held to.

    The gradient goes through z too; nothing is averaged over steps. All views are projected in one
    call, so that a batch norm has the statistics of all of them.
    """

    loss: LeJepa

    def __init__(self, term: Term, cfg: ObjectiveConfig, sizes: Sizes) -> None:
        sized = cfg.projector
        super().__init__(term, cfg, sized.output_dim, sizes)
        hidden = [sized.hidden_dim] * (sized.num_layers - 1)
        self.projector = Mlp(
            sizes.vision.summary_dim,
            *hidden,
            sized.output_dim,
            batch_norm=True,
            output_norm=term.output_norm,
            process_group=sizes.process_group,
        )

    def forward(self, step: StepContext, monitor: Monitor | None) -> tuple[Tensor, Tensor | int]:
        count, sample = len(step.encoded.views), step.mix.sample
        means = [step.embedding(number) for number in range(count)]
        means += [step.embedding(number)[sample] for number in step.local_indices]
        z_hat = self.projector(torch.cat(means)).unflatten(0, (len(means), -1))  # [V, I, E]
        z = z_hat[:count].mean(0)
        log_spread(monitor, self.term.name, z_hat=z_hat[0], z=z_hat[1])  # each is half of z
        if monitor is not None:
            monitor(f"{self.term.name}_sigreg", self.loss.spread(z_hat.detach(), step.slice_key))
        return self.loss(z_hat, z.expand_as(z_hat), step.slice_key), len(sample)
