"""Operators computed by the CPU over a device's memory: what of it needs no device."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from m3i_fast.benchmarks.launches.on_host import OF_CPU, ComputeOnHost, _filled, aten, host_alias


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


def test_attention_of_cuda_is_that_of_the_cpu() -> None:
    """Forward and backward of both operators, against torch's own attention and autograd."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 8, generator=rng, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 3, 7, 7, generator=rng)
    grad = torch.randn(2, 3, 7, 8, generator=rng)
    flash = aten._scaled_dot_product_flash_attention
    masked = aten._scaled_dot_product_efficient_attention
    for forward, backward, mask in (
        (flash.default, aten._scaled_dot_product_flash_attention_backward.default, None),
        (masked.default, aten._scaled_dot_product_efficient_attention_backward.default, bias),
    ):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        grads = torch.autograd.grad(expected, (q, k, v), grad)
        inputs = [x.detach() for x in (q, k, v)]
        if mask is None:
            out, sums = OF_CPU[forward](*inputs)
            got = OF_CPU[backward](
                grad, *inputs, out, sums, None, None, 7, 7, 0.0, False, None, None
            )
        else:
            out, sums = OF_CPU[forward](*inputs, mask, True)
            assert sums.shape[-1] == 32  # as CUDA's kernel aligns it
            got = OF_CPU[backward](grad, *inputs, mask, out, sums, None, None, 0.0, None)
        torch.testing.assert_close(out, expected)
        for ours, theirs in zip(got, grads, strict=False):
            torch.testing.assert_close(ours, theirs)
