"""The accuracy rule passes rounding and fails truncation, in both dtypes."""

from __future__ import annotations

import pytest
import torch

from tests.shared.tolerance import assert_as_accurate

TRUTH = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_passes(dtype: torch.dtype) -> None:
    assert_as_accurate(TRUTH.to(dtype), TRUTH.to(dtype), TRUTH)


def test_truncation_fails() -> None:
    exact = TRUTH.float()
    truncated = (exact.view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()
    with pytest.raises(AssertionError, match="exceeds"):
        assert_as_accurate(truncated, exact.bfloat16(), exact.double())


def test_not_finite_fails() -> None:
    spoiled = TRUTH.float()
    spoiled[3] = float("nan")
    with pytest.raises(AssertionError, match="finite"):
        assert_as_accurate(spoiled, TRUTH.float(), TRUTH)


def test_other_shape_and_dtype_fail() -> None:
    with pytest.raises(AssertionError, match="dtype"):
        assert_as_accurate(TRUTH.float(), TRUTH.bfloat16(), TRUTH)
    with pytest.raises(AssertionError, match="shape"):
        assert_as_accurate(TRUTH.float()[:1], TRUTH.float()[:1], TRUTH)
