"""`boltzmann` as autograd functions, which compute on vectors of N and M around the compiled ops.

Legend: N rows of z_hat and M rows ("columns") of z, D features; K is N or M. With several ranks
the inputs are this rank's own rows and columns, and the value is that of all ranks'. "Wide" is
fp32, fp64 for fp64.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m3i_fast.ops.boltzmann_exchange import Block, SingleProcess, Weights

logger = logging.getLogger(__name__)

IGNORED = -1
"""The id of a row or column that is ignored."""

# The largest logit whose exponential needs no shift.
_HEADROOM = {torch.float32: 60.0, torch.float64: 600.0}
_VANISHED = {torch.float32: 1e-30, torch.float64: 1e-290}
# Bounds of the logits up to which a common shift is tried before exact ones.
_COMMON = {torch.float32: 200.0, torch.float64: 2000.0}

# Messages that were logged; each is logged once.
_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning("boltzmann: %s", message)


def _refuse_second_derivative() -> None:
    # torch's once_differentiable does not raise where the incoming gradient is a constant.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "boltzmann: expected to be differentiated once, got a backward with create_graph"
        )


def _largest_logit(block: Block, own_bias: Tensor, exchange: SingleProcess) -> Tensor:  # []
    """Bound all logits of all ranks by |scale| max |z_hat| max |z| + max |bias|."""
    ignored = own_bias == -torch.inf
    lengths = [
        torch.linalg.vector_norm(rows, dim=1, dtype=own_bias.dtype)
        for rows in (block.z_hat, block.z)
    ]
    largest = [
        torch.cat([sizes.masked_fill(unused, 0), own_bias.new_zeros(1)]).amax()
        for sizes, unused in (
            (lengths[0], block.row_ids < 0),
            (lengths[1], ignored),
            (own_bias.abs(), ignored),
        )
    ]
    max_row, max_column, max_bias = exchange.max(torch.stack(largest))
    return block.scale.abs() * max_row * max_column + max_bias


def _nan_unless_finite(bound: Tensor) -> Tensor:  # [] -> [] 0 or NaN
    return bound - bound


# ---- Softmax -------------------------------------------------------------------------------------


class _Sums(NamedTuple):
    """Sums of exponentials of shifted logits; cuda/boltzmann/params.h lists the four of a row."""

    rows: Tensor  # [4, N]
    cols: Tensor  # [4, M], or [4, 0]
    row_shift: Tensor  # [N]
    col_shift: Tensor  # [M]
    exact: Tensor  # [] bool: shifts differ


def _vanished(sums: Tensor) -> Tensor:  # [4, K] -> [] bool
    """Return whether a sum that the loss divides by has left the range of its dtype."""
    total = sums[0] + sums[1]
    lost = (total < _VANISHED[total.dtype]) | ~total.isfinite()
    return (lost & (sums[3] > 0)).any()


def _softmax_sums(block: Block, bound: Tensor, symmetric: bool, exchange: SingleProcess) -> _Sums:
    """Sum with a common shift, and again with exact ones where that left sums out of range.

    The device decides which sums are used: in one process without a host synchronisation.
    """
    common = (bound - _HEADROOM[bound.dtype]).clamp_min(0)
    shifts = common.repeat(block.row_ids.shape), common.repeat(block.bias.shape)
    run = bound <= _COMMON[bound.dtype]
    first = exchange.sums(block, *shifts, symmetric=symmetric, run=run)
    exact = exchange.max(~run | _vanished(first[0]) | _vanished(first[1]))
    if exchange.is_settled(exact):
        return _Sums(*first, *shifts, exact)

    def finite(largest: Tensor) -> Tensor:  # -inf for a row whose columns are all ignored
        return largest.masked_fill(largest == -torch.inf, 0)

    maxima = exchange.maxima(block, exact)
    row_shift, col_shift = (
        torch.where(exact, finite(largest), shift)
        for largest, shift in zip(maxima, shifts, strict=True)
    )
    again = exchange.sums(block, row_shift, col_shift, exact=True, symmetric=symmetric, run=exact)
    rows, cols = (torch.where(exact, *both) for both in zip(again, first, strict=True))
    return _Sums(rows, cols, row_shift, col_shift, exact)


def _nll(sums: Tensor, shift: Tensor) -> Tensor:  # [4, K], [K] -> [K]
    """Compute each row's mean negative log-likelihood over its positives; 0 without one.

    With the exponentials p of the positive and n of the negatives, -log(p / (p + n)) is computed as
    log1p(n / p): a difference of two logarithms would lose the small loss of a converged pair.
    """
    negatives, positives, logits, count = sums
    mean_logit = logits / count
    spread = torch.where(count == 1, 0, positives.log() + shift - mean_logit)
    close = (negatives / positives).log1p() + spread
    far = (negatives + positives).log() + shift - mean_logit
    return torch.where(negatives <= positives, close, far).masked_fill(count == 0, 0)


def _weights(sums: Tensor) -> Tensor:  # [4, K] -> [3, K]
    """Compute the weights by which exponentials give the gradient of `_nll` by the logits.

    They are those of cuda/boltzmann/params.h. The gradient by a single positive is -n / (n + p),
    computed without a difference.
    """
    negatives, positives, _, count = sums
    total = negatives + positives
    single = count == 1
    target = torch.where(single, negatives / total, 1 / count)
    weights = torch.stack([1 / total, torch.where(single, 0, 1 / total), target])
    return weights.masked_fill(count == 0, 0)


class Softmax(torch.autograd.Function):
    """The softmax form of `boltzmann`, whose gradient recomputes the logits in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        z_hat: Tensor,  # [N, D]
        z: Tensor,  # [M, D]
        scale: Tensor,  # [] wide
        bias: Tensor,  # [M] wide
        row_ids: Tensor,  # [N] int32
        col_ids: Tensor | None,  # of all columns
        symmetric: bool,
        mean: bool,
        exchange: SingleProcess,
    ) -> Tensor:  # [] wide
        block = Block(z_hat, z, scale, exchange.gather(bias), row_ids, col_ids)
        bound = _largest_logit(block, bias, exchange)
        sums = _softmax_sums(block, bound, symmetric, exchange)
        nll = torch.stack([_nll(sums.rows, sums.row_shift).sum(), (sums.rows[3] > 0).sum()])
        value, num_rows = exchange.sum(nll)
        # On CUDA the check would synchronise with the host.
        if z.device.type == "cpu" and not torch.compiler.is_compiling() and num_rows == 0:
            _warn_once("no row of the batch has a positive: the loss is 0")
        row_share = scale.new_full((), 0.5 if symmetric else 1.0)
        col_share = row_share
        if mean:
            row_share = row_share / num_rows.clamp_min(1)
            col_share = col_share / (sums.cols[3] > 0).sum().clamp_min(1)
        value = row_share * value
        col_weights = scale.new_zeros(3, block.bias.shape[0])
        if symmetric:
            value = value + col_share * _nll(sums.cols, sums.col_shift).sum()
            col_weights = _weights(sums.cols) * (col_share / row_share)
        ctx.exchange = exchange
        ctx.save_for_backward(*block, *sums[2:], _weights(sums.rows), col_weights, row_share)
        return value + _nan_unless_finite(bound)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        saved, exchange = ctx.saved_tensors, ctx.exchange
        block, weights, row_share = Block(*saved[:6]), Weights(*saved[6:11]), saved[11]
        needs_z_hat, needs_z, needs_scale, needs_bias = ctx.needs_input_grad[:4]
        needs_grad = (needs_z_hat, needs_z, needs_bias)
        grads = exchange.grads(block, weights, sigmoid=False, needs_grad=needs_grad)
        grad_z_hat, grad_z, grad_scale, grad_bias, _ = grads
        factor = grad * row_share * exchange.ranks
        return (
            grad_z_hat.mul_(factor * block.scale).to(block.z.dtype) if needs_z_hat else None,
            grad_z.mul_(factor * block.scale).to(block.z.dtype) if needs_z else None,
            factor * grad_scale if needs_scale else None,
            factor * exchange.own(exchange.sum(grad_bias)) if needs_bias else None,
            *(None,) * 5,
        )


# ---- Sigmoid -------------------------------------------------------------------------------------


class Sigmoid(torch.autograd.Function):
    """The sigmoid form of `boltzmann`, whose gradient is computed in the forward pass.

    It needs no sum over a row, so that one pass over the logits gives value and gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z_hat: Tensor,  # [N, D]
        z: Tensor,  # [M, D]
        scale: Tensor,  # [] wide
        bias: Tensor,  # [M] wide
        row_ids: Tensor,  # [N] int32
        col_ids: Tensor | None,  # of all columns
        needs_grad: tuple[bool, ...],  # [4]
        mean: bool,
        exchange: SingleProcess,
    ) -> Tensor:  # [] wide
        block = Block(z_hat, z, scale, exchange.gather(bias), row_ids, col_ids)
        lost = _nan_unless_finite(_largest_logit(block, bias, exchange))
        num_rows = exchange.sum((row_ids != IGNORED).sum().to(scale.dtype)).clamp_min(1)
        share = 1 / num_rows if mean else torch.ones_like(num_rows)
        shifts = scale.new_zeros(z_hat.shape[0]), torch.zeros_like(block.bias)
        if not any(needs_grad):
            rows, _ = exchange.sums(block, *shifts, sigmoid=True)
            return share * exchange.sum(rows[0].sum()) + lost
        unused = (scale.new_zeros(3, len(shift)) for shift in shifts)
        weights = Weights(*shifts, torch.zeros_like(scale, dtype=torch.bool), *unused)
        needs_z_hat, needs_z, _, needs_bias = needs_grad
        grad_z_hat, grad_z, grad_scale, grad_bias, values = exchange.grads(
            block, weights, sigmoid=True, needs_grad=(needs_z_hat, needs_z, needs_bias)
        )
        factor = share * exchange.ranks
        ctx.save_for_backward(
            *(grad.mul_(factor * scale).to(z.dtype) for grad in (grad_z_hat, grad_z)),
            factor * grad_scale,
            factor * exchange.own(exchange.sum(grad_bias)) if needs_bias else grad_bias,
        )
        return share * exchange.sum(values.sum()) + lost

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        grads = (
            (grad * saved).to(saved.dtype) if needed else None
            for saved, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:4], strict=True)
        )
        return *grads, *(None,) * 5
