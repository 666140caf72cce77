"""Operators computed by the CPU over a device's memory: what of it needs no device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from m3i_fast.benchmarks.launches.on_host import OF_CPU, ComputeOnHost, _filled, aten, host_alias
from m3i_fast.ops import boltzmann


def test_an_alias_is_the_same_memory() -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    part = whole[1:3, ::2]
    alias = host_alias(part)
    assert torch.equal(alias, part) and alias.stride() == part.stride()
    alias.mul_(-1)
    assert torch.equal(part, -torch.arange(24.0).reshape(4, 6)[1:3, ::2])
    assert host_alias(whole[:0]).shape == (0, 6)


def test_values_go_into_what_was_dispatched() -> None:
    out = torch.zeros(3)
    assert _filled(out, torch.tensor([1.0, 2.0, 3.0])) is out and out.tolist() == [1, 2, 3]
    assert _filled(out, torch.ones(2)).shape == (2,)  # as many as the device would have counted
    kept = torch.zeros(2)
    assert _filled((out, kept, 7), (torch.zeros(3), None)) == (out, kept, 7)
    assert out.tolist() == [0, 0, 0]


def test_tensors_of_the_cpu_are_left_alone() -> None:
    x = torch.randn(5, requires_grad=True)
    with ComputeOnHost():
        value = (x * x).sum()
        value.backward()
    assert torch.equal(x.grad, 2 * x.detach()) and value == (x.detach() ** 2).sum()


def test_another_than_the_cpu_computes_an_operator() -> None:
    def doubled(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 2 * (x + y)

    x = torch.arange(3.0)
    mode = ComputeOnHost({aten.add.Tensor: doubled})
    assert mode._computed(aten.add.Tensor, (x, x), {}).tolist() == [0, 4, 8]
    assert mode._computed(aten.mul.Tensor, (x, x), {}).tolist() == [0, 1, 4]


FLASH = aten._scaled_dot_product_flash_attention.default
FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_backward.default
MASKED = aten._scaled_dot_product_efficient_attention.default
MASKED_BACKWARD = aten._scaled_dot_product_efficient_attention_backward.default


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """Attention by its definition, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias.double()
    if causal:
        logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf)
    return logits.softmax(-1) @ v


@pytest.mark.parametrize("keys", [7, 40])  # CUDA pads a row's sums to multiples of 32
@pytest.mark.parametrize(("causal", "scale"), [(False, None), (True, None), (False, 0.3)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_cuda_is_that_of_the_cpu(
    keys: int, causal: bool, scale: float | None, masked: bool
) -> None:
    """Forward and backward of both operators, as CUDA's autograd calls them."""
    rng = torch.Generator().manual_seed(0)
    queries = keys if causal else 33
    q, grad = (torch.randn(2, 3, queries, 8, generator=rng) for _ in range(2))
    k, v = (torch.randn(2, 3, keys, 8, generator=rng) for _ in range(2))
    bias = torch.randn(2, 3, queries, keys, generator=rng) if masked else None
    given = (q, k, v) if bias is None else (q, k, v, bias)
    leaves = [x.clone().requires_grad_() for x in given]
    expected = attend(*leaves[:3], leaves[3] if masked else None, causal, scale)
    grads = torch.autograd.grad(expected, leaves, grad.double())
    if masked:
        out, sums = OF_CPU[MASKED](q, k, v, bias, True, 0.0, causal, scale=scale)
        assert sums.shape[-1] % 32 == 0
        wanted = (True, True, True, True)
        saved = (q, k, v, bias, out, sums, None, None, 0.0, wanted, causal)
        got = OF_CPU[MASKED_BACKWARD](grad, *saved, scale=scale)
    else:
        out, sums = OF_CPU[FLASH](q, k, v, 0.0, causal, scale=scale)
        sizes = None, None, queries, keys
        saved = (q, k, v, out, sums, *sizes, 0.0, causal, None, None)
        got = OF_CPU[FLASH_BACKWARD](grad, *saved, scale=scale)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(got[: len(grads)], grads, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-5)


def test_operators_that_are_python_are_computed_one_by_one() -> None:
    rows = torch.randn(4, 8, requires_grad=True)
    expected = boltzmann(rows, rows.detach(), torch.tensor(3.0), targets=torch.arange(4))
    with ComputeOnHost():
        value = boltzmann(rows, rows.detach(), torch.tensor(3.0), targets=torch.arange(4))
    assert torch.equal(value, expected)


def test_products_of_half_types_in_float32() -> None:
    """CUDA's alone; on the host, of widened factors."""
    a, b = (torch.randn(3, 3).bfloat16() for _ in range(2))
    out = torch.zeros(3, 3)
    OF_CPU[aten.mm.dtype_out](a, b, torch.float32, out=out)
    assert torch.equal(out, a.float() @ b.float())
    OF_CPU[aten.addmm.dtype_out](out, a, b, torch.float32, out=out)
    torch.testing.assert_close(out, 2 * (a.float() @ b.float()))
