"""Norms and cosines of the terms' gradients by the encoder, from the step's own backward pass.

Legend: K terms; z the encoder's outputs, rows of width C in one or several tensors; w_k the factor
of term k in the sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations

import torch.nn.functional as F
from torch import Tensor

from m3i_fast.models.transformer.ragged import Cells, mapped
from m3i_fast.objectives.row_statistics import wide
from m3i_fast.objectives.step_context import Encoded


def separate_views(encoded: Encoded) -> Encoded:
    """Return the same tokens as new tensors of the graph, whose gradients are those of one term."""

    def separate(tokens: Sequence[Cells]) -> tuple[Cells, ...]:
        return tuple(mapped(lambda z: z.view_as(z), each) for each in tokens)

    return Encoded(separate(encoded.views), separate(encoded.local))


class TermGradients:
    """Gradients of the weighted terms by a shared last layer, without another backward pass.

        G_k = w_k (sum_r dL_k/dz_r z_r^T, sum_r dL_k/dz_r)

    is the gradient of term k by weight and bias of a linear layer z -> A z + b appended to the
    encoder, at A = 1 and b = 0. It stands for the gradients by all of the encoder's parameters, as
    the last shared layer does in GradNorm (arXiv 1711.02257, section 3.1). Gradients by z itself
    would not do: terms that predict from different images have different rows there, whose cosine
    is always 0.

    Each term has to read z through `separate_views`. The backward pass of the sum then reaches z by
    one gradient a term, which a hook accumulates. This works with compiled or recomputed blocks,
    gradient caching, sharded weights and CUDA graphs. The rows are those of this rank. In a step of
    several batches only the last one is measured, with its gradients divided by their number as in
    the step.
    """

    def __init__(self, read_by: Mapping[str, Encoded]) -> None:
        """Register the hooks; read_by: each term's `separate_views`, before the backward pass."""
        self._names = list(read_by)
        z = wide(read_by[self._names[0]].tensors[0].detach())
        width = z.shape[-1]
        self._sums = z.new_zeros(len(read_by), width + 1, width)  # transposed; the bias stands last
        for k, encoded in enumerate(read_by.values()):
            for view in encoded.tensors:
                view.register_hook(partial(self._add, k, view.detach()))

    def _add(self, term: int, z: Tensor, grad: Tensor) -> None:  # [..., C], [..., C]
        rows, grads = wide(z).flatten(0, -2), wide(grad).flatten(0, -2)
        self._sums[term, :-1].addmm_(rows.T, grads)
        self._sums[term, -1] += grads.sum(0)

    def metrics(self) -> dict[str, Tensor]:  # each []
        """Return |G_k| of every term and the cosine of every two; 0 for a term without gradient."""
        flat = self._sums.flatten(1)
        metrics = {f"gradient/{n}": x for n, x in zip(self._names, flat.norm(dim=1), strict=True)}
        unit = F.normalize(flat, dim=1, eps=1e-30)
        for i, j in combinations(range(len(self._names)), 2):
            name = f"gradient_cosine/{self._names[i]}_{self._names[j]}"
            metrics[name] = (unit[i] * unit[j]).sum()
        return metrics
