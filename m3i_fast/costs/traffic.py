"""Bytes that a training step sends between ranks, in closed form.

N ranks on nodes of g. A collective goes first within a node, where every rank then holds a g-th of
the node's result, and only that goes over the rank's network adapter: what NCCL's trees and
NVLink SHARP do better is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass


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
        return self.num_ranks // self.local


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


def ddp(nodes: Nodes, *, num_parameters: int) -> Traffic:
    """Count the all-reduce of DDP's gradients in fp32."""
    return all_reduce(nodes, 4 * num_parameters)


def fsdp(nodes: Nodes, *, num_parameters: int, num_averaged: int, weight_bytes: int) -> Traffic:
    """Count FSDP2: weights gathered twice, averaged ones once, gradients scattered in fp32."""
    weights = gather(nodes, weight_bytes * num_parameters)
    averaged = gather(nodes, weight_bytes * num_averaged)
    return weights + weights + averaged + gather(nodes, 4 * num_parameters)


def candidates(
    nodes: Nodes, *, num_rows: int, dim: int, weight_bytes: int, sigmoid: bool = False
) -> Traffic:
    """Count the ring of `ops.boltzmann` over the rows of all ranks.

    Rows go round for the sums and once more for the gradients, whose fp32 sums follow them home.
    The sigmoid form needs no sums first.
    """
    size, around = num_rows * dim, nodes.num_ranks - 1
    rows = ring(nodes, weight_bytes * size, hops=around * (1 if sigmoid else 2))
    return rows + ring(nodes, 4 * size, hops=around + 1)
