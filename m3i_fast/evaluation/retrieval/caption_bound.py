"""Lower bound of the mutual information between pictures and captions, on unseen concepts.

Legend: M pairs, E embedding width. Row i of one side belongs to row i of the other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from m3i_fast.ops import boltzmann

MAX_SCALE = 1000.0
MIN_PAIRS = 4
NUM_HALVINGS = 40  # of the interval of scales: to 1e-9


def caption_bound(
    image: Tensor,  # [M, E]
    text: Tensor,  # [M, E]
    *,
    seed: int = 0,
) -> tuple[Tensor, float]:  # [M] fp64 nats, the mean of both scales
    """Return log C - nll of each pair, whose mean is InfoNCE's lower bound, and the mean scale.

    I(image; caption) >= log C - E[nll] (arXiv 1807.03748, section 2.3), where nll is -log softmax
    of the pair among C candidates. The bound is at most log C whatever the information: it says how
    much the embeddings show, not how much there is. It is the mean of both directions, an image
    among captions and a caption among images.

    Pairs are dealt into two halves. The candidates of a pair are those of its half, and the scale
    of a half's cosines is chosen on the other half. It is never chosen on the pairs that it is used
    for, so the bound holds, nor on pairs that the encoder was trained on, where it would be more
    confident. Raises ValueError when there are fewer than four pairs.
    """
    if len(image) < MIN_PAIRS:
        raise ValueError(f"pairs: expected at least {MIN_PAIRS} with a caption, got {len(image)}")
    order = torch.randperm(len(image), generator=torch.Generator().manual_seed(seed))
    nats = torch.empty(len(image), dtype=torch.float64)
    scales = []
    halves = order.tensor_split(2)
    for rows, others in (halves, halves[::-1]):
        scales.append(choose_scale(image[others], text[others]))
        nats[rows] = math.log(len(rows)) - pair_nll(image[rows], text[rows], scale=scales[-1])
    return nats, sum(scales) / 2


def pair_nll(
    image: Tensor,  # [M, E]
    text: Tensor,  # [M, E]
    *,
    scale: float,
) -> Tensor:  # [M] fp64
    """Return -log softmax(scale x_i . y)_i over the rows y, averaged both ways, in fp64.

    Rows are computed one at a time, so memory is that of the embeddings.
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
) -> float:
    """Return the scale in 0..MAX_SCALE with the least mean nll of pairs among each other.

    The nll is convex in the scale, so its slope is bisected. The scale is 0, which gives a bound of
    0, where a picture's own caption is no nearer than others.
    """
    image, text = image.double(), text.double()
    low, high = 0.0, MAX_SCALE
    if _slope(image, text, low) >= 0:
        return low
    if _slope(image, text, high) <= 0:
        return high
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _slope(image, text, middle) > 0 else (middle, high)
    return (low + high) / 2


def _slope(image: Tensor, text: Tensor, scale: float) -> float:
    """Return the derivative of the mean nll by the scale."""
    factor = torch.tensor(scale, dtype=torch.float64, device=image.device, requires_grad=True)
    with torch.enable_grad():
        boltzmann(image, text, factor).backward()
    assert factor.grad is not None
    return float(factor.grad)
