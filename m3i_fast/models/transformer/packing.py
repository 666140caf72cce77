"""Sequences of several lengths behind one another, each of which attends to itself alone.

Every product, norm and sum of a block is then one call over all tokens, and none is of padding
(NaViT, arXiv 2307.06304). Legend: N sequences, T tokens of all of them, R prefix tokens of each,
B sequences of one length, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """Sequences of one length, side by side among others."""

    batch_size: int
    length: int
    num_last: int | None = None
    """Tokens that a block returns, the last ones of each sequence; None for all."""

    @property
    def start(self) -> int:
        """Return the first token that a block returns."""
        return 0 if self.num_last is None else self.length - self.num_last

    @property
    def num_tokens(self) -> int:
        """Return the tokens of all sequences."""
        return self.batch_size * self.length


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """How the tokens of a batch of several lengths are packed, as a block takes it."""

    groups: tuple[Sequences, ...]
    """Sequences of one length each, one group behind the other."""
    sequence: Tensor | None = None  # [T] int64
    """The sequence that each token is of, for stochastic depth; None: there is none."""
    ends: Tensor | None = None  # [N + 1] int32
    """Tokens up to each sequence, from 0 on, for attention in one kernel; None: a call a group."""
    last: Tensor | None = None  # [R] int64
    """The rows that a block returns, in this order; None: what the groups ask for, or all."""
    num_padding: int = 0
    """Tokens of the last group, one sequence of padding that nobody reads; 0: there is none."""

    @property
    def num_sequences(self) -> int:
        """Return the sequences of all groups, without padding."""
        return sum(group.batch_size for group in self.groups) - (self.num_padding > 0)

    @property
    def asks_last(self) -> bool:
        """Return whether any group asks for its last tokens alone."""
        return any(group.num_last is not None for group in self.groups)

    @property
    def longest(self) -> int:
        """Return the tokens of the longest sequence."""
        return max(group.length for group in self.groups)


def pack(batches: Sequence[Tensor]) -> Tensor:  # [B, T, D] each -> [B T of all, D]
    """Put batches of sequences of several lengths behind one another."""
    return torch.cat([batch.flatten(0, 1) for batch in batches])


def pack_last(
    batches: Sequence[Tensor],  # [B, T, D] each
    groups: Sequence[Sequences],
) -> Tensor:  # [B num_last of all, D]
    """Put the tokens that the groups ask for behind one another."""
    return pack([batch[:, of.start :] for batch, of in zip(batches, groups, strict=True)])


def unpack(
    tokens: Tensor,  # [B T of all, ...]
    groups: Sequence[Sequences],
) -> list[Tensor]:  # [B, T, ...] each
    """Undo `pack`; the results are views."""
    parts = tokens.split([group.num_tokens for group in groups])
    return [
        part.unflatten(0, (group.batch_size, group.length))
        for part, group in zip(parts, groups, strict=True)
    ]


@dataclass(frozen=True, slots=True, eq=False)
class SortedByLength:
    """Sequences of any lengths, packed such that equal lengths are side by side.

    Before it, and after it, the prefix tokens of all sequences stand before the other tokens of
    all: [N R + T, D], both in the order in which the sequences were given.
    """

    packed: Packed
    by_length: Tensor  # [N] int64: the sequence as it was given at each place
    order: Tensor  # [N R + T + padding] int64: the row as it was given at each packed row
    back: Tensor  # [N R + T] int64: the packed row of each row as it was given


def sort_by_length(
    lengths: Sequence[int],
    *,
    num_prefix: int | Sequence[int] = 0,
    multiple: int = 1,
    device: torch.device | str = "cpu",
) -> SortedByLength:
    """Say how sequences of any lengths are packed behind one another, shortest first.

    lengths: tokens of each sequence, at least 1, without its prefix. num_prefix: of every sequence,
    or of each. multiple: the packed rows are
    filled up to a multiple of it by a last sequence of padding, copies of the first row given, of
    which none comes back: no other sequence attends to it, and its gradients are 0. Made on the CPU
    and copied to the device without waiting for it. Raises ValueError without sequences, and for a
    length below 1.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths: expected at least 1 token a sequence, got {list(lengths)}")
    own, prefix = torch.tensor(lengths), torch.tensor(num_prefix).expand(len(lengths))
    by_length = (own + prefix).argsort(stable=True)
    whole = (own + prefix)[by_length]
    sequence = torch.arange(len(own)).repeat_interleave(whole)
    start = whole.cumsum(0) - whole
    given = by_length[sequence]
    # Below 0: of the prefix.
    within = torch.arange(len(sequence)) - start[sequence] - prefix[given]
    first = prefix.sum() + own.cumsum(0) - own  # row of each sequence's first token
    order = torch.where(within < 0, prefix.cumsum(0)[given], first[given]) + within
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    ends = torch.cat([start, start[-1:] + whole[-1:]]).int()
    found, counts = whole.unique_consecutive(return_counts=True)
    groups = tuple(map(Sequences, counts.tolist(), found.tolist()))
    if num_padding := -len(order) % multiple:
        groups += (Sequences(1, num_padding),)
        order = torch.cat([order, order.new_zeros(num_padding)])
        sequence = torch.cat([sequence, sequence[-1:].expand(num_padding)])
        ends = torch.cat([ends, ends[-1:] + num_padding])
    moved = [to_device(each, device) for each in (by_length, order, back, sequence, ends)]
    packed = Packed(groups, sequence=moved[3], ends=moved[4], num_padding=num_padding)
    return SortedByLength(packed, *moved[:3])


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor of the CPU to the device, which one of the device is already.

    A GPU is not waited for.
    """
    if tensor.device.type != "cpu":
        return tensor.to(device)
    if torch.device(device).type == "cuda":
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)  # one copy, pinned
    return tensor.to(device)
