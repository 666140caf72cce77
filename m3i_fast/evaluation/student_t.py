"""Student's t distribution, which neither numpy nor torch provides."""

from __future__ import annotations

import math

import numpy as np

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(128)
_NUM_HALVINGS = 60  # of the logarithm of a quantile


def student_tail(t: float, df: float) -> float:
    """Return P(T > t) for t >= 0 and df >= 1, where df need not be whole.

    With t = sqrt(df) tan(a) the density is proportional to cos(a) ** (df - 1), which the
    Gauss-Legendre rule integrates up to pi / 2.
    """
    start = math.atan2(t, math.sqrt(df))
    half = (math.pi / 2 - start) / 2
    area = half * float(_WEIGHTS @ np.cos(start + half * (_NODES + 1)) ** (df - 1))
    return area * math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)


def student_quantile(tail: float, df: float) -> float:
    """Return the t >= 0 that is exceeded with probability `tail`, for 0 < tail <= 1/2."""
    low, high = -20.0, 20.0  # of log t
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        if student_tail(math.exp(middle), df) > tail:
            low = middle
        else:
            high = middle
    return math.exp(high)
