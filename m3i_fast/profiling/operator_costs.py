"""FLOPs and bytes of an operator in a trace, from the shapes that were recorded with it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

ELEMENT_BYTES = {
    "double": 8,
    "float": 4,
    "long int": 8,
    "int": 4,
    "short int": 2,
    "signed char": 1,
    "unsigned char": 1,
    "bool": 1,
    "c10::BFloat16": 2,
    "c10::Half": 2,
    "c10::Float8_e4m3fn": 1,
    "c10::Float8_e5m2": 1,
}
# Positions of stride, padding and dilation among the arguments of the operators that compute a
# convolution themselves. Others, such as aten::conv2d, call one of these.
CONVOLUTIONS = {
    "aten::mkldnn_convolution": (4, 3, 5),
    "aten::cudnn_convolution": (3, 2, 4),
    "aten::_conv_depthwise2d": (4, 5, 6),
}

Event = Mapping[str, Any]


def argument(event: Event, name: str) -> Any:
    """Return an argument of an event; None where it has none of that name."""
    return event.get("args", {}).get(name)


def _list(event: Event, name: str) -> list[Any]:
    return list(argument(event, name) or [])


def bytes_of(event: Event) -> float:
    """Return the bytes of an operator's tensor arguments; its results are not in a trace."""
    kinds, dims = _list(event, "Input type"), _list(event, "Input Dims")
    pairs = zip(kinds, dims, strict=False)
    return float(sum(ELEMENT_BYTES[k] * prod(d) for k, d in pairs if k in ELEMENT_BYTES and d))


def flops_of(event: Event) -> float:
    """Return the FLOPs of matrix products, convolutions, attention and losses over all pairs.

    It is 0 for all other operators, and where shapes were not recorded.
    """
    name, dims = event["name"], _list(event, "Input Dims")
    try:
        if name == "aten::mm" or name == "aten::_scaled_mm":
            return _product(dims[0], dims[1])
        if name in ("aten::addmm", "aten::baddbmm"):
            return _product(dims[1], dims[2])
        if name == "aten::bmm":
            return _product(dims[0], dims[1])
        if re.match(r"aten::_scaled_dot_product_(?!attention_math)\w*attention\w*$", name):
            return _attention(dims, backward=name.endswith("backward"))
        # On a GPU the operators above call these, which launch the kernels.
        if found := re.match(r"aten::_(flash|efficient|cudnn)_attention_(for|back)ward$", name):
            has_rows_first = found[1] != "cudnn"
            return _attention(dims, backward=found[2] == "back", rows=-3 if has_rows_first else -2)
        if name in ("m3i::boltzmann_sums", "m3i::boltzmann_grads") and not _is_exact(event):
            product = 2.0 * dims[0][0] * dims[1][0] * dims[0][1]
            wanted = _wanted(event) if name.endswith("grads") else 0
            return product * (1 + wanted)
        if name in CONVOLUTIONS:
            return _convolution(dims[0], dims[1], _list(event, "Concrete Inputs"), name)
        if name == "aten::convolution_backward":
            gradients = _list(event, "Concrete Inputs")[10].split(", ")[:2]
            product = 2.0 * prod(dims[0]) * prod(dims[2][1:])
            return product * sum("True" in wanted for wanted in gradients)
    except (IndexError, TypeError, ValueError):  # shapes were not recorded
        return 0.0
    return 0.0


def _product(a: Sequence[int], b: Sequence[int]) -> float:
    """Return the FLOPs of [..., m, k] times [..., k, n]."""
    return 2.0 * prod(a) * b[-1]


def _convolution(
    x: Sequence[int], weight: Sequence[int], concrete: Sequence[str], name: str
) -> float:
    """Return the FLOPs of [N, C, *size] with [O, C / groups, *kernel], a dot product a value."""
    stride, padding, dilation = (
        [int(number) for number in re.findall(r"\d+", concrete[place])]
        for place in CONVOLUTIONS[name]
    )
    size = [
        (x[2 + i] + 2 * padding[i] - dilation[i] * (kernel - 1) - 1) // stride[i] + 1
        for i, kernel in enumerate(weight[2:])
    ]
    return 2.0 * x[0] * prod(size) * prod(weight)


def _attention(dims: Sequence[Sequence[int]], *, backward: bool, rows: int = -2) -> float:
    """Return FLOPs of two products of [B, H, N, d] and [B, H, M, d]; of five backward.

    rows: the dimension of N and M; -3 of [B, N, H, d]. It is 0 where rows of several pictures lie
    behind each other, [N, H, d], of which shapes do not tell the pairs.
    """
    query, key = dims[backward], dims[backward + 1]
    if len(query) < 4:
        return 0.0
    product = 2.0 * prod(query) * key[rows]
    return product * (5 if backward else 2)


def _is_exact(event: Event) -> bool:
    """Return whether this is the `boltzmann_sums` call that is empty if the first succeeded."""
    return event["name"].endswith("sums") and _list(event, "Concrete Inputs")[8:9] == ["True"]


def _wanted(event: Event) -> int:
    """Return the number of gradients of `boltzmann_grads`, z_hat and z, with one product each."""
    flags = re.findall("True|False", "".join(_list(event, "Concrete Inputs")[-1:]))
    return max(flags[:2].count("True"), 1)
