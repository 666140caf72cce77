import numpy as np
import pytest
import torch

from m3i_fast.models.effective_rank import rankme


def test_rankme_equals_singular_values() -> None:
    x = torch.randn(200, 24, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 25.0)
    s = np.linalg.svd(x.double().numpy(), compute_uv=False)
    p = s / s.sum()
    assert float(rankme(x)) == pytest.approx(float(np.exp(-(p * np.log(p)).sum())), rel=1e-4)


def test_equal_directions_are_counted_and_nothing_else_is() -> None:
    axes = torch.eye(7).repeat(5, 1) * 3
    assert float(rankme(axes)) == pytest.approx(7, rel=1e-5)
    padded = torch.cat([axes, torch.zeros(35, 9)], 1)
    assert float(rankme(padded)) == pytest.approx(7, rel=1e-4)
