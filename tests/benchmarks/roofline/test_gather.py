"""How many points of a sampling lie inside: closed forms against counting."""

from __future__ import annotations

import numpy as np
import pytest

from m3i_fast.costs.kernels.gather import Sampling

SHAPE = {"batch": 1, "channels": 8, "groups": 2, "size": 2}


@pytest.mark.parametrize(("reach", "spread"), [(0.0, 1.0), (1.3, 1.0), (20.0, 2.0)])
def test_points_and_corners_inside_are_those_of_drawn_offsets(reach: float, spread: float) -> None:
    call = Sampling(height=9, width=14, reach=reach, spread=spread, **SHAPE)
    draw = np.random.default_rng(0)
    ys, xs, j, i, _ = np.meshgrid(
        np.arange(9), np.arange(14), range(-1, 2), range(-1, 2), range(200), indexing="ij"
    )
    y = ys + spread * j + draw.uniform(-reach, reach, ys.shape)
    x = xs + spread * i + draw.uniform(-reach, reach, ys.shape)
    valid = (y > -1) & (x > -1) & (y < 9) & (x < 14)
    assert call.valid_share() == pytest.approx(valid.mean(), abs=3e-3)
    near = [np.floor(y) + dy for dy in (0, 1)], [np.floor(x) + dx for dx in (0, 1)]
    inside = sum(
        (valid & (b >= 0) & (b < 9) & (a >= 0) & (a < 14)).mean() for b in near[0] for a in near[1]
    )
    assert call.corners() / call.points == pytest.approx(inside, abs=1e-2)


def test_what_fits_the_first_level_cache_is_asked_for_once() -> None:
    """Twelve pixels of a row of 56 and a reach of one: a window of 5 x 16 pixels."""
    call = Sampling(batch=1, height=56, width=56, channels=128, groups=8, size=2, reach=1.0)
    window = 5 * 16 * 256
    asked = call.corners() / call.pixels * 16 * 2 * 12
    assert call.missing_share(12, 1e9) == pytest.approx(window / asked)
    assert call.missing_share(12, window / 2) == pytest.approx(0.5 + 0.5 * window / asked)
    assert call.missing_share(12, 0) == 1
