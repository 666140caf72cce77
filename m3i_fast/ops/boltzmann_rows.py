"""The Boltzmann likelihood whose softmax is over columns alone, with its gradient in the forward.

Legend: N predictions (rows), M targets (columns), D features, D' features of soft targets, R rows
of a block. "Wide" is fp32, fp64 for fp64.

A block of rows has all of its columns, so that a row's sums are complete when its gradient is
computed: three products of N x M x D for value and gradients, where `boltzmann_autograd` takes
four. A block's [R, M] logits are made by torch's GEMM, turned into the gradient by one kernel
(`m3i::boltzmann_rows_pass`, cuda/boltzmann/rows) and multiplied by the features, by torch's GEMM.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from m3i_fast.ops.boltzmann_autograd import _refuse_second_derivative, _warn_once
from m3i_fast.ops.boltzmann_vectors import autocast_features
from m3i_fast.ops.boltzmann_vectors import wide as wide_type
from m3i_fast.ops.library import m3i

ROWS_OP = m3i.boltzmann_rows.default
# Bytes of a block's wide [R, M] matrices at most, unless a single row has more.
_BLOCK_BYTES = {"cpu": 56 << 20, "cuda": 256 << 20}
_ROW_STEP = {"cpu": 16, "cuda": 64}  # rows of a block are a multiple, where there are so many
# Bytes of a wide copy of some rows of a matrix, where a GEMM cannot sum half types in fp32.
_COPY_BYTES = 8 << 20
# Elements to which rows of a block are padded; cuda/boltzmann/rows/params.h
_PADDING = 16


@dataclass(frozen=True, slots=True, eq=False)
class SoftTargets:
    """Targets of `boltzmann` that are a softmax of a second pair of features, as a teacher's.

    T_ij = softmax_j(scale z_hat_i . z_j + column_log_scale_j), never stored as an [N, M] array. All
    fields are constants: no gradient reaches them.

    - DINO (arXiv 2104.14294, section 3.1): column_log_scale = -scale centre, of a running mean of
      the teacher's dot products.
    - SwAV (arXiv 2006.09882, equation 5) and DINOv2: `SoftTargets.sinkhorn(...)`, whose
      T_ij = exp(scale z_hat_i . z_j + c_j + r_i) has the prototypes' log scales c; r, which makes
      a row sum to 1, is the softmax's own.
    - iBOT (arXiv 2111.07832): row_weights = 1 / (the picture's masked patches x pictures), with
      reduction="sum".
    """

    z_hat: Tensor  # [N, D'] as z_hat of boltzmann
    z: Tensor  # [M, D'] likewise
    scale: Tensor  # [] 1 / the teacher's temperature
    column_log_scale: Tensor | None = None  # [M]
    row_weights: Tensor | None = None  # [N], at least 0

    @classmethod
    def sinkhorn(
        cls,
        z_hat: Tensor,  # [N, D']
        z: Tensor,  # [M, D']
        scale: Tensor,  # []
        *,
        num_iterations: int = 3,
        whole_rows: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> SoftTargets:
        """Return targets that Sinkhorn-Knopp spreads over the columns (prototypes) evenly.

        SwAV, arXiv 2006.09882, equation 5: Q = Diag(u) exp(scale C) Diag(v), which DINOv2 uses for
        targets. An iteration divides every column by its sum over all rows, then every row by its
        sum. It works on logarithms, so that no scale overflows and no column vanishes. It costs one
        product of N x M x D' an iteration, in the memory of a block of rows and vectors of M; half
        types are multiplied with sums in fp32. Under autocast z_hat and z are cast as by
        `boltzmann`.

        Args:
            scale: 1 / temperature, on the device of z_hat; the host does not read it.
            whole_rows: divide every row by its sum before the first iteration, too, as MSN does
                (arXiv 2204.07141).
            process_group: each of its ranks passes its own rows, in any number, and the same
                columns. The sums of columns are those of all ranks' rows.

        Raises:
            ValueError: num_iterations is below 1.
        """
        z_hat, z = autocast_features(z_hat.detach(), z.detach())
        start = None
        if whole_rows:
            start = torch.zeros(len(z), dtype=wide_type(z.dtype), device=z.device)
        log_scale = _sinkhorn_log_scale(z_hat, z, scale, num_iterations, start, process_group)
        return cls(z_hat, z, scale, log_scale)

    @torch.no_grad()
    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield T as (rows, [R, M] wide), in memory that the next block overwrites.

        For what needs the probabilities themselves, at one product of N x M x D'. All blocks
        together take as much memory as those of `boltzmann`, half of it for copies of a block.
        """
        z_hat, z, dtype = self.z_hat.contiguous(), self.z.contiguous(), wide_type(self.z.dtype)
        rows = _block_rows(len(z_hat), _stride(len(z)), dtype, z.device.type, matrices=2)
        for block, products in _blocks(z_hat, z, rows, dtype):
            probabilities = products[:, : len(z)].mul_(self.scale)
            if self.column_log_scale is not None:
                probabilities.add_(self.column_log_scale)
            probabilities.sub_(probabilities.amax(1, keepdim=True)).exp_()
            yield block, probabilities.div_(probabilities.sum(1, keepdim=True))


# ---- Products ------------------------------------------------------------------------------------


def _multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Compute out = a b, or out += a b, with sums in fp32 or fp64."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif add:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)


def _operands(rows: Tensor, wide: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield a matrix in parts that the GEMM multiplies: whole, or rows of half types widened."""
    if rows.dtype == wide or rows.device.type == "cuda":
        yield slice(0, len(rows)), rows
        return
    step = max(1, _COPY_BYTES // (wide.itemsize * max(1, rows.shape[1])))
    for begin in range(0, len(rows), step):
        part = slice(begin, min(begin + step, len(rows)))
        yield part, rows[part].to(wide)


def _stride(columns: int) -> int:
    return -(-columns // _PADDING) * _PADDING


def _block_rows(
    num_rows: int, stride: int, wide: torch.dtype, device: str, *, matrices: int
) -> int:
    """Return the rows of a block, of which so many matrices [R, M] are alive at a time."""
    most = _BLOCK_BYTES[device] // (matrices * wide.itemsize * max(1, stride))
    step = _ROW_STEP[device]
    return max(1, min(num_rows, most // step * step or most))


def scratch_bytes(z_hat: Tensor, z: Tensor, *others: Any, device: str) -> int:
    """Return the bytes of the blocks that `m3i::boltzmann_rows` of these arguments works in.

    device: type of the device, `cpu` or `cuda`. Its results are not among them.
    """
    target_z, needs_grad = others[4], others[-1]
    wide, stride = wide_type(z.dtype), _stride(len(z))
    matrices = 1 if target_z is None else 2
    rows = _block_rows(len(z_hat), stride, wide, device, matrices=matrices)
    is_rounded = any(needs_grad) and device == "cuda" and z.dtype != wide
    return rows * stride * (matrices * wide.itemsize + is_rounded * z.itemsize)


def _blocks(
    z_hat: Tensor,  # [N, D]
    z: Tensor,  # [M, D]
    rows: int,
    wide: torch.dtype,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows, and their dot products [R, padded M], which each block overwrites."""
    memory = z_hat.new_empty(rows, _stride(len(z)), dtype=wide)
    for begin in range(0, len(z_hat), rows):
        block = slice(begin, min(begin + rows, len(z_hat)))
        products = memory[: block.stop - begin]
        for own, part in _operands(z_hat[block], wide):
            for columns, others in _operands(z, wide):
                _multiply(part, others.T, products[own, columns])
        yield block, products


# ---- The op --------------------------------------------------------------------------------------


@torch.library.register_fake("m3i::boltzmann_rows")
def _fake_rows(
    z_hat: Tensor,
    z: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_ids: Tensor | None,
    target_z_hat: Tensor | None,
    target_z: Tensor | None,
    target_scale: Tensor | None,
    target_bias: Tensor | None,
    row_weights: Tensor | None,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _outputs(z_hat, z, scale, needs_grad)


def _outputs(
    z_hat: Tensor, z: Tensor, scale: Tensor, needs_grad: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs_z_hat, needs_z, needs_scale, needs_bias = needs_grad
    return (
        scale.new_empty(z_hat.shape[0]),
        scale.new_empty(z_hat.shape if needs_z_hat else 0),
        scale.new_empty(z.shape if needs_z else 0),
        scale.new_empty(z_hat.shape[0] if needs_scale else 0),
        scale.new_empty(z.shape[0] if needs_bias else 0),
    )


@torch.no_grad()
def rows(
    z_hat: Tensor,  # [N, D]
    z: Tensor,  # [M, D]
    scale: Tensor,  # [] wide
    bias: Tensor | None,  # [M] wide
    row_ids: Tensor | None,  # [N] int32, of classes
    target_z_hat: Tensor | None,  # [N, D'], of soft targets
    target_z: Tensor | None,  # [M, D']
    target_scale: Tensor | None,  # [] wide
    target_bias: Tensor | None,  # [M] wide
    row_weights: Tensor | None,  # [N] wide
    needs_grad: Sequence[bool],  # [4] z_hat, z, scale, bias
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `m3i::boltzmann_rows`: nll [N], and the gradients of its sum, all wide.

    Gradients by z_hat and z lack the factor `scale`; that by the scale is given by row.
    """
    outputs = nll, grad_z_hat, grad_z, grad_scale, grad_bias = _outputs(z_hat, z, scale, needs_grad)
    if len(z_hat) == 0 or len(z) == 0:
        for output in outputs:
            output.zero_()
        return outputs
    wide, device = scale.dtype, z.device.type
    matrices = 1 if target_z is None else 2
    most = _block_rows(len(z_hat), _stride(len(z)), wide, device, matrices=matrices)
    blocks = _blocks(z_hat, z, most, wide)
    target_blocks: Iterator[tuple[slice, Tensor]] | None = None
    if target_z_hat is not None and target_z is not None:
        target_blocks = _blocks(target_z_hat, target_z, most, wide)
    needs_any, needs_bias = any(needs_grad), needs_grad[3]
    # A GEMM of half types takes G in their type; sums over rows are of what is not rounded.
    rounded = None
    if needs_any and device == "cuda" and z.dtype != wide:
        rounded = z.new_empty(most, _stride(len(z)))
    unused = scale.new_empty(len(z_hat)) if needs_any and not needs_grad[2] else grad_scale
    for block, products in blocks:
        grads = None if rounded is None else rounded[: len(products)]
        m3i.boltzmann_rows_pass.default(
            products,
            None if target_blocks is None else next(target_blocks)[1],
            len(z),
            *(scale, bias, target_scale, target_bias),
            None if row_ids is None else row_ids[block],
            None if row_weights is None else row_weights[block],
            nll[block],
            unused[block] if needs_any else None,
            grads,
            needs_any and (grads is None or needs_bias),
        )
        if needs_bias:
            ones = products.new_ones(len(products))
            grad_bias.addmv_(products[:, : len(z)].T, ones, beta=int(block.start > 0))
        _add_feature_grads(
            (products if grads is None else grads)[:, : len(z)],
            z_hat[block],
            z,
            grad_z_hat[block] if needs_grad[0] else None,
            grad_z if needs_grad[1] else None,
            first=block.start == 0,
        )
    return outputs


torch.library.impl("m3i::boltzmann_rows", ("cpu", "cuda"), rows)


def _add_feature_grads(
    logit_grads: Tensor,  # [R, M]
    z_hat: Tensor,  # [R, D]
    z: Tensor,  # [M, D]
    grad_z_hat: Tensor | None,  # [R, D] wide: G z
    grad_z: Tensor | None,  # [M, D] wide: summed over blocks, G^T z_hat
    *,
    first: bool,
) -> None:
    if grad_z_hat is not None:
        for columns, others in _operands(z, grad_z_hat.dtype):
            grads = logit_grads[:, columns]
            _multiply(grads, others, grad_z_hat, add=columns.start > 0)
    if grad_z is not None:
        for rows, own in _operands(z_hat, grad_z.dtype):
            _multiply(logit_grads[rows].T, own, grad_z, add=not first or rows.start > 0)


# ---- Autograd ------------------------------------------------------------------------------------


class RowSoftmax(torch.autograd.Function):
    """The row-only softmax of `boltzmann`, whose gradient is computed in the forward pass.

    What is saved are the wide gradients of the sum over rows, of the size of N x D and M x D: the
    backward scales and rounds them once, so that fp16 gradients are in range whatever factor comes.
    On a CPU it scales wide ones in place, unless the graph is kept for another backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z_hat: Tensor,  # [N, D]
        z: Tensor,  # [M, D]
        scale: Tensor,  # [] wide
        bias: Tensor | None,  # [M] wide
        row_ids: Tensor | None,  # [N] int32
        targets: Sequence[Tensor | None],  # [4] z_hat, z, scale and bias of soft targets
        row_weights: Tensor | None,  # [N] wide
        needs_grad: Sequence[bool],  # [4]
        mean: bool,
    ) -> Tensor:  # [] wide
        nll, *grads = ROWS_OP(z_hat, z, scale, bias, row_ids, *targets, row_weights, needs_grad)
        if mean:
            share = _total_weight(z_hat, scale, row_ids, row_weights).reciprocal()
        else:
            share = torch.ones_like(scale)
        grads[2] = grads[2].sum()
        ctx.dtype = z.dtype
        ctx.save_for_backward(*grads, scale, share)
        return share * nll.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        *grads, scale, share = ctx.saved_tensors
        if _is_last_use(grads[0]) and ctx.dtype == scale.dtype:
            shared = grad * share
            factors = shared * scale, shared * scale, shared, shared
            scaled = [g.mul_(factor) for g, factor in zip(grads, factors, strict=True)]
        else:
            _, *scaled = m3i.boltzmann_scale.default(grad, share, scale, *grads, ctx.dtype)
        needed = ctx.needs_input_grad[:4]
        return *(g if wanted else None for g, wanted in zip(scaled, needed, strict=True)), *(
            None,
        ) * 5


def _is_last_use(saved: Tensor) -> bool:
    """Return whether a CPU's backward pass may overwrite what it saved: the graph is not kept."""
    if saved.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()


def _total_weight(
    z_hat: Tensor, scale: Tensor, row_ids: Tensor | None, row_weights: Tensor | None
) -> Tensor:  # [] wide
    """Sum the weights of the rows that are not ignored; 1 where that is 0, as the loss is then."""
    if row_weights is not None:
        total = row_weights.sum()
        return torch.where(total == 0, 1, total)
    if row_ids is None:
        return scale.new_full((), max(1, z_hat.shape[0]))
    num_rows = (row_ids >= 0).sum()
    # On CUDA the check would synchronise with the host.
    if row_ids.device.type == "cpu" and not torch.compiler.is_compiling() and num_rows == 0:
        _warn_once("no row of the batch has a positive: the loss is 0")
    return num_rows.clamp_min(1).to(scale.dtype)


def row_softmax(
    z_hat: Tensor,  # [N, D]
    z: Tensor,  # [M, D]
    scale: Tensor,  # [] wide
    bias: Tensor | None,  # [] or [M]
    *,
    row_ids: Tensor | None = None,  # [N] int32
    targets: SoftTargets | None = None,
    mean: bool,
) -> Tensor:  # [] wide
    """Compute the row-only softmax of `boltzmann` for classes or soft targets, once checked."""
    wide = scale.dtype

    def of_columns(values: Tensor | None) -> Tensor | None:  # [M] wide
        return None if values is None else values.to(wide).expand(z.shape[0]).contiguous()

    of_targets: list[Tensor | None] = [None] * 4
    row_weights = None
    if targets is not None:
        of_targets = [
            targets.z_hat.detach(),
            targets.z.detach(),
            targets.scale.detach().to(wide),
            of_columns(targets.column_log_scale),
        ]
        of_targets[3] = None if of_targets[3] is None else of_targets[3].detach()
        if targets.row_weights is not None:
            row_weights = targets.row_weights.detach().to(wide).contiguous()
    inputs = z_hat, z, scale, of_columns(bias)
    needs_grad = [
        torch.is_grad_enabled() and value is not None and value.requires_grad for value in inputs
    ]
    return RowSoftmax.apply(*inputs, row_ids, of_targets, row_weights, needs_grad, mean)


# ---- Sinkhorn-Knopp ------------------------------------------------------------------------------


@torch.no_grad()
def _sinkhorn_log_scale(
    z_hat: Tensor,  # [N, D]
    z: Tensor,  # [M, D]
    scale: Tensor,  # []
    num_iterations: int,
    log_scale: Tensor | None,  # [M] wide, to begin with
    process_group: dist.ProcessGroup | None,
) -> Tensor:  # [M] wide
    if num_iterations < 1:
        raise ValueError(f"num_iterations: expected at least 1, got {num_iterations}")
    z_hat, z, scale = z_hat.contiguous(), z.contiguous(), scale.to(wide_type(z_hat.dtype))
    for _ in range(num_iterations):
        total = _log_sum_columns(z_hat, z, scale, log_scale, process_group)
        log_scale = -total if log_scale is None else log_scale - total
    assert log_scale is not None
    return log_scale


def _log_sum_columns(
    z_hat: Tensor,  # [N, D]
    z: Tensor,  # [M, D]
    scale: Tensor,  # [] wide
    log_scale: Tensor | None,  # [M]
    group: dist.ProcessGroup | None,
) -> Tensor:  # [M]
    """Return log sum_i Q_ij of Q = exp(scale C + log_scale), its rows divided by their sums.

    Without log_scale rows are left as they are. Each column's largest logarithm so far is its
    shift, and earlier blocks are scaled to it.
    """
    most = scale.new_full((len(z),), -torch.inf)
    total = torch.zeros_like(most)

    def rescale(to: Tensor) -> Tensor:
        """Return the total with another shift; 0 of no rows, whose shift is -inf."""
        return torch.where(most == -torch.inf, 0, total * (most - to).exp())

    rows = _block_rows(len(z_hat), _stride(len(z)), scale.dtype, z.device.type, matrices=3)
    for _, products in _blocks(z_hat, z, rows, scale.dtype):
        log_q = products[:, : len(z)].mul_(scale)
        if log_scale is not None:
            log_q.add_(log_scale)
            log_q.sub_(log_q.logsumexp(1, keepdim=True))
        largest = torch.maximum(most, log_q.amax(0))
        total = rescale(largest).add_(log_q.sub_(largest).exp_().sum(0))
        most = largest
    if group is not None:
        largest = most.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        total = rescale(largest)
        dist.all_reduce(total, group=group)
        most = largest
    return total.log() + most
