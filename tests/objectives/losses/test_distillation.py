"""Targets and losses over prototypes against formulas in fp64 and numbers of 50 digits.

Legend: N rows, K prototypes.
"""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m3i_fast.objectives.losses import distillation
from tests.objectives.losses.oracles import draw, gradient

N, K = 24, 16


def test_mean_entropy_is_the_divergence_from_even_use() -> None:
    logits = draw(N, K)
    share = (logits / 0.3).exp()
    share = (share / share.sum(1, keepdim=True)).mean(0)
    expected = float((share * (share * K).log()).sum())
    assert float(distillation.mean_entropy(logits, temperature=0.3)) == pytest.approx(expected)
    even = torch.eye(K).repeat(2, 1) * 50
    assert float(distillation.mean_entropy(even, temperature=0.1)) == pytest.approx(0, abs=1e-6)
    one = even[:1].repeat(3, 1).requires_grad_()  # other prototypes' shares are 0 in fp32
    value = distillation.mean_entropy(one, temperature=0.1)
    assert value.item() == pytest.approx(math.log(K))
    assert torch.autograd.grad(value, one)[0].isfinite().all()


@pytest.mark.parametrize("total", [1.0, 0.4])
def test_self_distillation_has_the_gradient_of_targets_of_any_sum(total: float) -> None:
    """(softmax * sum T - T) / (tau n): without the sum it would be wrong where that is not 1."""
    logits, tau = draw(N, K), 0.3
    wanted = total * (2 * draw(N, K, seed=1)).softmax(-1)
    expected = ((logits / tau).softmax(-1) * wanted.sum(-1, keepdim=True) - wanted) / (tau * N)
    got = gradient(
        lambda x: distillation.self_distillation(x, wanted, temperature=tau), logits.clone()
    )
    torch.testing.assert_close(got, expected)


# ---- Sinkhorn-Knopp ------------------------------------------------------------------------------


def exact_sinkhorn(logits: Tensor, temperature: float, num_iterations: int) -> list[list[float]]:
    """The exponential form of SwAV, in numbers of 50 digits whose exponents have no end."""
    rows, columns = logits.shape
    with mpmath.workdps(50):
        q = mpmath.matrix(logits.tolist()).apply(lambda x: mpmath.exp(x / temperature))
        for _ in range(num_iterations):
            for j in range(columns):
                q[:, j] = q[:, j] / (columns * sum(q[i, j] for i in range(rows)))
            for i in range(rows):
                q[i, :] = q[i, :] / sum(q[i, j] for j in range(columns))
        return [[float(q[i, j]) for j in range(columns)] for i in range(rows)]


@pytest.mark.parametrize("temperature", [1.0, 0.04, 1e-4])
def test_sinkhorn_is_the_exponential_form_at_any_temperature(temperature: float) -> None:
    logits = 30 * draw(9, 5)  # exp(logits / 1e-4) would need an exponent of a million
    expected = torch.tensor(exact_sinkhorn(logits, temperature, 3), dtype=torch.float64)
    got = distillation.sinkhorn_knopp(logits, temperature=temperature, num_iterations=3)
    torch.testing.assert_close(got, expected, atol=1e-8, rtol=1e-8)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 9),
    size=st.sampled_from([1e-3, 1.0, 1e3, 1e6]),
    temperature=st.sampled_from([1e-4, 0.04, 1.0]),
    seed=st.integers(0, 99),
)
def test_sinkhorn_assigns_every_row_whole(
    rows: int, columns: int, size: float, temperature: float, seed: int
) -> None:
    logits = (size * draw(rows, columns, seed=seed)).float()
    q = distillation.sinkhorn_knopp(logits, temperature=temperature)
    assert (q >= 0).all()
    torch.testing.assert_close(q.sum(1), torch.ones(rows), atol=1e-5, rtol=0)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 99), temperature=st.sampled_from([0.04, 0.5]))
def test_sinkhorn_does_not_see_what_all_rows_or_one_row_have_in_common(
    seed: int, temperature: float
) -> None:
    logits = draw(8, 5, seed=seed)
    q = distillation.sinkhorn_knopp(logits, temperature=temperature, num_iterations=200)
    torch.testing.assert_close(q.sum(0), torch.full((5,), 8 / 5).double(), atol=0.05, rtol=0)
    of_columns = distillation.sinkhorn_knopp(logits + 7 * draw(5, seed=1), temperature=temperature)
    once = distillation.sinkhorn_knopp(logits, temperature=temperature)
    torch.testing.assert_close(of_columns, once)
