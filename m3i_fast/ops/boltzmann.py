"""The Boltzmann likelihood: softmax or sigmoid losses over all pairs, without an array of them.

Legend: N predictions, M targets, D features. C = z_hat z^T are the dot products [N, M], of which
only tiles ever exist.

The compiled ops work on blocks and return sums over rows and columns (`cuda/boltzmann`); what turns
these into the loss, and into the weights that the gradient needs, is a few vectors of N and M.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from m3i_fast.ops.library import m3i

logger = logging.getLogger(__name__)

IGNORED = -1
"""The id of a row or column that takes no part."""

# Said once in the log.
_warned: set[str] = set()

_NOT_A_COLUMN = -2  # the id of an ignored column: equals no row's
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Up to here exponentials need no shift.
_HEADROOM = {torch.float32: 60.0, torch.float64: 600.0}
_VANISHED = {torch.float32: 1e-30, torch.float64: 1e-290}
# Bounds of the logits up to which a common shift is tried before exact ones.
_COMMON = {torch.float32: 200.0, torch.float64: 2000.0}


class _Block(NamedTuple):
    """What all compiled ops take of a call, in their order."""

    z_hat: Tensor  # [N, D]
    z: Tensor  # [M, D]
    scale: Tensor  # [] wide: fp32, or fp64 for fp64
    bias: Tensor  # [M] wide, -inf where ignored
    row_ids: Tensor  # [N] int32
    col_ids: Tensor | None  # [M] int32, or the columns are counted


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning("boltzmann: %s", message)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- Fake kernels --------------------------------------------------------------------------------


@torch.library.register_fake("m3i::boltzmann_maxima")
def _fake_maxima(
    z_hat: Tensor,
    z: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_ids: Tensor,
    run: Tensor | None,
) -> tuple[Tensor, Tensor]:  # [N], [M]
    return scale.new_empty(z_hat.shape[0]), scale.new_empty(z.shape[0])


@torch.library.register_fake("m3i::boltzmann_sums")
def _fake_sums(
    z_hat: Tensor,
    z: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_ids: Tensor,
    col_ids: Tensor | None,
    row_shift: Tensor,  # [N]
    col_shift: Tensor,  # [M]
    exact: bool,
    symmetric: bool,
    sigmoid: bool,
    run: Tensor | None,  # [] bool
) -> tuple[Tensor, Tensor]:  # [4, N], [4, M or 0]
    columns = z.shape[0] if symmetric else 0
    return scale.new_empty(4, z_hat.shape[0]), scale.new_empty(4, columns)


@torch.library.register_fake("m3i::boltzmann_grads")
def _fake_grads(
    z_hat: Tensor,
    z: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_ids: Tensor,
    col_ids: Tensor | None,
    row_shift: Tensor,  # [N]
    col_shift: Tensor,  # [M]
    exact: Tensor,  # [] bool
    row_weights: Tensor,  # [3, N]
    col_weights: Tensor,  # [3, M]
    sigmoid: bool,
    needs_grad: Sequence[bool],  # [3] z_hat, z, bias
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        scale.new_empty(z_hat.shape if needs_grad[0] else 0),
        scale.new_empty(z.shape if needs_grad[1] else 0),
        scale.new_empty(()),
        scale.new_empty(z.shape[0] if needs_grad[2] else 0),
        scale.new_empty(z_hat.shape[0] if sigmoid else 0),
    )


# ---- Softmax -------------------------------------------------------------------------------------


class _Sums(NamedTuple):
    """Of exponentials of logits less a shift; which four stands in boltzmann_params.h."""

    rows: Tensor  # [4, N]
    cols: Tensor  # [4, M], or [4, 0]
    row_shift: Tensor  # [N]
    col_shift: Tensor  # [M]
    exact: Tensor  # [] bool: shifts differ


def _largest_logit(block: _Block) -> Tensor:  # []
    """A bound of all logits: |scale| max |z_hat| max |z| + max |bias|."""

    def longest(rows: Tensor, ignored: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=block.scale.dtype)
        return norms.masked_fill(ignored, 0).amax()

    ignored = block.bias == -torch.inf
    product = longest(block.z_hat, block.row_ids < 0) * longest(block.z, ignored)
    return block.scale.abs() * product + block.bias.abs().masked_fill(ignored, 0).amax()


def _nan_unless_finite(bound: Tensor) -> Tensor:  # [] -> [] 0 or NaN
    return bound - bound


def _vanished(sums: Tensor) -> Tensor:  # [4, K] -> [] bool
    """Whether a sum that the loss divides by has left the range of its type."""
    total = sums[0] + sums[1]
    lost = (total < _VANISHED[total.dtype]) | ~total.isfinite()
    return (lost & (sums[3] > 0)).any()


def _softmax_sums(block: _Block, bound: Tensor, symmetric: bool) -> _Sums:
    """With the common shift, and again with exact ones where that one left sums out of range.

    Which of the two holds is known on the device alone: nothing waits for it.
    """
    common = (bound - _HEADROOM[bound.dtype]).clamp_min(0)
    row_shift = common.repeat(block.row_ids.shape)
    col_shift = common.repeat(block.bias.shape)
    run = bound <= _COMMON[bound.dtype]
    shifts = row_shift, col_shift
    rows, cols = m3i.boltzmann_sums.default(*block, *shifts, False, symmetric, False, run)
    exact = ~run | _vanished(rows) | _vanished(cols)

    def finite(most: Tensor) -> Tensor:  # a row without candidates
        return most.masked_fill(most == -torch.inf, 0)

    maxima = m3i.boltzmann_maxima.default(*block[:5], exact)
    row_shift, col_shift = (
        torch.where(exact, finite(most), shift) for most, shift in zip(maxima, shifts, strict=True)
    )
    again = m3i.boltzmann_sums.default(*block, row_shift, col_shift, True, symmetric, False, exact)
    rows, cols = (torch.where(exact, *both) for both in zip(again, (rows, cols), strict=True))
    return _Sums(rows, cols, row_shift, col_shift, exact)


def _nll(sums: Tensor, shift: Tensor) -> Tensor:  # [4, K], [K] -> [K]
    """Of each row's positives, on average; 0 without one.

    -log(p / (p + n)) for p of one positive and n of the negatives is log1p(n / p): the difference
    of two logarithms would lose all that a converged pair is about.
    """
    negatives, positives, logits, count = sums
    mean_logit = logits / count
    of_positives = torch.where(count == 1, 0, positives.log() + shift - mean_logit)
    close = (negatives / positives).log1p() + of_positives
    far = (negatives + positives).log() + shift - mean_logit
    return torch.where(negatives <= positives, close, far).masked_fill(count == 0, 0)


def _weights(sums: Tensor) -> Tensor:  # [4, K] -> [3, K]
    """What turns exponentials into the gradient of `_nll` by the logits, as in boltzmann_params.h.

    For a single positive that is -n / (n + p), written without a difference.
    """
    negatives, positives, _, count = sums
    total = negatives + positives
    single = count == 1
    target = torch.where(single, negatives / total, 1 / count)
    weights = torch.stack([1 / total, torch.where(single, 0, 1 / total), target])
    return weights.masked_fill(count == 0, 0)


def _refuse_second_derivative() -> None:
    # torch's once_differentiable would drop it where the gradient that comes in is a constant.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "boltzmann: expected to be differentiated once, got a backward with create_graph"
        )


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z_hat: Tensor,
        z: Tensor,
        scale: Tensor,
        bias: Tensor,  # [M]
        row_ids: Tensor,
        col_ids: Tensor | None,
        symmetric: bool,
        mean: bool,
    ) -> Tensor:  # []
        block = _Block(z_hat, z, scale, bias, row_ids, col_ids)
        bound = _largest_logit(block)
        sums = _softmax_sums(block, bound, symmetric)

        def share(sums: Tensor) -> Tensor:  # what one row counts for
            one = torch.full_like(scale, 0.5 if symmetric else 1.0)
            return one / (sums[3] > 0).sum().clamp_min(1) if mean else one

        # On CUDA, asking would wait for the device.
        if z.device.type == "cpu" and not torch.compiler.is_compiling() and not sums.rows[3].any():
            _warn_once("no row of the batch has a positive: the loss is 0")
        row_share, col_share = share(sums.rows), share(sums.cols)
        value = row_share * _nll(sums.rows, sums.row_shift).sum()
        row_weights = _weights(sums.rows)
        col_weights = row_weights.new_zeros(3, z.shape[0])
        if symmetric:
            value = value + col_share * _nll(sums.cols, sums.col_shift).sum()
            col_weights = _weights(sums.cols) * (col_share / row_share)
        ctx.save_for_backward(*block, *sums[2:], row_weights, col_weights, row_share)
        return value + _nan_unless_finite(bound)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        *op_arguments, row_share = ctx.saved_tensors
        scale, dtype = op_arguments[2], op_arguments[0].dtype
        needs_z_hat, needs_z, needs_scale, needs_bias = ctx.needs_input_grad[:4]
        needs_grad = [needs_z_hat, needs_z, needs_bias]
        grads = m3i.boltzmann_grads.default(*op_arguments, False, needs_grad)
        grad_z_hat, grad_z, grad_scale, grad_bias, _ = grads
        factor = grad * row_share
        return (
            grad_z_hat.mul_(factor * scale).to(dtype) if needs_z_hat else None,
            grad_z.mul_(factor * scale).to(dtype) if needs_z else None,
            factor * grad_scale if needs_scale else None,
            factor * grad_bias if needs_bias else None,
            *(None,) * 4,
        )


# ---- Sigmoid -------------------------------------------------------------------------------------


class _Sigmoid(torch.autograd.Function):
    """No sum over a row is needed for the gradient, so it is computed in the forward, with C."""

    @staticmethod
    def forward(
        ctx: Any,
        z_hat: Tensor,
        z: Tensor,
        scale: Tensor,
        bias: Tensor,  # [M]
        row_ids: Tensor,
        col_ids: Tensor | None,
        needs_grad: tuple[bool, ...],  # [4]
        mean: bool,
    ) -> Tensor:  # []
        block = _Block(z_hat, z, scale, bias, row_ids, col_ids)
        shifts = scale.new_zeros(z_hat.shape[0]), scale.new_zeros(z.shape[0])
        num = (row_ids != IGNORED).sum().clamp_min(1) if mean else 1
        lost = _nan_unless_finite(_largest_logit(block))
        if not any(needs_grad):
            rows, _ = m3i.boltzmann_sums.default(*block, *shifts, False, False, True, None)
            return rows[0].sum() / num + lost
        weights = scale.new_zeros(3, z_hat.shape[0]), scale.new_zeros(3, z.shape[0])
        exact = torch.zeros((), dtype=torch.bool, device=z.device)
        needs_z_hat, needs_z, _, needs_bias = needs_grad
        grad_z_hat, grad_z, grad_scale, grad_bias, values = m3i.boltzmann_grads.default(
            *block, *shifts, exact, *weights, True, [needs_z_hat, needs_z, needs_bias]
        )
        factor = scale / num
        grads = grad_z_hat.mul_(factor), grad_z.mul_(factor)
        ctx.save_for_backward(
            *(grad.to(z.dtype) for grad in grads), grad_scale / num, grad_bias / num
        )
        return values.sum() / num + lost

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        grads = (
            (grad * saved).to(saved.dtype) if needed else None
            for saved, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:4], strict=True)
        )
        return *grads, *(None,) * 4


# ---- The public function -------------------------------------------------------------------------


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _expect_like(name: str, tensor: Tensor, shape: list[int], z_hat: Tensor) -> None:
    _expect(
        list(tensor.shape) == shape, f"{name}: expected shape {shape}, got {list(tensor.shape)}"
    )
    _expect(
        tensor.device == z_hat.device,
        f"{name}: expected on the device of z_hat ({z_hat.device}), got {tensor.device}",
    )


def _expect_ids(name: str, ids: Tensor, count: int, z_hat: Tensor) -> None:
    _expect_like(name, ids, [count], z_hat)
    integers = (torch.int64, torch.int32)
    _expect(ids.dtype in integers, f"{name}: expected dtype int64 or int32, got {ids.dtype}")


def _check_features(z_hat: Tensor, z: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    _expect(
        z_hat.dtype in _DTYPES,
        f"z_hat: expected dtype float32, float64, float16 or bfloat16, got {z_hat.dtype}",
    )
    _expect(z_hat.dim() == 2, f"z_hat: expected shape [N, D], got {list(z_hat.shape)}")
    _expect(z.dim() == 2, f"z: expected shape [M, D], got {list(z.shape)}")
    _expect_like("z", z, [z.shape[0], z_hat.shape[1]], z_hat)
    _expect(z.dtype == z_hat.dtype, f"z: expected dtype {z_hat.dtype} as z_hat, got {z.dtype}")
    _expect_like("scale", scale, [], z_hat)
    if bias is not None:
        _expect_like("bias", bias, [] if bias.dim() == 0 else [z.shape[0]], z_hat)


def _dense_ids(row_ids: Tensor, col_ids: Tensor) -> tuple[Tensor, Tensor]:  # [N], [M] int32
    """Ids by their rank, which int32 holds; nothing waits for the device."""
    ids = torch.cat([row_ids.long(), col_ids.long()])
    ordered, order = ids.sort()
    rank = torch.nn.functional.pad(ordered[1:] != ordered[:-1], (1, 0)).cumsum(0)
    dense = torch.empty_like(ids).scatter_(0, order, rank)
    rows, cols = dense.int().split([len(row_ids), len(col_ids)])
    rows = rows.masked_fill(row_ids == IGNORED, IGNORED)
    return rows, cols.masked_fill(col_ids == IGNORED, _NOT_A_COLUMN)


def _pair_up(
    z_hat: Tensor,
    z: Tensor,
    targets: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Ids of rows and columns as the compiled ops want them."""
    rows, columns = z_hat.shape[0], z.shape[0]
    if targets is not None:
        _expect(
            row_ids is None and col_ids is None,
            "targets: expected either targets or row_ids and col_ids, got both",
        )
        _expect_ids("targets", targets, rows, z_hat)
        return targets.int().contiguous(), None
    if row_ids is not None and col_ids is not None:
        _expect_ids("row_ids", row_ids, rows, z_hat)
        _expect_ids("col_ids", col_ids, columns, z_hat)
        return _dense_ids(row_ids, col_ids)
    _expect(row_ids is None and col_ids is None, "row_ids, col_ids: expected both or neither")
    _expect(
        rows == columns, f"z: expected {rows} rows as z_hat, or targets, or ids; got {columns} rows"
    )
    return torch.arange(rows, dtype=torch.int32, device=z.device), None


def _col_bias(bias: Tensor | None, col_ids: Tensor | None, z: Tensor) -> Tensor:  # [M] wide
    wide = z.new_zeros(z.shape[0], dtype=_wide(z.dtype))
    if bias is not None:
        wide = wide + bias.to(wide.dtype)
    if col_ids is not None:
        wide = wide.masked_fill(col_ids == _NOT_A_COLUMN, -torch.inf)
    return wide


def boltzmann(
    z_hat: Tensor,  # [N, D]
    z: Tensor,  # [M, D]
    scale: Tensor,  # []
    *,
    targets: Tensor | None = None,  # [N] int64
    row_ids: Tensor | None = None,  # [N] int64
    col_ids: Tensor | None = None,  # [M] int64
    bias: Tensor | None = None,  # [] or [M]
    symmetric: bool = True,
    form: Literal["softmax", "sigmoid"] = "softmax",
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:  # [] fp32, fp64 for fp64
    """-log P(z | z_hat) of the Boltzmann posterior exp(scale z_hat . z + bias), over all z.

    M3I, arXiv 2211.09807, section 3. `boltzmann(a, b, s)` is the scalar of open_clip's
    `ClipLoss()(a, b, s)`, and with `form="sigmoid", bias=b` that of its `SigLipLoss()`; with
    `targets` it is `F.cross_entropy(s * a @ b.T + bias, targets, ignore_index=-1)`.

    Which pairs are positive:

    - by default row i and column i, N = M;
    - targets: row i and column targets[i]; -1 ignores the row. The softmax is over columns only.
    - row_ids and col_ids: where they are equal. A row's loss is the mean over its positives. The
      id -1 takes the row or column out of everything; a row or column without a positive is
      no term of the mean, but a candidate of the others.

    softmax: mean over the rows that have a positive, and, if `symmetric` (and without `targets`),
    half of it and half of that over columns. No such row: 0. sigmoid (SigLIP, arXiv 2303.15343):
    sum over all pairs of log(1 + exp(-y logit)), y = 1 for positives and -1 for others, divided by
    the number of rows that are not ignored.

    Memory is O(N + M) beside a tile and the gradients. Exponentials and sums are fp32 (fp64 for
    fp64); of a pair that is all but certain, the loss and its gradient keep their precision. Rows
    need not be normalised. Where logits leave the range that one shift covers (|scale| |z_hat| |z|
    above 73 with rows whose largest logit is that much below the largest possible one), sums are
    computed once more with shifts of their own. Differentiable once, by z_hat, z, scale and bias.

    Under autocast z_hat and z are cast to its dtype, except float64 ones.

    Args:
        z_hat: fp32, fp64, fp16 or bf16; z has its dtype and device.
        scale: multiplies the dot products: 1 / tau, open_clip's `logit_scale.exp()`. On the device
            of z_hat, and never read by the host.
        targets: class indices. On a CPU one that is out of range raises; on CUDA it stops the
            kernel by a trap.
        bias: added to the logits; [M] one for each column.
        reduction: "sum" leaves the division out.

    Raises:
        ValueError: an argument is not as described, or contradicts another; the message names it,
            what was expected and what was given.
    """
    device = z_hat.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        z_hat, z = (rows if rows.dtype == torch.float64 else rows.to(dtype) for rows in (z_hat, z))
    _check_features(z_hat, z, scale, bias)
    _expect(form in ("softmax", "sigmoid"), f"form: expected softmax or sigmoid, got {form!r}")
    _expect(reduction in ("mean", "sum"), f"reduction: expected mean or sum, got {reduction!r}")
    ids = _pair_up(z_hat, z, targets, row_ids, col_ids)
    scale = scale.to(_wide(z.dtype))
    col_bias = _col_bias(bias, ids[1], z)
    if z_hat.shape[0] == 0 or z.shape[0] == 0:
        return scale * 0 * (z_hat.sum() + z.sum()) + 0 * col_bias.sum()
    inputs = z_hat.contiguous(), z.contiguous(), scale, col_bias
    if form == "sigmoid":
        needs_grad = tuple(torch.is_grad_enabled() and value.requires_grad for value in inputs)
        return _Sigmoid.apply(*inputs, *ids, needs_grad, reduction == "mean")
    symmetric = symmetric and targets is None
    return _Softmax.apply(*inputs, *ids, symmetric, reduction == "mean")
