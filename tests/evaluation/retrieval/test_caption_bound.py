"""The bound against cross entropy in fp64, scipy's minimum, and information that is known."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from m3i_fast.evaluation.retrieval.caption_bound import (
    MAX_SCALE,
    caption_bound,
    choose_scale,
    pair_nll,
)

Pairs = tuple[Tensor, Tensor]


def _pairs(num: int, *, noise: float = 1.5, seed: int = 0) -> Pairs:
    rng = torch.Generator().manual_seed(seed)
    image = torch.randn(num, 12, generator=rng)
    text = image + noise * torch.randn(num, 12, generator=rng)
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


def _oracle(image: Tensor, text: Tensor, scale: float) -> Tensor:  # [M] fp64
    logits = scale * image.double() @ text.double().T
    right = torch.arange(len(image))
    ways = (F.cross_entropy(rows, right, reduction="none") for rows in (logits, logits.T))
    return torch.stack(list(ways)).mean(0)


@pytest.mark.parametrize("scale", [0.0, 3.0, 200.0])
def test_nll_of_each_pair_is_cross_entropy_both_ways(scale: float) -> None:
    image, text = _pairs(33)
    expected = _oracle(image, text, scale)
    torch.testing.assert_close(pair_nll(image, text, scale=scale), expected, atol=1e-10, rtol=1e-10)
    assert scale == 0 or float(expected.std()) > 0.1


def test_the_scale_is_scipys_minimum() -> None:
    image, text = _pairs(107)
    best = minimize_scalar(
        lambda s: float(_oracle(image, text, s).mean()),
        bounds=(0, MAX_SCALE),
        method="bounded",
        options={"xatol": 1e-6},
    )
    assert choose_scale(image, text) == pytest.approx(best.x, rel=1e-4)


def test_the_scale_ends_where_the_minimum_does() -> None:
    image, text = _pairs(20)
    assert choose_scale(image, -text) == 0.0
    assert choose_scale(image, image) > 50
    assert choose_scale(torch.eye(12), torch.eye(12)) > 50


def test_captions_that_say_nothing_are_a_bound_of_zero_and_copies_one_of_log_c() -> None:
    image, text = _pairs(40)
    nothing, scale = caption_bound(image, -text)
    assert scale == 0.0 and nothing.abs().max() < 1e-12
    everything, _ = caption_bound(image, image)
    assert float(everything.mean()) == pytest.approx(math.log(20), rel=1e-3)
    assert float(everything.max()) <= math.log(20)


def test_the_bound_is_below_the_information_of_gaussian_pairs() -> None:
    """I = -D / 2 log(1 - rho^2) of D independent pairs of correlation rho."""
    rng = np.random.default_rng(0)
    rho, dim = 0.8, 3
    shared, own = rng.standard_normal((2, 1600, dim))
    other = rho * shared + math.sqrt(1 - rho**2) * own
    image, text = torch.from_numpy(shared), torch.from_numpy(other)
    bound, _ = caption_bound(image, text)
    information = -dim / 2 * math.log(1 - rho**2)
    assert information < math.log(800)
    assert 0.4 * information < float(bound.mean()) < information


def test_a_pair_is_asked_with_the_scale_and_among_the_candidates_it_should_be() -> None:
    image, text = _pairs(41)
    order = torch.randperm(41, generator=torch.Generator().manual_seed(3))
    first, second = order[:21], order[21:]
    bound, scale = caption_bound(image, text, seed=3)
    scales = [choose_scale(image[rows], text[rows]) for rows in (first, second)]
    assert abs(scales[0] - scales[1]) > 0.01 and scale == pytest.approx(sum(scales) / 2)
    for rows, of_others in ((first, scales[1]), (second, scales[0])):
        expected = math.log(len(rows)) - _oracle(image[rows], text[rows], of_others)
        torch.testing.assert_close(bound[rows], expected, atol=1e-9, rtol=1e-9)


def test_too_few_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4 .* got 3"):
        caption_bound(*_pairs(3))
