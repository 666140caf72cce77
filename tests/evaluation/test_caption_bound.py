"""The bound against cross entropy in fp64, scipy's minimum, and information that is known."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from m3i_fast.evaluation.caption_bound import MAX_SCALE, caption_bound, choose_scale, pair_nll

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


def test_the_scale_is_scipys_minimum_over_sets_of_as_many_candidates() -> None:
    image, text = _pairs(107)
    order = torch.randperm(107, generator=torch.Generator().manual_seed(4))
    sets = [order[:25], order[25:50], order[50:75], order[75:100]]
    best = minimize_scalar(
        lambda s: float(sum(_oracle(image[rows], text[rows], s).mean() for rows in sets)),
        bounds=(0, MAX_SCALE),
        method="bounded",
        options={"xatol": 1e-6},
    )
    got = choose_scale(image, text, num_candidates=25, seed=4)
    assert got == pytest.approx(best.x, rel=1e-4)
    assert choose_scale(image, text, num_candidates=107) != pytest.approx(best.x, rel=2e-3)
    assert choose_scale(image, text, num_candidates=999) == pytest.approx(
        choose_scale(image, text, num_candidates=107), rel=1e-6
    )


def test_the_scale_ends_where_the_minimum_does() -> None:
    image, text = _pairs(20)
    assert choose_scale(image, -text, num_candidates=20) == 0.0
    assert choose_scale(image, image, num_candidates=20) > 50
    assert choose_scale(torch.eye(12), torch.eye(12), num_candidates=12) > 50


def test_captions_that_say_nothing_are_a_bound_of_zero_and_copies_one_of_log_m() -> None:
    image, text = _pairs(40)
    nothing, scale = caption_bound((image, -text), (image, text))
    assert scale == 0.0 and nothing.abs().max() < 1e-12
    everything, _ = caption_bound((image, image), (image, image))
    assert float(everything.mean()) == pytest.approx(math.log(40), rel=1e-3)
    assert float(everything.max()) <= math.log(40)


def test_the_bound_is_below_the_information_of_gaussian_pairs() -> None:
    """I = -D / 2 log(1 - rho^2) of D independent pairs of correlation rho."""
    rng = np.random.default_rng(0)
    rho, dim = 0.8, 3
    shared, own = rng.standard_normal((2, 1600, dim))
    other = rho * shared + math.sqrt(1 - rho**2) * own
    image, text = torch.from_numpy(shared), torch.from_numpy(other)
    bound, scale = caption_bound((image[:800], text[:800]), (image[800:], text[800:]))
    information = -dim / 2 * math.log(1 - rho**2)
    assert information < math.log(800)
    assert 0.4 * information < float(bound.mean()) < information
    torch.testing.assert_close(bound, math.log(800) - _oracle(image[800:], text[800:], scale))


def test_the_scale_does_not_depend_on_the_held_out_pairs() -> None:
    train, heldout = _pairs(80), _pairs(40, seed=1)
    _, scale = caption_bound(train, heldout)
    assert caption_bound(train, (heldout[0], -heldout[1]))[1] == scale > 1
    surer_than_right, _ = caption_bound(_pairs(80, noise=0.1), _pairs(40, noise=3, seed=1))
    assert float(surer_than_right.mean()) < 0  # not clamped: it is what the scale gives


@pytest.mark.parametrize(("num_train", "num_heldout"), [(1, 5), (5, 1), (0, 5)])
def test_too_few_pairs_are_refused(num_train: int, num_heldout: int) -> None:
    with pytest.raises(ValueError, match=f"at least 2 .* got {num_train} and {num_heldout}"):
        caption_bound(_pairs(num_train), _pairs(num_heldout))
