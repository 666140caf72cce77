"""`boltzmann` as autograd functions, which call the compiled ops in their order.

Legend: N rows of z_hat and M rows ("columns") of z, D features; K parts of a sum. With several
ranks the inputs are this rank's own rows and columns, and the value is that of all ranks'. "Wide"
is fp32, fp64 for fp64.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m3i_fast.ops.boltzmann_exchange import Block, SingleProcess, Weights
from m3i_fast.ops.library import m3i

logger = logging.getLogger(__name__)

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


class _Shift(NamedTuple):
    """What `boltzmann_shift` returns: one shift for all logits, where that may serve them."""

    rows: Tensor  # [N] wide
    cols: Tensor  # [M] wide
    bound: Tensor  # [] wide, of all logits
    run: Tensor  # [] bool


def _prepare(
    z_hat: Tensor,  # [N, D]
    z: Tensor,  # [M, D]
    scale: Tensor,  # [] wide
    bias: Tensor | None,  # [] or [M] wide
    row_ids: Tensor | None,  # [N] int64
    col_ids: Tensor | None,  # int64, of all columns
    exchange: SingleProcess,
) -> tuple[Block, Tensor, _Shift]:
    """Return the arguments of the ops on blocks, this rank's extremes, and the common shift."""
    row_ids, col_ids, own_bias, extremes = m3i.boltzmann_prepare.default(
        z_hat, z, bias, row_ids, col_ids, *exchange.place()
    )
    col_bias = exchange.gather(own_bias)
    block = Block(z_hat, z, scale, col_bias, row_ids, exchange.column_ids(col_ids))
    shift = m3i.boltzmann_shift.default(exchange.largest(extremes), scale, row_ids, col_bias)
    return block, extremes, _Shift(*shift)


class _Grads(NamedTuple):
    """Gradients by the arguments of a function; those that are not needed are empty."""

    z_hat: Tensor  # [N, D]
    z: Tensor  # [M, D]
    scale: Tensor  # [] wide
    bias: Tensor  # [] or [M] wide

    def scaled(
        self, grad_out: Tensor, share: Tensor | None, scale: Tensor | None, dtype: torch.dtype
    ) -> _Grads:
        """Multiply all by grad_out and share, and those by features by the scale, as `dtype`.

        Wide features' gradients are this call's own, and multiplied in place: a copy would be as
        large as they are.
        """
        wide = dtype == grad_out.dtype and scale is not None
        features = (self.z_hat.new_empty(0), self.z.new_empty(0)) if wide else self[:2]
        factor, z_hat, z, *others = m3i.boltzmann_scale.default(
            grad_out, share, scale, *features, *self[2:], dtype
        )
        if wide:
            z_hat, z = (grad.mul_(factor) if grad.numel() else grad for grad in self[:2])
        return _Grads(z_hat, z, *others)


# ---- Softmax -------------------------------------------------------------------------------------


class _Sums(NamedTuple):
    """Sums of exponentials of shifted logits, as boltzmann_totals and boltzmann_loss take them."""

    rows: Tensor  # [4, N], by the common shift
    cols: Tensor  # [4, M], or [4, 0]
    rows_again: Tensor | None  # [4, N], by exact shifts, which hold where `exact` does
    cols_again: Tensor | None
    row_shift: Tensor  # [N]
    col_shift: Tensor  # [M]
    exact: Tensor  # [] bool: shifts differ


def _sum(block: Block, common: _Shift, symmetric: bool, exchange: SingleProcess) -> _Sums:
    """Sum with a common shift, and again with exact ones where that left sums out of range.

    The device decides which sums are used, without a host synchronisation.
    """
    row_shift, col_shift = common.rows, common.cols
    first = exchange.sums(block, row_shift, col_shift, symmetric=symmetric, run=common.run)
    exact = exchange.max(m3i.boltzmann_exact.default(*first, common.run))
    if exchange.is_settled(exact):
        return _Sums(*first, None, None, row_shift, col_shift, exact)
    maxima = exchange.maxima(block, exact)
    row_shift, col_shift = m3i.boltzmann_exact_shift.default(*maxima, row_shift, col_shift, exact)
    again = exchange.sums(block, row_shift, col_shift, exact=True, symmetric=symmetric, run=exact)
    return _Sums(*first, *again, row_shift, col_shift, exact)


class Softmax(torch.autograd.Function):
    """The softmax form of `boltzmann`, whose gradient recomputes the logits in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        z_hat: Tensor,  # [N, D]
        z: Tensor,  # [M, D]
        scale: Tensor,  # [] wide
        bias: Tensor | None,  # [] or [M] wide
        row_ids: Tensor | None,  # [N] int64
        col_ids: Tensor | None,  # int64, of all columns
        symmetric: bool,
        mean: bool,
        exchange: SingleProcess,
    ) -> Tensor:  # [] wide
        block, _, common = _prepare(z_hat, z, scale, bias, row_ids, col_ids, exchange)
        sums = _sum(block, common, symmetric, exchange)
        totals = exchange.sum_rows(m3i.boltzmann_totals.default(*sums))
        value, share, num_rows, *weights = m3i.boltzmann_loss.default(
            *sums, totals, common.bound, symmetric, mean, exchange.ranks
        )
        # On CUDA the check would synchronise with the host.
        if z.device.type == "cpu" and not torch.compiler.is_compiling() and num_rows == 0:
            _warn_once("no row of the batch has a positive: the loss is 0")
        ctx.exchange, ctx.has_bias_each = exchange, bias is not None and bias.dim() > 0
        ctx.save_for_backward(*block, *sums[4:], *weights, share)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        saved, exchange = ctx.saved_tensors, ctx.exchange
        block, weights, share = Block(*saved[:6]), Weights(*saved[6:11]), saved[11]
        needed = ctx.needs_input_grad[:4]
        grads, _ = _grads(block, weights, needed, ctx.has_bias_each, exchange, sigmoid=False)
        return _where(needed, grads.scaled(grad, share, block.scale, block.z.dtype))


def _grads(
    block: Block,
    weights: Weights,
    needed: tuple[bool, ...],  # [4]
    has_bias_each: bool,
    exchange: SingleProcess,
    *,
    sigmoid: bool,
) -> tuple[_Grads, Tensor]:
    """Return gradients without their common factors, and the values of the sigmoid form's rows."""
    needs_z_hat, needs_z, _, needs_bias = needed
    grad_z_hat, grad_z, grad_scale, grad_bias, values = exchange.grads(
        block, weights, sigmoid=sigmoid, needs_grad=(needs_z_hat, needs_z, needs_bias)
    )
    if needs_bias:
        grad_bias = exchange.own(exchange.sum(grad_bias))
        grad_bias = grad_bias.contiguous() if has_bias_each else grad_bias.sum()
    return _Grads(grad_z_hat, grad_z, grad_scale, grad_bias), values


def _where(needed: tuple[bool, ...], grads: _Grads) -> tuple[Tensor | None, ...]:
    """Return what a backward returns: the gradients by tensors, None by the other arguments."""
    pairs = zip(grads, needed, strict=True)
    return *(grad if wanted else None for grad, wanted in pairs), *(None,) * 5


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
        bias: Tensor | None,  # [] or [M] wide
        row_ids: Tensor | None,  # [N] int64
        col_ids: Tensor | None,  # int64, of all columns
        needs_grad: tuple[bool, ...],  # [4]
        mean: bool,
        exchange: SingleProcess,
    ) -> Tensor:  # [] wide
        block, extremes, common = _prepare(z_hat, z, scale, bias, row_ids, col_ids, exchange)
        num_rows = exchange.sum_parts(extremes)

        def loss(values: Tensor) -> tuple[Tensor, Tensor]:  # [N] -> [], []
            return m3i.boltzmann_sigmoid_loss.default(
                exchange.sum_parts(values), num_rows, common.bound, mean, exchange.ranks
            )

        if not any(needs_grad):
            rows, _ = exchange.sums(block, *common[:2], sigmoid=True)
            return loss(rows[0])[0]
        # The kernels read no weights of the sigmoid.
        unused = (scale.new_empty(3, shift.shape[0]) for shift in common[:2])
        weights = Weights(*common[:2], common.run, *unused)
        each = bias is not None and bias.dim() > 0
        grads, values = _grads(block, weights, needs_grad, each, exchange, sigmoid=True)
        value, share = loss(values)
        ctx.save_for_backward(*grads.scaled(share, None, scale, z.dtype))
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        grads = _Grads(*ctx.saved_tensors)
        return _where(ctx.needs_input_grad[:4], grads.scaled(grad, None, None, grads.z.dtype))
