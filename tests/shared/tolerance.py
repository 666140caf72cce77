"""The accuracy rule of the operators' tests: no worse than plain torch in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def max_error(value: Tensor, truth: Tensor) -> float:
    """Largest absolute difference from `truth` (float64); 0 of nothing."""
    assert truth.dtype == torch.float64, f"truth: expected float64, got {truth.dtype}"
    assert value.shape == truth.shape, f"shape: expected {truth.shape}, got {value.shape}"
    return (value.double() - truth).abs().max().item() if truth.numel() else 0.0


def assert_as_accurate(
    ours: Tensor, torchs: Tensor, truth: Tensor, *, ulps: float = 0.25, times: float = 1.0
) -> None:
    """error(ours) <= `times` error(torchs) + `ulps` units in the last place of the largest truth.

    `truth` is computed in float64; `ours` and `torchs` share shape and dtype, and both are finite
    where the truth is. The allowance is for a rounding that falls the other way in a single place;
    it is small enough that truncating instead of rounding fails.
    """
    assert ours.dtype == torchs.dtype, f"dtype: expected {torchs.dtype}, got {ours.dtype}"
    assert ours.shape == truth.shape, f"shape: expected {truth.shape}, got {ours.shape}"
    assert torch.equal(ours.isfinite(), truth.isfinite()), "finite in other places than the truth"
    if not truth.numel():
        return
    unit = torch.finfo(ours.dtype).eps * truth.abs().max().item()
    error, torchs_error = max_error(ours, truth), max_error(torchs, truth)
    allowed = times * torchs_error + ulps * unit
    assert error <= allowed, (
        f"error {error:.3e} exceeds {allowed:.3e} = {times} x torch's {torchs_error:.3e}"
        f" + {ulps} ulp of {unit:.3e} ({ours.dtype})"
    )
