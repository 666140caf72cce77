"""Bytes that a training step sends between ranks, in closed form.

N ranks on nodes of g. A collective goes first within a node, where every rank then holds a g-th of
the node's result, and only that goes over the rank's network adapter: what NCCL's trees and
NVLink SHARP do better is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Traffic:
    """Hold the bytes that one rank sends in a step."""

    nvlink: float = 0.0
    """Bytes to ranks of the same node."""
    network: float = 0.0
    """Bytes to other nodes, through the rank's own adapter."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.nvlink + other.nvlink, self.network + other.network)


@dataclass(frozen=True, slots=True)
class Nodes:
    """Describe how ranks are divided over nodes."""

    num_ranks: int
    ranks_per_node: int

    @property
    def local(self) -> int:
        """Return how many ranks share a node."""
        return min(self.num_ranks, self.ranks_per_node)

    @property
    def count(self) -> int:
        """Return the number of nodes."""
        return -(-self.num_ranks // self.local)


def gather(nodes: Nodes, size: float) -> Traffic:
    """Count an all-gather of `size` bytes in all, or their reduce-scatter."""
    own = size / nodes.local
    return Traffic(size * (nodes.local - 1) / nodes.local, own * (nodes.count - 1) / nodes.count)


def all_reduce(nodes: Nodes, size: float) -> Traffic:
    """Count an all-reduce of `size` bytes: a reduce-scatter and an all-gather."""
    return gather(nodes, size) + gather(nodes, size)


def ring(nodes: Nodes, size: float, *, hops: int) -> Traffic:
    """Count `size` bytes sent to the next rank `hops` times; the last of a node sends outside."""
    sent = size * hops if nodes.num_ranks > 1 else 0.0
    return Traffic(sent, sent * (nodes.count > 1))


Call = Literal["all_reduce", "all_gather", "reduce_scatter", "send"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Collective:
    """Describe equal calls of one collective that every rank makes in a step."""

    call: Call
    size: int
    """Bytes that NCCL is called with: the buffer of an all-reduce, a rank's part of an all-gather
    or a reduce-scatter, a message to the next rank."""
    nodes: Nodes
    """The ranks that take part."""
    count: int = 1

    @property
    def sent(self) -> Traffic:
        """Return the bytes that one rank sends in all of these calls."""
        total = self.count * self.size
        if self.call == "send":
            return ring(self.nodes, self.size, hops=self.count)
        if self.call == "all_reduce":
            return all_reduce(self.nodes, total)
        return gather(self.nodes, total * self.nodes.num_ranks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """Describe the weights that FSDP2 gathers together: a block's, or all that are in no block."""

    gathered: int
    """Elements of a rank's shards, which are padded to the size of the largest."""
    reduced: int
    """The same of the gradients, without weights that follow by EMA."""
    gathers: int
    """Times that a step gathers the weights: before every pass, and again before its backward
    pass."""
    weight_bytes: int
    """Bytes of an element as it is gathered."""


def total(collectives: Sequence[Collective]) -> Traffic:
    """Return the bytes that one rank sends in all of these collectives."""
    return sum((collective.sent for collective in collectives), start=Traffic())


def ddp(nodes: Nodes, *, num_parameters: int) -> list[Collective]:
    """List the all-reduces of DDP's gradients in fp32, all of its buckets as one."""
    return [Collective(call="all_reduce", size=4 * num_parameters, nodes=nodes)]


def fsdp(
    nodes: Nodes, units: Sequence[Unit], *, num_shards: int, num_scalars: int
) -> list[Collective]:
    """List what FSDP2 sends: weights gathered, gradients in fp32 scattered, and scalars.

    num_shards: neighbouring ranks that weights are sharded over; where these are not all, it is
    HSDP, which all-reduces the shards of gradients over the groups. num_scalars: trained numbers
    that are not sharded. The norm of the gradients takes an all-reduce as well.
    """
    within = Nodes(num_shards, nodes.ranks_per_node)
    groups = nodes.num_ranks // num_shards
    across = Nodes(groups, max(nodes.ranks_per_node // num_shards, 1))
    found = []
    for unit in units:
        size = unit.weight_bytes * unit.gathered
        found.append(Collective(call="all_gather", size=size, nodes=within, count=unit.gathers))
        if unit.reduced:
            size = 4 * unit.reduced
            found.append(Collective(call="reduce_scatter", size=size, nodes=within))
            if groups > 1:
                found.append(Collective(call="all_reduce", size=size, nodes=across))
    if num_scalars:
        found.append(Collective(call="all_reduce", size=4 * num_scalars, nodes=nodes))
    return [*found, Collective(call="all_reduce", size=4, nodes=within)]


def candidates(
    nodes: Nodes,
    *,
    num_rows: int,
    dim: int,
    weight_bytes: int,
    sigmoid: bool = False,
    target_grad: bool = True,
    on_gpu: bool = True,
) -> list[Collective]:
    """List what the ring of `ops.boltzmann` sends over the rows of all ranks.

    Rows go round for the sums and once more for the gradients, whose fp32 sums follow them home.
    The sigmoid form needs no sums first. target_grad: whether the rows have gradients. on_gpu: rows
    go round twice more, for the maxima and for exact sums, since the host does not wait to learn
    whether these are needed.
    """
    size, around = num_rows * dim, nodes.num_ranks - 1
    rounds = 1 if sigmoid else 4 if on_gpu else 2
    rows = Collective(call="send", size=weight_bytes * size, nodes=nodes, count=rounds * around)
    gradients = Collective(call="send", size=4 * size, nodes=nodes, count=around + 1)
    return [rows, gradients] if target_grad else [rows]


def views_of_ranks(nodes: Nodes, *, num_rows: int, dim: int) -> list[Collective]:
    """List what NT-Xent sends: both views' rows in fp32 to all ranks, and their gradients home.

    num_rows: rows of a view on a rank. Each is an all-reduce of all ranks' rows, to which a rank
    adds its own, in any number.
    """
    size = 4 * 2 * num_rows * nodes.num_ranks * dim
    return [Collective(call="all_reduce", size=size, nodes=nodes, count=2)]
