"""A term without a prediction: the entropy H(p(z)) of the encoder's own summaries alone."""

from __future__ import annotations

import torch
from torch import Tensor

from m3i_fast.config.objective.objective import ObjectiveConfig, Term
from m3i_fast.objectives.losses.sigreg import SigReg
from m3i_fast.objectives.step_context import Monitor, StepContext
from m3i_fast.objectives.terms.base import Sizes, TermModule, log_spread


class Summary(TermModule):
    """A term that spreads the encoder's summaries of a view apart: KoLeo in DINOv2, or SIGReg.

    Its loss takes the mean summary of each image, before any head, and no prediction. The value is
    the mean over both global views, each by itself: views of one picture are not kept apart.
    """

    def __init__(self, term: Term, cfg: ObjectiveConfig, sizes: Sizes) -> None:
        super().__init__(term, cfg, sizes.vision.summary_dim, sizes)

    def forward(self, step: StepContext, monitor: Monitor | None) -> tuple[Tensor, Tensor | int]:
        views = [step.embedding(number) for number in range(len(step.encoded.views))]
        log_spread(monitor, self.term.name, z_hat=None, z=views[0])
        if isinstance(self.loss, SigReg):
            return self.loss(torch.stack(views), step.slice_key), len(step.mix.sample)
        return torch.stack([self.loss(z) for z in views]).mean(), len(step.mix.sample)
