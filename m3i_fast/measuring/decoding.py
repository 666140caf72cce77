"""Pictures of a source, decoded by Pillow and transformed by an encoder's own transform.

They pass through workers of a torch DataLoader and not through the training loader, which makes
the views of our own encoders alone: timm's and open_clip's transforms take pictures of Pillow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from m3i_fast.measuring.source import Source, Split
from m3i_fast.pipelines.packing.conversion import upright_picture
from m3i_fast.pipelines.packing.items import Refused
from m3i_fast.pipelines.packing.shard_task import opened_reader

DIGEST_BYTES = 16


class Decoded(NamedTuple):
    """A row of a split, transformed; or why it cannot be."""

    row: int
    picture: Tensor | None
    digest: bytes  # of the encoded picture; empty where it cannot be read
    fault: str
    error: OSError | None = None  # of the file system, which may be gone the next time


@dataclass(frozen=True, slots=True)
class PictureBatch:
    """Rows of a split, those that could be decoded first as one tensor."""

    rows: NDArray[np.int64]  # [b] that are in `pictures`
    pictures: Tensor  # [b, 3, S, S]
    digests: dict[int, bytes]  # by row, of every row that could be read
    faults: dict[int, str]  # by row
    errors: dict[int, OSError]  # by row


class _Pictures(Dataset[Decoded]):
    """The pictures of a split by row; a worker opens the source once."""

    def __init__(self, source: Source, split: Split, transform: Callable[[Any], Tensor]) -> None:
        self._options, self._max_pixels = source.options, source.max_pixels
        self._places = [item.place for item in split.items]
        self._transform = transform

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, row: int) -> Decoded:
        digest = b""
        try:
            content = opened_reader(self._options).read(self._places[row])
            digest = hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
            picture = upright_picture(content, max_pixels=self._max_pixels)
            return Decoded(row, self._transform(picture), digest, "")
        except Refused as refused:
            return Decoded(row, None, digest, refused.reason)
        except OSError as error:
            return Decoded(row, None, digest, "", error)


def decoded_batches(
    source: Source,
    split: Split,
    transform: Callable[[Any], Tensor],
    batches: Sequence[Sequence[int]],
    *,
    workers: int,
) -> Iterator[PictureBatch]:
    """Yield the pictures of batches of rows, in their order, decoded ahead by `workers` processes.

    A picture that is broken is left out of its batch and named in `faults`. workers: 0: by this
    process. Raises OSError where a picture cannot be read, which says nothing of the picture.
    """
    if not batches:
        return
    loader = DataLoader(
        _Pictures(source, split, transform),
        batch_sampler=[list(rows) for rows in batches],
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # else torch's global one would be drawn from
        worker_init_fn=_one_thread if workers else None,
    )
    for batch in loader:
        for row, error in batch.errors.items():
            raise OSError(
                f"{split.items[row].name}: cannot be read: {error.strerror or error}; features "
                "that are done are kept: see to it that it can be, and start again"
            ) from error
        yield batch


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def _collate(decoded: Sequence[Decoded]) -> PictureBatch:
    good = [one for one in decoded if one.picture is not None]
    pictures = [one.picture for one in good if one.picture is not None]
    return PictureBatch(
        rows=np.array([one.row for one in good], dtype=np.int64),
        pictures=torch.stack(pictures) if pictures else torch.empty(0),
        digests={one.row: one.digest for one in decoded if one.digest},
        faults={one.row: one.fault for one in decoded if one.fault},
        errors={one.row: one.error for one in decoded if one.error is not None},
    )
