"""Logistic regression from a share of the labels of each class, by several draws.

The shares are those of SimCLR's semi-supervised protocol (arXiv 2002.05709, section 6), 1 % and
10 %; a classifier on frozen features in place of fine-tuning is MSN's (arXiv 2204.07141, section
4). The strength of L2 is chosen by cross-validation on the drawn rows alone.

Legend: N labelled training rows, n drawn ones, M queries, C width, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from m3i_fast.evaluation.feature_rows import Index, Rows, row_blocks, take_rows
from m3i_fast.evaluation.probes.cross_validation import NUM_FOLDS, Examples, choose_linear
from m3i_fast.evaluation.probes.linear import LinearProbe, fit_linear

SHARES = (0.01, 0.1)
NUM_DRAWS = 3
UNCHOSEN_L2 = 0.1  # where fewer than two classes have two drawn rows, one of which is held out
QUERY_BLOCK = 8192


@dataclass(frozen=True, slots=True)
class FewLabelsDraw:
    """A draw of labels, and what the classifier that was fitted to it says of the queries."""

    rows: Index  # [n] drawn rows
    l2: float
    predicted: Index  # [M]
    confidence: np.ndarray  # [M] fp64, the probability of the predicted class


def classify_with_few_labels(
    bank: Rows,
    bank_rows: Index,  # [N] labelled rows
    bank_label: Index,  # [N]
    queries: Rows,
    query_rows: Index,  # [M]
    *,
    share: float,
    seed: int,
    device: torch.device | str = "cpu",
) -> FewLabelsDraw:
    """Fit a logistic regression to one draw and classify the queries, block by block.

    The fit is that of `fit_linear`, in fp64 on standardised features. A class without a drawn row
    cannot be predicted; every class has at least one. Memory is that of the drawn rows.
    """
    places = draw_share(bank_label, share, seed=seed)
    classes, label = np.unique(bank_label[places], return_inverse=True)
    features = take_rows(bank, bank_rows[places]).to(device)
    probe, l2 = _fit(features, torch.from_numpy(label.astype(np.int64)).to(device))
    predicted = np.empty(len(query_rows), dtype=np.int64)
    confidence = np.empty(len(query_rows))
    for place, block in row_blocks(queries, query_rows, size=QUERY_BLOCK, device=device):
        most, at = probe.logits(block).softmax(1).max(1)
        predicted[place] = classes[at.cpu().numpy()]
        confidence[place] = most.cpu().numpy()
    return FewLabelsDraw(bank_rows[places], l2, predicted, confidence)


def draw_share(
    label: Index,  # [N]
    share: float,
    *,
    seed: int,
) -> Index:  # [n] places, ascending
    """Draw a share of the rows of each class, at least one, the same rows for a seed.

    Raises ValueError for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a number in (0, 1], got {share}")
    random = np.random.default_rng(seed)
    drawn = []
    for one in np.unique(label):
        places = np.flatnonzero(label == one)
        drawn.append(random.permutation(places)[: _num_drawn(len(places), share)])
    return np.sort(np.concatenate(drawn))


def distinct_shares(label: Index) -> tuple[float, ...]:  # label [N]
    """Return SHARES without those that draw as many rows of each class as a larger one."""
    counts = np.unique(label, return_counts=True)[1]
    drawn = {tuple(_num_drawn(int(count), share) for count in counts): share for share in SHARES}
    return tuple(drawn.values())


def _num_drawn(count: int, share: float) -> int:
    return max(round(share * count), 1)


def _fit(features: torch.Tensor, label: torch.Tensor) -> tuple[LinearProbe, float]:
    """Fit all rows with the L2 that folds choose.

    Folds hold rows of classes with two or more, so that every fit has all of their classes: the
    bias of one without a row has no optimum.
    """
    number = torch.zeros_like(label)  # of each row within its class
    is_held_out = torch.zeros_like(label, dtype=torch.bool)
    for one in label.unique():
        rows = (label == one).nonzero()[:, 0]
        number[rows] = torch.arange(len(rows), device=label.device)
        is_held_out[rows] = len(rows) > 1
    classes, kept = label[is_held_out].unique(return_inverse=True)
    if len(classes) < 2:
        return fit_linear(features, label, l2=UNCHOSEN_L2), UNCHOSEN_L2
    examples = Examples(
        features=features[is_held_out],
        label=kept,
        group=torch.arange(len(kept), device=label.device),
        fold=number[is_held_out] % NUM_FOLDS,
    )
    probe, l2 = choose_linear(examples)
    if len(kept) == len(label):
        return probe, l2
    return fit_linear(features, label, l2=l2), l2
