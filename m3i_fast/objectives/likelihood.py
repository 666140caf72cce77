"""The Boltzmann likelihood of M3I (arXiv 2211.09807, section 3); the Gaussian is `ops.gaussian`.

A variational posterior P(z | z_hat). Legend: N predictions, M targets, D feature width. Returns a
scalar in fp32 (fp64 for fp64 input); lower is more mutual information.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -1


def boltzmann(
    z_hat: Tensor,  # [N, D] any float
    z: Tensor,  # [M, D] any float
    scale: Tensor,  # [] fp32, 1 / tau
    *,
    targets: Tensor | None = None,  # [N] int64
    row_ids: Tensor | None = None,  # [N] int64
    col_ids: Tensor | None = None,  # [M] int64
) -> Tensor:  # [] fp32
    """Softmax cross-entropy of exp(scale * z_hat . z) over all targets: the Boltzmann posterior.

    - neither ids nor targets: the diagonal is positive, both directions averaged; equals
    open_clip's ClipLoss.
    - targets: one-sided, z are the class embeddings, -1 is ignored.
    - row_ids and col_ids: equal ids are positives, weighted 1 / count (several captions of an
    image, variants of a
      concept), both directions averaged; an id of -1 has no annotation and is neither row nor
      candidate.

    Averages over rows that have a positive; a batch without any gives 0. Logits and softmax in
    fp32.
    Raises ValueError on contradicting arguments.
    """
    if targets is not None and (row_ids is not None or col_ids is not None):
        raise ValueError("targets: expected either targets or row_ids and col_ids, got both")
    if (row_ids is None) != (col_ids is None):
        raise ValueError("row_ids, col_ids: expected both or neither")
    logits_NM = _wide(scale) * (_wide(z_hat) @ _wide(z).T)
    if targets is not None:
        valid_N = targets != IGNORED
        nll_N = F.cross_entropy(logits_NM, targets.clamp_min(0), reduction="none")
        return _mean_over(nll_N, valid_N)
    if row_ids is None or col_ids is None:
        if z_hat.shape[0] != z.shape[0]:
            raise ValueError(
                f"z: expected {z_hat.shape[0]} rows as z_hat, or ids; got {z.shape[0]}"
            )
        row_ids = col_ids = torch.arange(z.shape[0], device=z.device)
    return 0.5 * (_rows(logits_NM, row_ids, col_ids) + _rows(logits_NM.T, col_ids, row_ids))


def _rows(
    logits_NM: Tensor,  # [N, M] fp32
    row_ids: Tensor,  # [N] int64
    col_ids: Tensor,  # [M] int64
) -> Tensor:  # [] fp32
    positive_NM = row_ids[:, None] == col_ids[None, :]
    valid_N = (row_ids != IGNORED) & positive_NM.any(1)
    # A finite floor: a row of only -inf would put NaN into the gradient of rows that are ignored.
    masked_NM = logits_NM.masked_fill(
        (col_ids == IGNORED)[None, :], torch.finfo(logits_NM.dtype).min
    )
    count_N = positive_NM.sum(1).clamp_min(1)
    mean_positive_N = logits_NM.masked_fill(~positive_NM, 0.0).sum(1) / count_N
    return _mean_over(masked_NM.logsumexp(1) - mean_positive_N, valid_N)


def _wide(x: Tensor) -> Tensor:
    """fp32 for anything narrower; fp64 stays, so that gradients can be checked."""
    return x if x.dtype == torch.float64 else x.float()


def _mean_over(
    nll_N: Tensor,  # [N] fp32
    valid_N: Tensor,  # [N] bool
) -> Tensor:  # [] fp32
    return nll_N.masked_fill(~valid_N, 0.0).sum() / valid_N.sum().clamp_min(1)
