"""Gram anchoring: cells stay as alike as an earlier encoder, or a teacher, found them.

Legend: A images, n cells that an image shows, C width of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m3i_fast.config.objective.objective import ObjectiveConfig, Term
from m3i_fast.models.transformer.packing import to_device
from m3i_fast.models.transformer.ragged import Cells, Ragged, alike, gather_cells, rows_of
from m3i_fast.objectives.monitors import mean_cosine
from m3i_fast.objectives.row_statistics import full_precision, unit_rows, wide
from m3i_fast.objectives.step_context import Monitor, StepContext
from m3i_fast.objectives.terms.base import Sizes, TermModule


class Gram(TermModule):
    """A term whose z are the cosines of all pairs of cells for which the encoder has tokens.

    DINOv3, arXiv 2508.10104, section 4.2: |X X^T - X_G X_G^T|_F^2, rows of X of unit length, here
    over n^2, each picture's n where they differ. It leaves features free to move as long as their
    similarities stay. The target encoder sees the whole view, the image shows its own cells of it;
    hidden ones count where they are mask tokens.
    """

    def __init__(self, term: Term, cfg: ObjectiveConfig, sizes: Sizes) -> None:
        super().__init__(term, cfg, sizes.vision.grid**2, sizes)

    def forward(self, step: StepContext, monitor: Monitor | None) -> tuple[Tensor, Tensor | int]:
        term, mix = self.term, step.mix
        tokens = mix.take_cells(step.encoded.views[0], term.asked)
        with torch.no_grad():
            seen = step.target_tokens(term.target_encoder, 0, term.asked)
            if len(rows_of(seen)) > len(rows_of(tokens)):  # no token of hidden cells
                seen = gather_cells(seen, mix.own_cells(term.asked))
            z = cosines(_squares(seen))
        z_hat = cosines(_squares(tokens))
        if monitor is not None:
            rows = z.shape[0] * z.shape[1] / len(rows_of(tokens))  # those of padding have cosine 0
            monitor(f"{term.name}_cosine", rows * mean_cosine(z_hat.detach(), z))
        if isinstance(tokens, Ragged) and not alike([tokens]):
            # The mean over all pairs is then that over pictures of each one's mean over its own.
            cells = torch.tensor(tokens.lengths, dtype=torch.float64)
            scale = to_device((cells.max() / cells).to(z.dtype), z.device)[:, None, None]
            z_hat, z = scale * z_hat, scale * z
        return self.loss(z_hat, z), len(tokens)


def _squares(tokens: Cells) -> Tensor:  # [A, n, C]
    """Return as many cells of each image: of unequal ones with rows of 0, whose cosines are 0."""
    return tokens.padded() if isinstance(tokens, Ragged) else tokens


@full_precision
def cosines(tokens: Tensor) -> Tensor:  # [A, n, C] -> [A, n, n] fp32
    """Return the cosine of each pair of an image's tokens."""
    rows = unit_rows(wide(tokens))
    return rows @ rows.mT
