"""Collapse monitors against numpy and known cases."""

import numpy as np
import pytest
import torch

from m3i_fast.objectives.monitors import feature_std, mean_cosine, rankme


def test_rankme_equals_singular_values() -> None:
    x = torch.randn(200, 24, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 25.0)
    s = np.linalg.svd(x.double().numpy(), compute_uv=False)
    p = s / s.sum()
    assert float(rankme(x)) == pytest.approx(float(np.exp(-(p * np.log(p)).sum())), rel=1e-4)


def test_collapse_is_seen() -> None:
    spread = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    collapsed = torch.ones(4000, 32)
    assert float(feature_std(spread)) == pytest.approx(1.0, abs=0.02)
    assert float(feature_std(collapsed)) == 0.0
    assert float(rankme(spread)) > 30
    assert float(rankme(collapsed)) == pytest.approx(1.0, abs=1e-3)
    assert float(rankme(spread * float("nan"))) != float(rankme(spread))  # NaN, and no error
    assert float(mean_cosine(spread, -2 * spread)) == pytest.approx(-1.0)
