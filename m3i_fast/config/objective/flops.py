"""Floating-point operations of a part of a training step, and those of single products.

A multiply-accumulate is two operations. Counted are matrix products and convolutions; what is done
to single elements (norms, activations, softmax) is not, nor is it by `torch.utils.flop_counter`.
Closed forms return `Flops`: those of losses stand in `m3i_fast.config.objective.losses`, those of
encoders and predictors in `m3i_fast.costs`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

Product = tuple[int, int]
"""Features in, features out."""


@dataclass(frozen=True, slots=True)
class LayerFlops:
    """Hold the operations of the linear layers of blocks with these sides, which FP8 may run."""

    dim_in: int
    dim_out: int
    forward: int
    backward: int

    @property
    def product(self) -> Product:
        """Return the sides of the layers' weights."""
        return self.dim_in, self.dim_out


@dataclass(frozen=True, slots=True)
class Flops:
    """Hold the operations of a training step of one rank, or of a part of it."""

    forward: int = 0
    backward: int = 0
    """Those of the gradients of inputs and weights, each where it is needed."""
    recompute: int = 0
    """Forward operations that the backward pass does once more."""
    layers: tuple[LayerFlops, ...] = ()
    """Those of them that linear layers of blocks do, a row each pair of sides."""

    @property
    def model(self) -> int:
        """Return forward plus backward, the numerator of MFU."""
        return self.forward + self.backward

    @property
    def hardware(self) -> int:
        """Return forward, backward and recomputation together, the numerator of HFU."""
        return self.model + self.recompute

    @property
    def forward_only(self) -> Flops:
        """Return the forward operations alone, of a part that gets no gradient."""
        return Flops(self.forward, layers=tuple(replace(each, backward=0) for each in self.layers))

    def of_layers(self, products: Collection[Product]) -> int:
        """Count what linear layers of blocks with these sides do, forward and backward."""
        chosen = (each for each in self.layers if each.product in products)
        return sum(each.forward + each.backward for each in chosen)

    def __add__(self, other: Flops) -> Flops:
        layers = {each.product: each for each in self.layers}
        for each in other.layers:
            if (mine := layers.get(each.product)) is not None:
                forward, backward = mine.forward + each.forward, mine.backward + each.backward
                each = replace(each, forward=forward, backward=backward)
            layers[each.product] = each
        return Flops(
            self.forward + other.forward,
            self.backward + other.backward,
            self.recompute + other.recompute,
            tuple(layers.values()),
        )

    def __mul__(self, count: int) -> Flops:
        return Flops(
            self.forward * count,
            self.backward * count,
            self.recompute * count,
            tuple(
                replace(each, forward=each.forward * count, backward=each.backward * count)
                for each in self.layers
            ),
        )

    def scaled(self, share: float) -> Flops:
        """Return a share of the operations, rounded to whole ones."""
        return Flops(
            round(self.forward * share),
            round(self.backward * share),
            round(self.recompute * share),
            tuple(
                replace(
                    each,
                    forward=round(each.forward * share),
                    backward=round(each.backward * share),
                )
                for each in self.layers
            ),
        )

    def recomputed(self, *, but: int = 0) -> Flops:
        """Add the forward operations once more, less `but`, which follow the last saved tensor."""
        return replace(self, recompute=self.recompute + self.forward - but)


NONE = Flops()


def linear(rows: int, dim_in: int, dim_out: int, *, input_grad: bool = True) -> Flops:
    """Count [rows, dim_in] -> [rows, dim_out], its weights' gradient, and its inputs' if asked."""
    forward = 2 * rows * dim_in * dim_out
    return Flops(forward, forward * (1 + input_grad))
