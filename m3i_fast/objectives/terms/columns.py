"""Terms whose targets are named columns of the data: sets of labels, and numbers.

Legend: N rows (images of inputs and local views), M most labels of a picture, L labels that there
are, K numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m3i_fast.config.columns import NO_LABELS
from m3i_fast.config.objective.objective import ObjectiveConfig, Term
from m3i_fast.objectives.heads import GlobalHead
from m3i_fast.objectives.row_statistics import ratio_over_ranks, wide
from m3i_fast.objectives.step_context import Monitor, StepContext
from m3i_fast.objectives.terms.base import Sizes, weighted
from m3i_fast.objectives.terms.labels import Annotation


class Labels(Annotation):
    """A term whose z are 0 or 1 for each label of a set: whether the picture has it."""

    def __init__(self, term: Term, cfg: ObjectiveConfig, sizes: Sizes) -> None:
        count = sizes.column_of(term).num_names
        super().__init__(term, cfg, count, sizes)
        self.num_labels = count
        self.head = GlobalHead(sizes.vision.summary_dim, cfg.head_hidden_dim, count)

    def logits(self, summary: Tensor) -> Tensor:  # [I, s, P] -> [I, L] fp32
        """Return the logits of the labels of images by their summaries, each a sigmoid's own."""
        return wide(self.head(summary))

    def forward(self, step: StepContext, monitor: Monitor | None) -> tuple[Tensor, Tensor | int]:
        ids = step.per_row(step.batch.columns[self.term.column])  # [N, M]
        members = ids[:, 0] != NO_LABELS
        logits = wide(self.head.of_means(self.mean_rows(step, monitor)))
        if self._known_empty(members):
            return logits.sum() * 0, 0
        z = many_hot(ids, self.num_labels)
        values = [
            weighted(
                weight * self._share(members[rows]),
                self.loss(logits[rows], z[rows], members=members[rows]),
            )
            for weight, rows in step.weighted_rows()
        ]
        if monitor is not None:
            best = z.gather(1, logits.detach().argmax(1, keepdim=True))[:, 0]
            some = z.any(1)
            hit = ratio_over_ranks(best.sum(), some.sum(), self.process_group)
            monitor(f"{self.term.name}_hit", hit.nan_to_num(0.0))
        return sum(values[1:], start=values[0]), members.sum()


def many_hot(ids: Tensor, count: int) -> Tensor:  # [N, M] int64 -> [N, count] fp32
    """Return 1 for the labels of each row, else 0; ids below 0 are none."""
    hot = torch.zeros(len(ids), count + 1, device=ids.device)
    return hot.scatter_(1, ids.clamp_min(-1) + 1, 1.0)[:, 1:]


class Numbers(Annotation):
    """A term whose z are numbers of the picture, less their mean in the data, over their deviation.

    Some of a picture's numbers, or all, may be unknown.
    """

    mean: Tensor  # [K] fp32
    std: Tensor  # [K] fp32

    def __init__(self, term: Term, cfg: ObjectiveConfig, sizes: Sizes) -> None:
        column = sizes.column_of(term)
        count = column.num_names
        super().__init__(term, cfg, count, sizes)
        self.column = column
        self.head = GlobalHead(sizes.vision.summary_dim, cfg.head_hidden_dim, count)
        self.register_buffer("mean", torch.empty(count))
        self.register_buffer("std", torch.empty(count))
        self.reset_own_parameters()

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        for buffer, values in ((self.mean, self.column.mean), (self.std, self.column.std)):
            buffer.copy_(torch.tensor(values))

    def predict(self, summary: Tensor) -> Tensor:  # [I, s, P] -> [I, K] fp32
        """Predict the numbers of images by their summaries, in the data's units."""
        return wide(self.head(summary)) * self.std + self.mean

    def forward(self, step: StepContext, monitor: Monitor | None) -> tuple[Tensor, Tensor | int]:
        values = step.batch.columns[self.term.column]  # [B, K], NaN where it is not known
        z = step.per_row((values - self.mean) / self.std)
        members = ~z.isnan().all(1)
        z_hat = wide(self.head.of_means(self.mean_rows(step, monitor)))
        if self._known_empty(members):
            return z_hat.sum() * 0, 0
        losses = [
            weighted(weight * self._share(members[rows]), self.loss(z_hat[rows], z[rows]))
            for weight, rows in step.weighted_rows()
        ]
        if monitor is not None:
            error = (z_hat - z).detach().square()
            count = (~error.isnan()).sum()
            mean = ratio_over_ranks(error.nansum(), count, self.process_group)
            monitor(f"{self.term.name}_r2", 1 - mean)
        return sum(losses[1:], start=losses[0]), members.sum()
