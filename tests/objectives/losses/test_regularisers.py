"""Regularisers and losses of self-supervised methods against code of others and formulas in fp64.

Legend: N rows, D features, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m3i_fast.objectives import targets
from m3i_fast.objectives.losses import distillation, regularisers, similarity
from tests.objectives.losses.oracles import (
    ORACLES,
    Oracle,
    draw,
    gradient,
    measure,
    of_logits,
    soft_targets,
)

N, D, K = 24, 10, 16
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-7}


# ---- Code of others ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("oracle", ORACLES, ids=str)
def test_value_and_gradient_are_those_of_the_oracle(oracle: Oracle, dtype: torch.dtype) -> None:
    agreement = measure(oracle, dtype)
    assert agreement.value < TOLERANCE[dtype]
    assert agreement.gradient is None or agreement.gradient < TOLERANCE[dtype]


# ---- All functions alike -------------------------------------------------------------------------

# Name, what it is called on, shapes; gradients by the first.
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "barlow_twins": (regularisers.barlow_twins, ((N, D), (N, D))),
    "vicreg": (regularisers.vicreg, ((N, D), (N, D))),
    "unigrad": (regularisers.unigrad, ((N, D), (N, D), (D, D))),
    "coding_rate": (regularisers.coding_rate, ((N, D),)),
    "koleo": (regularisers.koleo, ((N, D),)),
    "mean_entropy": (
        lambda x, of: distillation.mean_entropy(x, of, temperature=0.3),
        ((N, D), (K, D)),
    ),
    "self_distillation": (
        lambda x, z: of_logits(x, soft_targets(z, 0.3)),
        ((N, K), (N, K)),
    ),
    "cosine": (similarity.negative_cosine_similarity, ((N, D), (N, D))),
    "nt_xent": (lambda a, b: similarity.nt_xent(a, b, temperature=0.3), ((N, D), (N, D))),
    "moco": (
        lambda q, k, queue: similarity.moco(q, k, queue, temperature=0.3),
        ((N, D), (N, D), (K, D)),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    first, *others = (0.6 * draw(*shape, seed=seed) for seed, shape in enumerate(shapes))
    first = first[:6].requires_grad_()
    others = [x[:6] if x.shape[0] == N else x for x in others]
    assert torch.autograd.gradcheck(lambda x: function(x, *others), (first,))


@pytest.mark.parametrize("autocast", [False, True], ids=["half inputs", "autocast"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_halves_are_computed_in_fp32(name: str, autocast: bool) -> None:
    """bf16 is a number like any other: the value is that of the same numbers in fp32.

    moco is the exception under autocast: its op takes rows in bf16.
    """
    function, shapes = FUNCTIONS[name]
    halves = [draw(*shape, seed=seed).bfloat16() for seed, shape in enumerate(shapes)]
    expected = function(*(x.float() for x in halves))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = function(*(x.float() if autocast else x for x in halves))
    assert value.dtype == torch.float32 and value.dim() == 0
    if autocast and name == "moco":
        torch.testing.assert_close(value, expected, rtol=2e-3, atol=0)
    else:
        assert torch.equal(value, expected)


# ---- Formulas ------------------------------------------------------------------------------------


def test_barlow_twins_is_of_numpys_correlation() -> None:
    a, b = draw(N, D), draw(N, D, seed=1)
    correlation = torch.from_numpy(np.corrcoef(a.numpy(), b.numpy(), rowvar=False)[:D, D:])
    weights = torch.full((D, D), 0.1).fill_diagonal_(1)
    expected = (weights * (correlation - torch.eye(D)).square()).sum()
    got = regularisers.barlow_twins(a, b, off_diagonal_weight=0.1, eps=0.0)
    torch.testing.assert_close(got, expected)


def test_vicreg_is_of_numpys_covariance() -> None:
    z = 0.4 * draw(N, D) + 3
    cov = np.cov(z.numpy(), rowvar=False)
    hinge = np.maximum(0, 0.5 - np.sqrt(cov.diagonal() + 0.01)).mean()
    assert hinge > 0
    got = float(regularisers.variance_hinge(z, std=0.5, eps=0.01))
    assert got == pytest.approx(hinge, rel=1e-12)
    off_diagonal = (cov**2).sum() - (cov.diagonal() ** 2).sum()
    assert float(regularisers.covariance(z)) == pytest.approx(off_diagonal / D, rel=1e-12)


def test_a_mean_far_from_zero_costs_no_precision() -> None:
    z = draw(N, D)
    for function in (regularisers.variance_hinge, regularisers.covariance):
        far = (z + 1000).float()
        expected = function(far.double()).float()
        torch.testing.assert_close(function(far), expected, rtol=1e-4, atol=0)


def test_unigrad_has_the_papers_gradient() -> None:
    """By z: (w F z - z') / N. The value is its integral, not z times it as the authors log it."""
    z, other = F.normalize(draw(N, D), dim=-1), F.normalize(draw(N, D, seed=1), dim=-1)
    matrix = draw(D, D, seed=2)
    matrix = matrix @ matrix.T
    expected = (3.0 * z @ matrix - other) / N
    torch.testing.assert_close(
        gradient(lambda x: regularisers.unigrad(x, other, matrix, decorrelation_weight=3.0), z),
        expected,
    )
    terms = [-(a @ b) + 1.5 * a @ matrix @ a for a, b in zip(z.detach(), other, strict=True)]
    still = other.requires_grad_(), matrix.requires_grad_()
    value = regularisers.unigrad(z, *still, decorrelation_weight=3.0)
    torch.testing.assert_close(value, sum(terms) / N)
    assert torch.autograd.grad(value, still, allow_unused=True) == (None, None)


def test_the_running_correlation_is_a_moving_average_of_both_views() -> None:
    matrix, a, b = draw(D, D), draw(N, D, seed=1), draw(N, D, seed=2)
    of_rows = sum(torch.outer(z, z) for z in torch.cat([a, b])) / (2 * N)
    got = regularisers.update_correlation(matrix, a, b, momentum=0.7)
    torch.testing.assert_close(got, 0.7 * matrix + 0.3 * of_rows)


def test_coding_rate_is_numpys_determinant_with_the_papers_gradient() -> None:
    z, alpha = draw(N, D), D / (N * 0.5)
    inside = np.eye(D) + alpha * z.numpy().T @ z.numpy()
    value = regularisers.coding_rate(z, eps=0.5)
    assert float(value) == pytest.approx(np.linalg.slogdet(inside)[1] / 2, rel=1e-12)
    expected = alpha * z @ torch.linalg.inv(torch.from_numpy(inside))
    torch.testing.assert_close(
        gradient(lambda x: regularisers.coding_rate(x, eps=0.5), z), expected
    )


def test_koleo_is_of_the_nearest_of_all_distances() -> None:
    unit = F.normalize(draw(N, D), dim=-1).numpy()
    distances = np.linalg.norm(unit[:, None] - unit[None], axis=-1) + 9 * np.eye(N)
    expected = -np.log(distances.min(1)).mean()
    assert float(regularisers.koleo(5 * torch.from_numpy(unit))) == pytest.approx(expected)
    opposite = torch.tensor([[1.0, 0.0], [-3.0, 0.0]])
    assert float(regularisers.koleo(opposite)) == pytest.approx(-math.log(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", ["duplicates", "all equal", "zeros", "one row", "no row"])
def test_koleo_is_finite_where_there_is_no_neighbour_apart(case: str, dtype: torch.dtype) -> None:
    z = {
        "duplicates": draw(4, D).repeat(2, 1),
        "all equal": draw(1, D).repeat(5, 1),
        "zeros": torch.zeros(5, D),
        "one row": draw(1, D),
        "no row": draw(0, D),
    }[case].to(dtype)
    value = regularisers.koleo(z.requires_grad_())
    value.backward()
    expected = 0.0 if case in ("one row", "no row") else -math.log(1e-8)
    assert value.item() == pytest.approx(expected)
    assert z.grad is not None and not z.grad.any()


def test_koleo_still_parts_the_others_beside_duplicates() -> None:
    z = draw(6, D)
    z[1] = z[0]
    slope = gradient(regularisers.koleo, z)
    assert slope.isfinite().all() and slope[2:].abs().amax(1).min() > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    z = draw(N, D).float()
    z[3, 2] = bad
    assert regularisers.coding_rate(z).isnan()
    assert regularisers.koleo(z).isnan()
    assert regularisers.barlow_twins(z, z).isnan()


def test_a_scatter_that_fp32_cannot_factor_is_no_number() -> None:
    """1 is lost beside 2^44, and what is left has a pivot of 0."""
    z = torch.full((N, 4), 2.0**20)
    assert regularisers.coding_rate(z, eps=0.25).isnan()
    assert regularisers.coding_rate(z.double(), eps=0.25).isfinite()


# ---- What must not matter ------------------------------------------------------------------------

A, B = draw(N, D), draw(N, D, seed=1)
INVARIANCES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    # name: (rotation [D, D], shift [D], scale > 0 [N, 1], order [N]) -> the value of two calls
    "barlow_twins, shift and scale of a feature": lambda rotation, shift, scale, order: (
        regularisers.barlow_twins(A * scale[:D, 0] + shift, B, eps=0.0),
        regularisers.barlow_twins(A, B, eps=0.0),
    ),
    "vicreg, the order of pictures": lambda rotation, shift, scale, order: (
        regularisers.vicreg(A[order], B[order]),
        regularisers.vicreg(A, B),
    ),
    "vicreg, shift of both views": lambda rotation, shift, scale, order: (
        regularisers.vicreg(A + shift, B + shift),
        regularisers.vicreg(A, B),
    ),
    "coding_rate, rotation": lambda rotation, shift, scale, order: (
        regularisers.coding_rate(A @ rotation),
        regularisers.coding_rate(A),
    ),
    "koleo, rotation and length of rows": lambda rotation, shift, scale, order: (
        regularisers.koleo(scale * A @ rotation),
        regularisers.koleo(A),
    ),
    "nt_xent, order of views and pictures, rotation": lambda rotation, shift, scale, order: (
        similarity.nt_xent(scale * B[order] @ rotation, A[order] @ rotation, temperature=0.2),
        similarity.nt_xent(A, B, temperature=0.2),
    ),
    "moco, rotation and order of the queue": lambda rotation, shift, scale, order: (
        similarity.moco(A @ rotation, A * scale, B[order], temperature=0.9),
        similarity.moco(A, A @ rotation.T, B @ rotation.T, temperature=0.9),
    ),
}


@pytest.mark.parametrize("name", INVARIANCES)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 9999))
def test_values_do_not_depend_on(name: str, seed: int) -> None:
    rotation, _ = torch.linalg.qr(draw(D, D, seed=seed))
    scale = 0.2 + draw(N, 1, seed=seed + 1).abs()
    order = draw(N, seed=seed + 2).argsort()
    values = INVARIANCES[name](rotation, 3 * draw(D, seed=seed + 3), scale, order)
    torch.testing.assert_close(*values)


# ---- InfoNCE and pixels --------------------------------------------------------------------------


def test_dense_contrastive_takes_the_most_similar_cell() -> None:
    q, features, queue = draw(2, 5, D), draw(2, 5, 7, seed=1), F.normalize(draw(K, D, seed=2))
    shuffled = torch.tensor([3, 1, 4, 0, 2])
    got = similarity.dense_contrastive(
        q, q[:, shuffled], features, 2 * features[:, shuffled], queue, temperature=0.3
    )
    rows = q.flatten(0, 1)
    torch.testing.assert_close(got, similarity.moco(rows, rows, queue, temperature=0.3))


def test_byols_squared_distance_is_the_gaussian_of_unit_rows() -> None:
    a, b = draw(N, D), draw(N, D, seed=1)
    of_rows = (F.normalize(a) - F.normalize(b)).square().sum(-1).mean()
    torch.testing.assert_close(2 + 2 * similarity.negative_cosine_similarity(a, b), of_rows)


def test_patches_are_crops_of_the_picture() -> None:
    images = draw(2, 3, 8, 12)
    patches = targets.patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    crop = images[1, :, 4:8, 8:12]  # second row, third column
    assert torch.equal(patches[1, 5], crop.permute(1, 2, 0).flatten())
    normal = targets.normalised_pixels(images.half(), 4)
    assert normal.dtype == torch.float32
    torch.testing.assert_close(normal.mean(-1), torch.zeros(2, 6), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.std(-1), torch.ones(2, 6), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: regularisers.barlow_twins(z, z[:2]), r"z_b: expected shape \[4, 6\]"),
        (lambda z: regularisers.variance_hinge(z[:1]), "z: expected at least 2 rows, got 1"),
        (lambda z: regularisers.covariance(z[0]), r"z: expected shape \[N, D\], got \[6\]"),
        (lambda z: regularisers.koleo(z[0]), r"z: expected shape \[N, D\], got \[6\]"),
        (lambda z: distillation.mean_entropy(z, z, temperature=0.0), "temperature: expected > 0"),
        (
            lambda z: distillation.mean_entropy(z[0], z, temperature=1.0),
            r"features, prototypes: expected shapes \[N, E\] and \[K, E\], got \[6\] and \[4, 6\]",
        ),
        (
            lambda z: distillation.self_distillation(
                z, z, soft_targets(z[:2], 0.1), temperature=1.0
            ),
            r"targets.z_hat: expected shape \[4, 6\], got \[2, 6\]",
        ),
        (
            lambda z: distillation.self_distillation(z, z, soft_targets(z, 0.1), temperature=0.0),
            "temperature: expected > 0",
        ),
        (lambda z: similarity.negative_cosine_similarity(z, z[:2]), r"z: expected shape \[4, 6\]"),
        (lambda z: similarity.nt_xent(z, z[:2], temperature=1.0), "z_a, z_b: expected one shape"),
        (lambda z: similarity.moco(z, z, z[:, :2], temperature=1.0), "q, k, queue: expected"),
        (lambda z: targets.patchify(z[None, None], 4), "patch_size: expected a divisor of 4 and 6"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 6))
