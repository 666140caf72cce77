"""The compiled ops of `boltzmann` over all columns of a call, in one process or over a ring.

Legend: N rows of z_hat and M rows ("columns") of z, D features. With several ranks N counts this
rank's rows, and M the columns of all ranks, in the order of the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from m3i_fast.ops.library import m3i


class Block(NamedTuple):
    """The arguments that all compiled ops share, in their order. Wide is fp32, fp64 for fp64."""

    z_hat: Tensor  # [N, D]
    z: Tensor  # [M, D], with several ranks this rank's columns
    scale: Tensor  # [] wide
    bias: Tensor  # [M] wide, -inf where ignored
    row_ids: Tensor  # [N] int32
    col_ids: Tensor | None  # [M] int32; None: a column's place is its id


class Weights(NamedTuple):
    """The shifts and weights of `boltzmann_grads`, as in cuda/boltzmann/params.h."""

    row_shift: Tensor  # [N] wide
    col_shift: Tensor  # [M] wide
    exact: Tensor  # [] bool
    rows: Tensor  # [3, N] wide
    cols: Tensor  # [3, M] wide


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


# ---- One process ---------------------------------------------------------------------------------


class SingleProcess:
    """The ops over the columns of one process; collectives do nothing."""

    ranks = 1

    def maxima(self, block: Block, run: Tensor) -> tuple[Tensor, Tensor]:  # [N], [M]
        """Return the largest logit of every row and of every column, where `run` is True."""
        return m3i.boltzmann_maxima.default(*block[:5], run)

    def sums(
        self,
        block: Block,
        row_shift: Tensor,  # [N]
        col_shift: Tensor,  # [M]
        *,
        exact: bool = False,
        symmetric: bool = False,
        sigmoid: bool = False,
        run: Tensor | None = None,  # [] bool
    ) -> tuple[Tensor, Tensor]:  # [4, N], [4, M or 0]
        """Sum the exponentials of shifted logits over rows and, if `symmetric`, over columns.

        exact: shifts differ from row to row and column to column. run: False skips the work.
        """
        return m3i.boltzmann_sums.default(
            *block, row_shift, col_shift, exact, symmetric, sigmoid, run
        )

    def grads(
        self, block: Block, weights: Weights, *, sigmoid: bool, needs_grad: Sequence[bool]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients by z_hat, z, scale and bias, and the sigmoid form's row values.

        The gradients by scale and bias are this rank's summand. A gradient that is not needed is
        empty.
        """
        return m3i.boltzmann_grads.default(*block, *weights, sigmoid, list(needs_grad))

    def sum(self, partial: Tensor) -> Tensor:
        """All-reduce by the sum."""
        return partial

    def max(self, partial: Tensor) -> Tensor:
        """All-reduce by the maximum."""
        return partial

    def gather(self, columns: Tensor) -> Tensor:  # [own columns] -> [M]
        """All-gather a value of each column."""
        return columns

    def own(self, columns: Tensor) -> Tensor:  # [M] -> [own columns]
        """Slice this rank's columns out of all."""
        return columns

    def place(self) -> tuple[int, int | None]:
        """Return the place of this rank's first column, and the number of all ranks' columns.

        None stands for those of this rank alone: for a number torch.compile would make a graph for
        each size.
        """
        return 0, None

    def column_ids(self, ids: Tensor) -> Tensor | None:  # [M], or [0] if columns have none
        """Return the ids of all columns as `Block` has them."""
        return ids if ids.numel() else None

    def largest(self, extremes: Tensor) -> Tensor:  # [K, 4] -> [K, 4]
        """All-reduce the parts of `boltzmann_prepare` by the maximum."""
        return extremes

    def sum_parts(self, parts: Tensor) -> Tensor:  # [K, ...] -> [K, ...]
        """All-reduce the parts of a sum; several ranks leave one part."""
        return parts

    def sum_rows(self, totals: Tensor) -> Tensor:  # [K, 4] -> [K, 4]
        """All-reduce what `boltzmann_totals` left of rows; every rank has that of all columns."""
        return totals

    def is_settled(self, exact: Tensor) -> bool:
        """Return whether the host knows that `exact` is False; a GPU decides it by itself."""
        # Reading it from a GPU would synchronise: kernels that return at once are launched instead.
        on_cpu = exact.device.type == "cpu" and not torch.compiler.is_compiling()
        return on_cpu and not bool(exact)


# ---- Several -------------------------------------------------------------------------------------


class Ring(SingleProcess):
    """The ops over the columns of all ranks of a group, which are passed around a ring.

    In hop h rank r computes with the columns of rank r - h while it sends them to the next rank and
    receives the following ones: it holds the columns of two ranks at a time. Gradients by columns
    follow them one hop behind, and reach their rank after as many hops as there are ranks.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_rows: int,
        num_columns: int,
        device: torch.device,
        *,
        equal_sizes: bool,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """Set up the ring; with `equal_sizes` or `sizes` the ranks do not exchange their sizes.

        sizes: rows and columns of each rank. Raises ValueError where they are not this rank's.
        """
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.num_rows, self.num_columns = [num_rows] * self.ranks, [num_columns] * self.ranks
        if sizes is not None:
            if len(sizes) != self.ranks or sizes[self.rank] != (num_rows, num_columns):
                raise ValueError(
                    f"sizes: expected those of {self.ranks} ranks, {(num_rows, num_columns)} of "
                    f"rank {self.rank}, got {list(sizes)}"
                )
            self.num_rows, self.num_columns = ([pair[i] for pair in sizes] for i in (0, 1))
        elif not equal_sizes:
            own = torch.tensor([num_rows, num_columns], device=device)
            of_ranks = own.new_empty(self.ranks * 2)
            dist.all_gather_into_tensor(of_ranks, own, group=group)
            pairs = of_ranks.view(self.ranks, 2).tolist()
            self.num_rows, self.num_columns = ([pair[i] for pair in pairs] for i in (0, 1))
        ends = [0, *accumulate(self.num_columns)]
        self.slices = [slice(*bounds) for bounds in zip(ends[:-1], ends[1:], strict=True)]

    # ---- Collectives

    def sum(self, partial: Tensor) -> Tensor:
        total = partial.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def max(self, partial: Tensor) -> Tensor:
        most = partial.to(torch.float64 if partial.dtype == torch.float64 else torch.float32)
        # The maximum of NaN is undefined: it is sent as inf, which gives NaN later.
        most = torch.where(most.isnan(), torch.inf, most).clone()
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
        return most.to(partial.dtype)

    def gather(self, columns: Tensor) -> Tensor:
        own, counts = columns, self.num_columns
        padded = own.new_zeros(max(counts))
        padded[: len(own)] = own
        gathered = padded.new_empty(len(counts) * len(padded))
        dist.all_gather_into_tensor(gathered, padded, group=self.group)
        of_ranks = gathered.view(len(counts), len(padded))
        return torch.cat([of_rank[:n] for of_rank, n in zip(of_ranks, counts, strict=True)])

    def own(self, columns: Tensor) -> Tensor:
        return columns[self.slices[self.rank]]

    def place(self) -> tuple[int, int | None]:
        return self.slices[self.rank].start, sum(self.num_columns)

    def column_ids(self, ids: Tensor) -> Tensor | None:
        if ids.numel():
            return ids
        return torch.arange(sum(self.num_columns), dtype=torch.int32, device=ids.device)

    def largest(self, extremes: Tensor) -> Tensor:
        return self.max(extremes.amax(0, keepdim=True))

    def sum_parts(self, parts: Tensor) -> Tensor:
        return self.sum(parts.sum(0, keepdim=True))

    def sum_rows(self, totals: Tensor) -> Tensor:
        one = totals.sum(0, keepdim=True)
        return torch.cat([self.sum(one[:, :2]), one[:, 2:]], 1)

    # ---- Ops

    def maxima(self, block: Block, run: Tensor) -> tuple[Tensor, Tensor]:
        row_max = torch.full_like(block.row_ids, -torch.inf, dtype=block.scale.dtype)
        col_max = torch.empty_like(block.bias)
        for columns, visiting in self._visiting_blocks(block):
            of_rows, col_max[columns] = super().maxima(visiting, run)
            row_max = torch.maximum(row_max, of_rows)
        return row_max, self.max(col_max)

    def sums(
        self,
        block: Block,
        row_shift: Tensor,
        col_shift: Tensor,
        *,
        exact: bool = False,
        symmetric: bool = False,
        sigmoid: bool = False,
        run: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        rows = block.scale.new_zeros(4, len(block.row_ids))
        cols = block.scale.new_empty(4, len(block.bias) if symmetric else 0)
        for columns, visiting in self._visiting_blocks(block):
            of_rows, of_cols = super().sums(
                visiting,
                row_shift,
                col_shift[columns],
                exact=exact,
                symmetric=symmetric,
                sigmoid=sigmoid,
                run=run,
            )
            rows += of_rows
            if symmetric:
                cols[:, columns] = of_cols
        return rows, self.sum(cols) if symmetric else cols

    def grads(
        self, block: Block, weights: Weights, *, sigmoid: bool, needs_grad: Sequence[bool]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        totals: list[Tensor] = []
        grad_bias = torch.empty_like(block.bias if needs_grad[2] else block.bias[:0])
        grad_z = _RingGradient(self, block.z.shape[1], block.scale) if needs_grad[1] else None
        for hop, (columns, visiting) in enumerate(self._visiting_blocks(block)):
            own_weights = weights._replace(
                col_shift=weights.col_shift[columns], cols=weights.cols[:, columns].contiguous()
            )
            grads = super().grads(visiting, own_weights, sigmoid=sigmoid, needs_grad=needs_grad)
            if needs_grad[2]:
                grad_bias[columns] = grads[3]
            if grad_z:
                grad_z.add(hop, grads[1])
            summed = [grads[0], grads[2], grads[4]]
            totals = [a + b for a, b in zip(totals, summed, strict=True)] if totals else summed
        own_grad_z = grad_z.wait() if grad_z else block.scale.new_empty(0)
        return totals[0], own_grad_z, totals[1], grad_bias, totals[2]

    def _visiting_blocks(self, block: Block) -> Iterator[tuple[slice, Block]]:
        """Yield the columns of each rank and a block of them, this rank's own first."""
        assert block.col_ids is not None
        z = block.z
        for hop in range(self.ranks):
            owner = (self.rank - hop) % self.ranks
            in_flight: list[dist.Work] = []
            following = z
            if hop < self.ranks - 1:
                size = self.num_columns[(owner - 1) % self.ranks]
                following = z.new_empty(size, z.shape[1])
                in_flight = self.pass_on(z, following)
            columns = self.slices[owner]
            yield (
                columns,
                block._replace(z=z, bias=block.bias[columns], col_ids=block.col_ids[columns]),
            )
            for transfer in in_flight:
                transfer.wait()
            z = following

    def pass_on(self, own: Tensor, received: Tensor) -> list[dist.Work]:
        """Start sending `own` to the next rank and receiving from the previous one."""
        to, source = ((self.rank + step) % self.ranks for step in (1, -1))
        peers = [dist.get_global_rank(self.group, rank) for rank in (to, source)]
        ops = [
            dist.P2POp(dist.isend, own, peers[0], self.group),
            dist.P2POp(dist.irecv, received, peers[1], self.group),
        ]
        ops = [op for op in ops if op.tensor.numel()]
        return dist.batch_isend_irecv(ops) if ops else []


class _RingGradient:
    """The gradient by z, whose partial sums travel around the ring one hop behind their columns."""

    def __init__(self, ring: Ring, width: int, like: Tensor):
        self.ring, self.width, self.like = ring, width, like
        self.sent: Any = None  # kept alive until it has arrived
        self.received: Tensor | None = None
        self.in_flight: list[dist.Work] = []

    def add(self, hop: int, partial: Tensor) -> None:
        """Add this rank's summand for the columns of rank - hop, and pass the sum on."""
        if self.received is not None:
            self._wait()
            partial = partial + self.received
        ring = self.ring
        if ring.ranks == 1:
            self.received = partial
            return
        size = ring.num_columns[(ring.rank - hop - 1) % ring.ranks]
        self.sent, self.received = partial, self.like.new_empty(size, self.width)
        self.in_flight = ring.pass_on(self.sent, self.received)

    def wait(self) -> Tensor:  # [own columns, D]
        """Wait for the last transfer and return the gradient by this rank's columns."""
        self._wait()
        assert self.received is not None
        return self.received

    def _wait(self) -> None:
        for transfer in self.in_flight:
            transfer.wait()
