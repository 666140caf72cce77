"""The Boltzmann likelihood: softmax or sigmoid losses over all pairs, without an [N, M] array.

Legend: N predictions, M targets, D features. C = z_hat z^T are the dot products [N, M], which are
computed tile by tile.

The compiled ops (`cuda/boltzmann`) work on blocks of pairs and return sums over rows and columns,
and make a loss, weights and gradients of them; `boltzmann_exchange` runs them over the columns of
all ranks, `boltzmann_autograd` calls them in their order. This module checks arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from m3i_fast.ops.boltzmann_autograd import Sigmoid, Softmax
from m3i_fast.ops.boltzmann_exchange import Ring, SingleProcess
from m3i_fast.ops.boltzmann_rows import SoftTargets, row_softmax
from m3i_fast.ops.boltzmann_vectors import autocast_features, wide
from m3i_fast.ops.library import contiguous

IGNORED = -1
"""The id of a row or column that is ignored."""

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


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


def _check_soft(targets: SoftTargets, z_hat: Tensor, z: Tensor) -> SoftTargets:
    """Return the targets with contiguous features, cast as those of the call."""
    of_rows, of_columns = autocast_features(targets.z_hat, targets.z)
    for name, rows, own in (("targets.z_hat", of_rows, z_hat), ("targets.z", of_columns, z)):
        _expect(rows.dim() == 2, f"{name}: expected 2 dimensions, got {list(rows.shape)}")
        _expect_like(name, rows, [own.shape[0], of_columns.shape[1]], z_hat)
        _expect(rows.dtype == z.dtype, f"{name}: expected dtype {z.dtype}, got {rows.dtype}")
    _expect_like("targets.scale", targets.scale, [], z_hat)
    if targets.column_log_scale is not None:
        log_scale = targets.column_log_scale
        _expect_like("targets.column_log_scale", log_scale, [z.shape[0]], z_hat)
    if targets.row_weights is not None:
        _expect_like("targets.row_weights", targets.row_weights, [z_hat.shape[0]], z_hat)
    return replace(
        targets,
        z_hat=contiguous("boltzmann", "targets.z_hat", of_rows),
        z=contiguous("boltzmann", "targets.z", of_columns),
    )


def _places(targets: Tensor | None, num_rows: int, z: Tensor) -> Tensor:  # [N] int32
    """Return the column of each row in int32, row i's being i without targets.

    On a CPU raises RuntimeError for one out of range. On CUDA the op refuses such a target without
    a host synchronisation: a value that int32 cannot hold is clamped to its limit, which is out of
    range as well.
    """
    if targets is None:
        return torch.arange(num_rows, dtype=torch.int32, device=z.device)
    if targets.device.type == "cpu" and len(z) and not torch.compiler.is_compiling():
        in_range = (targets >= IGNORED) & (targets < len(z))
        if not in_range.all():
            place = int((~in_range).nonzero()[0])
            raise RuntimeError(
                f"targets: expected rows of z from 0 to {len(z) - 1}, or -1 to ignore, got "
                f"{int(targets[place])} in place {place}"
            )
    limits = torch.iinfo(torch.int32)
    return targets.clamp(limits.min, limits.max).int().contiguous()


def _pair_up(
    z_hat: Tensor,
    z: Tensor,
    targets: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    exchange: SingleProcess,
) -> tuple[Tensor | None, Tensor | None]:
    """Return int64 ids of this rank's rows and of all ranks' columns, as boltzmann_prepare takes.

    Without ids of columns those of rows are places of columns; without any, row i and column i
    are a pair.
    """
    if targets is not None:
        _expect(
            row_ids is None and col_ids is None,
            "targets: expected either targets or row_ids and col_ids, got both",
        )
        _expect_ids("targets", targets, z_hat.shape[0], z_hat)
        return targets.long().contiguous(), None
    if row_ids is not None and col_ids is not None:
        _expect_ids("row_ids", row_ids, z_hat.shape[0], z_hat)
        _expect_ids("col_ids", col_ids, z.shape[0], z_hat)
        return row_ids.long().contiguous(), exchange.gather(col_ids.long().contiguous())
    _expect(
        row_ids is None and col_ids is None,
        "row_ids, col_ids: expected both or neither, got "
        f"{'col_ids' if row_ids is None else 'row_ids'} alone",
    )
    counts = [z_hat.shape[0]], [z.shape[0]]
    if isinstance(exchange, Ring):
        counts = exchange.num_rows, exchange.num_columns
    _expect(
        counts[0] == counts[1],
        f"z: expected {counts[0]} rows as z_hat (by rank), or targets, or ids; "
        f"got {counts[1]} rows",
    )
    return None, None


def boltzmann(
    z_hat: Tensor,  # [N, D]
    z: Tensor,  # [M, D]
    scale: Tensor,  # []
    *,
    targets: Tensor | SoftTargets | None = None,  # [N] int64
    row_ids: Tensor | None = None,  # [N] int64
    col_ids: Tensor | None = None,  # [M] int64
    bias: Tensor | None = None,  # [] or [M]
    symmetric: bool = True,
    form: Literal["softmax", "sigmoid"] = "softmax",
    reduction: Literal["mean", "sum"] = "mean",
    process_group: dist.ProcessGroup | None = None,
    equal_sizes: bool = False,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> Tensor:  # [] fp32, fp64 for fp64
    """Compute -log P(z | z_hat) of the Boltzmann posterior exp(scale z_hat . z + bias) over all z.

    M3I, arXiv 2211.09807, section 3. `boltzmann(a, b, s)` is the scalar of open_clip's
    `ClipLoss()(a, b, s)`, and with `form="sigmoid", bias=b` that of its `SigLipLoss()`; with
    `targets` it is `F.cross_entropy(s * a @ b.T + bias, targets, ignore_index=-1)`.

    The positive pairs are:

    - by default, row i and column i, with N = M;
    - with `targets`, row i and column targets[i]; -1 ignores the row. The softmax is over columns
      only.
    - with `targets=SoftTargets(...)`, every column in part: T_ij of a row, a softmax of a second
      pair of features, as of a teacher's prototypes. The loss of a row is its cross-entropy
      sum_j T_ij (log sum_k exp Z_ik - Z_ij), DINO's equation 2; the mean is over all rows, or
      weighted by the targets' row_weights.
    - with `row_ids` and `col_ids`, rows and columns of equal id. A row's loss is the mean over its
      positives. A row or column of id -1 is ignored; one without a positive is left out of the mean
      but is a negative of the others.

    softmax: the mean over the rows that have a positive; if `symmetric` and without `targets`, half
    of it plus half of the mean over columns. 0 where no row has one. sigmoid (SigLIP, arXiv
    2303.15343): the sum over all pairs of log(1 + exp(-y logit)), y = 1 for positives and -1 for
    others, divided by the number of rows that are not ignored.

    Memory is O(N + M) beside a tile and the gradients. Exponentials and sums are fp32 (fp64 for
    fp64); a loss close to 0 and its gradient keep their relative precision. Rows need not be
    normalised. A softmax over columns alone (targets, or not symmetric, in one process) computes
    its gradients in the forward pass, with three products of N x M x D, and keeps them in fp32; a
    tile is then a block of rows, at most 56 MiB of logits on a CPU and 256 on CUDA, those of
    SoftTargets included, unless one row has more, and products of fp32 features on CUDA are as
    exact as torch's own. Else, where logits leave the range that one shift covers (|scale| |z_hat|
    |z| above 73 with rows whose largest logit is that much below the largest possible one), sums
    are computed once more with one shift a row and column. Differentiable once, by z_hat, z, scale
    and bias.

    Under autocast z_hat and z are cast to its dtype, except float64 ones.

    Args:
        z_hat: fp32, fp64, fp16 or bf16; z has its dtype and device. A tensor that is not contiguous
            is copied, with a warning in the log.
        scale: multiplies the dot products: 1 / tau, open_clip's `logit_scale.exp()`. On the device
            of z_hat; the host does not read it.
        targets: class indices, or `SoftTargets`. A class out of range raises RuntimeError with its
            place on a CPU, and stops the kernel by a trap on CUDA.
        bias: added to the logits; with shape [M] one for each column.
        reduction: "mean", or "sum" without the division.
        process_group: each of its ranks passes its own rows of z_hat and z, in any number, and gets
            the loss of all rows. Rows, columns and targets are numbered through the ranks in order.
            Columns are passed around a ring, so that a rank holds those of two ranks at most.
            Gradients are those of the sum of all ranks' losses by this rank's inputs: a parameter's
            gradient averaged over the ranks, as DDP and FSDP do, is that of one process with all
            rows, also for scale and bias. Not for torch.compile.
        equal_sizes: promise that every rank of process_group has as many rows of z_hat, and as many
            of z, as this one, which saves a host synchronisation to exchange sizes. Where they
            differ nevertheless, the call hangs.
        sizes: rows of z_hat and of z of each rank, where the host knows them: a promise as
            equal_sizes, of unequal ones.

    Raises:
        ValueError: an argument is not as described, or contradicts another; the message names it,
            what was expected and what was given.
    """
    z_hat, z = autocast_features(z_hat, z)
    _check_features(z_hat, z, scale, bias)
    _expect(form in ("softmax", "sigmoid"), f"form: expected softmax or sigmoid, got {form!r}")
    _expect(reduction in ("mean", "sum"), f"reduction: expected mean or sum, got {reduction!r}")
    features = contiguous("boltzmann", "z_hat", z_hat), contiguous("boltzmann", "z", z)
    scale, mean = scale.to(wide(z.dtype)), reduction == "mean"
    if isinstance(targets, SoftTargets):
        others = {"row_ids": row_ids, "col_ids": col_ids, "process_group": process_group}
        for name, value in others.items():
            _expect(value is None, f"{name}: expected None with SoftTargets, got one")
        _expect(form == "softmax", f"form: expected softmax with SoftTargets, got {form!r}")
        targets = _check_soft(targets, z_hat, z)
        return row_softmax(*features, scale, bias, targets=targets, mean=mean)
    if process_group is None:
        exchange = SingleProcess()
    else:
        own = z_hat.shape[0], z.shape[0]
        exchange = Ring(process_group, *own, z.device, equal_sizes=equal_sizes, sizes=sizes)
    row_ids, all_col_ids = _pair_up(z_hat, z, targets, row_ids, col_ids, exchange)
    symmetric = symmetric and targets is None
    if form == "softmax" and process_group is None and all_col_ids is None and not symmetric:
        places = _places(row_ids, len(z_hat), z)
        return row_softmax(*features, scale, bias, row_ids=places, mean=mean)
    wide_bias = None if bias is None else bias.to(wide(z.dtype)).contiguous()
    inputs = *features, scale, wide_bias, row_ids, all_col_ids
    if form == "sigmoid":
        wanted = tuple(
            torch.is_grad_enabled() and value is not None and value.requires_grad
            for value in inputs[:4]
        )
        return Sigmoid.apply(*inputs, wanted, mean, exchange)
    return Softmax.apply(*inputs, symmetric, mean, exchange)
