"""The Gaussian likelihood against torch.distributions and the full product."""

import pytest
import torch

from m3i_fast.objectives.likelihood import decorrelation, gaussian


def test_gradcheck() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    z = torch.randn(3, 4, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: gaussian(x, z, sigma=0.3), (x,))
    assert torch.autograd.gradcheck(lambda x: decorrelation(x, z), (x,))


def test_gaussian_is_a_log_density() -> None:
    z_hat, z = torch.randn(4, 7, 9, dtype=torch.float64), torch.randn(4, 7, 9, dtype=torch.float64)
    density = torch.distributions.Normal(z_hat, 0.7)
    constant = -torch.distributions.Normal(0.0, 0.7).log_prob(torch.tensor(0.0)).double()
    expected = -density.log_prob(z).mean() - constant
    torch.testing.assert_close(gaussian(z_hat, z, sigma=0.7), expected, atol=1e-7, rtol=1e-6)


def test_decorrelation_equals_the_full_product() -> None:
    p, t = torch.randn(6, 3, 8, dtype=torch.float64), torch.randn(6, 3, 8, dtype=torch.float64)
    rows, targets = p.flatten(0, 1), t.flatten(0, 1)
    covariance = sum(torch.outer(v, v) for v in targets) / len(targets)
    expected = (rows @ covariance @ rows.T).diagonal().mean() / 8
    torch.testing.assert_close(decorrelation(p, t), expected)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda a, b: gaussian(a, b[:, :3]), "z: expected"),
        (lambda a, b: gaussian(a, a, sigma=0.0), "sigma"),
    ],
)
def test_wrong_arguments_are_named(call, word: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=word):
        call(torch.randn(3, 4), torch.randn(3, 4))
