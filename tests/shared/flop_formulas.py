"""What `torch.utils.flop_counter` does not know, or gets wrong, for its `custom_mapping`."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count

from m3i_fast.ops import library

aten, m3i = torch.ops.aten, library.m3i
Shape = tuple[int, ...]


def _convolution_backward(
    grad: Shape, x: Shape, weight: Shape, *args: Any, out_shape: Any, **_: Any
) -> int:
    """torch's counts the gradient of a depthwise weight once for each channel too often."""
    needs_input, needs_weight, _ = args[-1]
    return conv_flop_count(list(x), list(weight), list(grad)) * (needs_input + needs_weight)


def _boltzmann_sums(z_hat: Shape, z: Shape, *args: Any, **_: Any) -> int:
    """The second, exact pass is asked for always, and done where the first one overflowed."""
    exact = args[6]
    return 0 if exact else 2 * z_hat[0] * z[0] * z_hat[1]


def _boltzmann_grads(z_hat: Shape, z: Shape, *args: Any, **_: Any) -> int:
    needs_z_hat, needs_z, _ = args[-1]
    return 2 * z_hat[0] * z[0] * z_hat[1] * (1 + needs_z_hat + needs_z)


def _boltzmann_rows(z_hat: Shape, z: Shape, *args: Any, **_: Any) -> int:
    """With soft targets the teacher's logits as well."""
    needs_z_hat, needs_z, *_ = args[-1]
    product = 2 * z_hat[0] * z[0] * z_hat[1] * (1 + needs_z_hat + needs_z)
    of_targets = args[3]
    return product + (2 * z_hat[0] * z[0] * of_targets[1] if of_targets else 0)


def _gaussian(z_hat: Shape, *args: Any, **_: Any) -> int:
    return 2 * 2 * prod(z_hat) * z_hat[-1] * bool(args[-1])


def _gaussian_bwd(grad: Shape, z_hat: Shape, *args: Any, **_: Any) -> int:
    return 2 * prod(z_hat) * z_hat[-1] * bool(args[-1])


def _attention(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(grad: Shape, q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


FORMULAS: dict[Any, Callable[..., int]] = {
    aten.convolution_backward: _convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    m3i.boltzmann_sums: _boltzmann_sums,
    m3i.boltzmann_grads: _boltzmann_grads,
    m3i.boltzmann_rows: _boltzmann_rows,
    m3i.gaussian: _gaussian,
    m3i.gaussian_bwd: _gaussian_bwd,
}
