"""The lower bound of the mutual information between pictures and captions, on unseen concepts.

Legend: M pairs, E embedding width. Row i of one side belongs to row i of the other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from m3i_fast.ops import boltzmann

MAX_SCALE = 1000.0
NUM_HALVINGS = 40  # of the interval of scales: to 1e-9


def caption_bound(
    train: tuple[Tensor, Tensor],  # 2 x [T, E], image and caption embeddings
    heldout: tuple[Tensor, Tensor],  # 2 x [M, E]
    *,
    seed: int = 0,
) -> tuple[Tensor, float]:  # [M] fp64 nats, the scale
    """log M - nll of each held-out pair; the mean is InfoNCE's lower bound of the information.

    I(image; caption) >= log M - E[nll] (arXiv 1807.03748, section 2.3), where nll is
    -log softmax of the pair among M candidates, and is at most log M whatever the information: it
    says how much the embeddings show, not how much there is. The mean over both ways, an image
    among captions and a caption among images. The scale of the cosines is chosen on the training
    pairs (`choose_scale`), so the bound holds for it as for any other. Where the encoder knows the
    pairs that it was trained on by heart the scale is too large for others: the bound is then
    loose, and below zero if the encoder is surer than right. Errors as `choose_scale`.
    """
    num = len(heldout[0])
    scale = choose_scale(*train, num_candidates=num, seed=seed)
    return math.log(num) - pair_nll(*heldout, scale=scale), scale


def pair_nll(
    image: Tensor,  # [M, E]
    text: Tensor,  # [M, E]
    *,
    scale: float,
) -> Tensor:  # [M] fp64
    """-log softmax(scale x_i . y)_i over the M rows y, both ways averaged, in fp64.

    A row at a time: memory is that of the embeddings.
    """
    image, text = image.double(), text.double()
    factor = torch.tensor(scale, dtype=torch.float64, device=image.device)
    rows = torch.arange(len(image), device=image.device)

    def one_way(queries: Tensor, gallery: Tensor) -> Tensor:  # [M]
        return torch.stack(
            [
                boltzmann(queries[i : i + 1], gallery, factor, targets=rows[i : i + 1])
                for i in range(len(rows))
            ]
        )

    return (one_way(image, text) + one_way(text, image)) / 2


def choose_scale(
    image: Tensor,  # [T, E]
    text: Tensor,  # [T, E]
    *,
    num_candidates: int,
    seed: int = 0,
) -> float:
    """The scale in 0..MAX_SCALE of the least mean nll, each pair among `num_candidates`.

    Pairs are dealt at random into sets of `num_candidates` (one of all when there are fewer; the
    rest of the division is left out). The nll is convex in the scale, so its slope is bisected. 0
    where a picture's own caption is no nearer than others, which is a bound of 0.
    Raises ValueError when there are fewer than two pairs.
    """
    if min(len(image), num_candidates) < 2:
        raise ValueError(
            f"train: expected at least 2 captioned pairs and candidates, got {len(image)} and "
            f"{num_candidates}"
        )
    size = min(len(image), num_candidates)
    order = torch.randperm(len(image), generator=torch.Generator().manual_seed(seed))
    sets = order[: len(order) // size * size].view(-1, size)
    pairs = [(image[rows].double(), text[rows].double()) for rows in sets]
    low, high = 0.0, MAX_SCALE
    if _slope(pairs, low) >= 0:
        return low
    if _slope(pairs, high) <= 0:
        return high
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _slope(pairs, middle) > 0 else (middle, high)
    return (low + high) / 2


def _slope(pairs: list[tuple[Tensor, Tensor]], scale: float) -> float:
    """Derivative of the summed nll by the scale."""
    factor = torch.tensor(scale, dtype=torch.float64, device=pairs[0][0].device, requires_grad=True)
    with torch.enable_grad():
        for image, text in pairs:
            boltzmann(image, text, factor).backward()
    assert factor.grad is not None
    return float(factor.grad)
