"""Batches of labelled pictures as the trained measures take them, epoch after epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count

from torch import Tensor

# Pictures [B, 3, S, S], and their labels [B] int64 or label maps [B, H, W] int64.
LabelledBatch = tuple[Tensor, Tensor]
# The batches of an epoch, which are counted from 0.
Batches = Callable[[int], Iterable[LabelledBatch]]
# Pictures [B, 3, S, S] as the batches have them -> tokens [B, R + N, C], the prefix first.
Encode = Callable[[Tensor], Tensor]


def repeated(batches: Batches, num_steps: int) -> Iterator[LabelledBatch]:
    """Yield `num_steps` batches, those of epoch 0 and then of the next ones.

    Raises ValueError where an epoch has no batch.
    """
    left = num_steps
    for epoch in count():
        before = left
        for batch in batches(epoch):
            if left == 0:
                return
            left -= 1
            yield batch
        if left == 0:
            return
        if left == before:
            raise ValueError(f"batches: expected one or more in epoch {epoch}, got none")


def cell_tokens(encode: Encode, pictures: Tensor, num_prefix: int) -> Tensor:  # -> [B, N, C] fp32
    """Encode pictures and leave out the prefix; ValueError where no token is left."""
    tokens = encode(pictures)
    if tokens.ndim != 3 or tokens.shape[1] <= num_prefix:
        raise ValueError(
            f"encode: expected tokens [B, R + N, C] with more than {num_prefix} (num_prefix) of "
            f"them a picture, got {list(tokens.shape)}"
        )
    return tokens[:, num_prefix:].float()


def expect_labels(label: Tensor, num_classes: int) -> None:  # [B] int64
    """Raise ValueError where a label is outside 0..num_classes - 1, or there is none."""
    if len(label) == 0 or int(label.min()) < 0 or int(label.max()) >= num_classes:
        got = f"{int(label.min())} to {int(label.max())}" if len(label) else "an empty batch"
        raise ValueError(
            f"labels: expected 0 to {num_classes - 1} (num_classes = {num_classes}; leave out "
            f"pictures without a label), got {got}"
        )


def labelled(batch: LabelledBatch, num_classes: int) -> LabelledBatch:
    """Return the pictures of a batch that have a label; -1 is none.

    Raises ValueError where a label is outside -1..num_classes - 1.
    """
    pictures, label = batch
    has_label = label >= 0
    if bool((label < -1).any() | (label >= num_classes).any()):
        raise ValueError(
            f"labels: expected 0 to {num_classes - 1} (num_classes = {num_classes}), or -1 for "
            f"none, got {int(label.min())} to {int(label.max())}"
        )
    return (pictures, label) if bool(has_label.all()) else (pictures[has_label], label[has_label])


def expect_evaluable(name: str, batches: Batches, num_classes: int) -> None:
    """Check the first batch of epoch 0 before hours of training; ValueError as `labelled`."""
    for batch in batches(0):
        labelled(batch, num_classes)
        return
    raise ValueError(f"{name}: expected batches of pictures, got none")
