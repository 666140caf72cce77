"""Weights of products cast to autocast's dtype once a step, all of them in a few launches.

torch's autocast casts one weight a launch, and one gradient back; it casts the weights of a frozen
module again at every call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from m3i_fast.models.transformer.layers import LayerNormLinear, LayerNormMLP

# By module, the parameters that it uses in products alone, which autocast casts.
OF_PRODUCTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("weight", "bias"),
    nn.Conv2d: ("weight", "bias"),
    LayerNormLinear: ("weight", "bias"),
    LayerNormMLP: ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"),
}
# Elements: gradients in the low dtype are kept until as many are there, and ranks reduce those of a
# part of the model while others are computed.
MAX_TOGETHER = 2**24
ALIGNMENT = 64  # elements between two tensors of one buffer: 128 bytes


class _Cast(torch.autograd.Function):
    """Copies of tensors in another dtype, whose gradients are copied back to the tensors' own."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.set_materialize_grads(False)
        copies = _buffers_like(tensors, dtype)
        torch._foreach_copy_(copies, tensors)
        return tuple(copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = {index: grad for index, grad in enumerate(grads) if grad is not None}
        # A buffer each: gradients are freed one by one.
        wide = {i: torch.empty_like(grad, dtype=ctx.dtypes[i]) for i, grad in given.items()}
        if given:
            torch._foreach_copy_(list(wide.values()), list(given.values()))
        return None, *(wide.get(index) for index in range(len(grads)))


def _buffers_like(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Return tensors of the same shapes in one allocation, contiguous and not initialised."""
    sizes = [-(-tensor.numel() // ALIGNMENT) * ALIGNMENT for tensor in tensors]
    buffer = tensors[0].new_empty(sum(sizes), dtype=dtype)
    return [
        part[: tensor.numel()].view(tensor.shape)
        for part, tensor in zip(buffer.split(sizes), tensors, strict=True)
    ]


@contextmanager
def cast_weights(model: nn.Module, *, dtype: torch.dtype, trained: bool) -> Iterator[None]:
    """Replace the weights of products in `model` by copies of `dtype` while the context lasts.

    trained: those that require a gradient, or else those that do not. Gradients of the copies are
    summed over all their uses in `dtype`, as autocast does. Weights of MAX_TOGETHER elements are
    cast together, in the order of the modules, and their gradients cast back once the last of them
    is computed. The context has to enclose what recomputes activations.
    """
    places = [
        (module, name, parameter)
        for module, name, parameter in _weights_of_products(model)
        if parameter.requires_grad == trained and parameter.dtype != dtype
    ]
    copies: dict[int, Tensor] = {}
    for together in _split({id(p): p for _, _, p in places}):
        copies |= zip(together, _Cast.apply(dtype, *together.values()), strict=True)
    for module, name, parameter in places:
        module._parameters[name] = copies[id(parameter)]  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def _split(parameters: Mapping[int, nn.Parameter]) -> Iterator[dict[int, nn.Parameter]]:
    """Yield parameters in order, of MAX_TOGETHER elements or one parameter at a time."""
    together: dict[int, nn.Parameter] = {}
    size = 0
    for key, parameter in parameters.items():
        if together and size + parameter.numel() > MAX_TOGETHER:
            yield together
            together, size = {}, 0
        together[key] = parameter
        size += parameter.numel()
    if together:
        yield together


def _weights_of_products(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in model.modules():
        for kind, names in OF_PRODUCTS.items():
            if isinstance(module, kind):
                for name in names:
                    parameter = module._parameters.get(name)
                    if parameter is not None:
                        yield module, name, parameter
