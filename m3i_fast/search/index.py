"""Exact search: the pictures whose features have the largest cosine with a query.

Legend: N pictures, C width of a feature.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CHUNK_BYTES = 256 << 20  # of the features that one product reads
RESCORED = 4096  # rows at once in fp64
UNIT_ROUNDOFF = 2.0**-24  # of fp32
TINY = torch.finfo(torch.float32).tiny  # in place of a norm of 0


class Index:
    """Rows of features, searched by all their cosines with a query.

    The products are fp32, and what they leave undecided is computed again in fp64: a row may be
    among the k nearest where its fp32 cosine is no further below the k-th than both may be wrong
    by, which is less than (2 C + 8) 2^-24 each: C products are summed up, and C squares of the norm
    (Higham, Accuracy and Stability, section 3.1). So the answer is that of fp64, whatever the
    number of threads and the order of the sums; of equal cosines the lower row comes first. Rows
    whose norm is not finite in fp32 are never among them.
    """

    def __init__(self, features: NDArray[np.float32]) -> None:  # [N, C], may be a memory map
        self._rows = torch.from_numpy(features)
        self._chunk = max(1, CHUNK_BYTES // (4 * features.shape[1]))
        norms = [chunk.norm(dim=1) for chunk in self._rows.split(self._chunk)]
        norm = torch.cat(norms)
        self._is_finite = norm.isfinite()
        self._scale = norm.clamp_min(TINY).reciprocal()

    def __len__(self) -> int:
        return len(self._rows)

    def nearest(
        self,
        query: Tensor,  # [C]
        num: int,
        among: NDArray[np.bool_] | None = None,  # [N]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the rows of the `num` largest cosines with `query`, and these, in order.

        among: rows that may be returned; None: all. Fewer are returned where there are fewer.
        Raises ValueError for a query whose norm is not finite.
        """
        query = query.detach().cpu().float()
        if not query.norm().isfinite():
            raise ValueError("expected a query of finite numbers, got others: the model has none")
        unit = query / query.norm().clamp_min(TINY)
        scores = torch.empty(len(self._rows))
        parts = zip(self._rows.split(self._chunk), scores.split(self._chunk), strict=True)
        for chunk, out in parts:
            torch.mv(chunk, unit, out=out)
        scores *= self._scale
        allowed = self._is_finite
        if among is not None:
            allowed = allowed & torch.from_numpy(among)
        scores.masked_fill_(~allowed, -torch.inf)
        num = min(num, int(allowed.sum()))
        if num < 1:
            return np.zeros(0, np.int64), np.zeros(0)
        least = scores.topk(num, sorted=False).values.min()
        margin = 2 * (2 * len(query) + 8) * UNIT_ROUNDOFF
        candidates = (scores >= least - margin).nonzero()[:, 0]
        exact = torch.cat([self._cosines(rows, query) for rows in candidates.split(RESCORED)])
        order = np.lexsort((candidates.numpy(), -exact.numpy()))[:num]
        return candidates.numpy()[order], exact.numpy()[order]

    def _cosines(self, rows: Tensor, query: Tensor) -> Tensor:  # [n], [C] -> [n] fp64
        chosen, wide = self._rows[rows].double(), query.double()
        return (chosen @ wide) / chosen.norm(dim=1).clamp_min(TINY) / wide.norm().clamp_min(TINY)
