"""The backend without DALI: threads that read, Pillow that decodes, and torch.ops.m3i's views.

On a CPU it makes the same bits as graph/dali_backend.py, for which it is the oracle.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3i_fast.ops.views import centre_squares, draw_views, make_patches, make_views
from m3i_fast.pipelines.batch_rows import COLUMNS, BatchRows
from m3i_fast.pipelines.dataset import alternates
from m3i_fast.pipelines.dataset.annotations import captions
from m3i_fast.pipelines.dataset.pictures import decode_pixels
from m3i_fast.pipelines.optional_imports import require
from m3i_fast.pipelines.sample_order.positions import Integers
from m3i_fast.pipelines.sample_order.token_budget import grid_of
from m3i_fast.pipelines.samples_to_views import TOKENS, MadeBatch, SampleError, SampleWork
from m3i_fast.pipelines.tar_members import tar_members
from m3i_fast.pipelines.threads import start_pool

PICTURES = ("jpg", "jpeg", "png", "webp")
_MOST_PIXEL_BYTES = 1 << 26  # decoded pictures that views are cut of at once


@dataclass(frozen=True, slots=True)
class DecodedSample:
    """A sample's decoded pictures, and its caption as ids or as text."""

    pictures: tuple[NDArray[np.uint8], ...]  # [H, W, 3], one or two
    token_ids: NDArray[np.int32]
    text: bytes


class TorchBackend:
    """Makes batches by threads of Python and of the views operator."""

    def __init__(self, source: Iterator[BatchRows], work: SampleWork) -> None:
        self._source, self._work = source, work
        self._readers = start_pool(work.num_threads, "m3i-read", work.cores)
        self._maker = start_pool(1, "m3i-views", work.cores)
        self._ahead: deque[Future[MadeBatch]] = deque()

    def __next__(self) -> MadeBatch:
        """Return the next batch, as `Backend` says."""
        while len(self._ahead) < self._work.prefetch:
            rows = next(self._source, None)
            if rows is None:
                break
            samples = deque(
                self._readers.submit(read_sample, rows, index, self._work)
                for index in range(len(rows.samples))
            )
            self._ahead.append(self._maker.submit(self._make, rows, samples))
        if not self._ahead:
            raise StopIteration
        return self._ahead.popleft().result()

    def close(self) -> None:
        """Stop the threads, when they have finished the samples that they are at."""
        for pool in (self._readers, self._maker):
            pool.shutdown(cancel_futures=True)

    def _make(self, rows: BatchRows, futures: deque[Future[DecodedSample]]) -> MadeBatch:
        """Cut the views of some samples after those of others, and free what they were cut of.

        futures: of each sample; they are taken out.
        """
        work, count = self._work, len(futures)
        token_ids = np.zeros((count, work.tokenizer.context_length), np.int32)
        num_tokens = np.zeros(count, np.int64)
        texts: list[bytes] = []
        parts = []
        while futures:
            pictures: list[tuple[NDArray[np.uint8], ...]] = []
            held, start = 0, len(texts)
            while futures and held < _MOST_PIXEL_BYTES:
                sample = futures.popleft().result()
                num_tokens[len(texts)] = len(sample.token_ids)
                token_ids[len(texts), : len(sample.token_ids)] = sample.token_ids
                texts.append(sample.text)
                pictures.append(sample.pictures)
                held += sum(picture.size for picture in sample.pictures)
            parts.append(self._cut(rows.positions[start : len(texts)], pictures))
        *views, params, size, grids = (
            parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        )
        return MadeBatch(
            rows=rows,
            views=tuple(views),
            params=params,
            image_size=size,
            token_ids=torch.from_numpy(token_ids),
            num_tokens=torch.from_numpy(num_tokens),
            texts=None if work.caption_member == TOKENS else lambda: texts,
            grids=None if work.sides is None else grids,
        )

    def _cut(
        self, positions: NDArray[np.int64], samples: list[tuple[NDArray[np.uint8], ...]]
    ) -> tuple[Tensor, ...]:
        """Return the views, their parameters, the first picture's sizes, and grids of patches."""
        work = self._work
        pictures = [picture for sample in samples for picture in sample]
        ends = np.cumsum([picture.size for picture in pictures])
        shape = len(samples), -1
        offset = torch.from_numpy(ends - [picture.size for picture in pictures]).view(*shape)
        sizes = torch.tensor([picture.shape[:2] for picture in pictures]).view(*shape, 2)
        pixels = torch.from_numpy(np.concatenate([picture.reshape(-1) for picture in pictures]))
        params = self._params(positions, sizes)
        if work.sides is None:
            grids = sizes.new_zeros(len(samples), 0, 2)
            views = make_views(
                pixels, offset, sizes, params, views=work.views, num_threads=work.num_threads
            )
        else:
            grids = _grids(params, work.sides.most_tokens(positions))
            views = make_patches(
                *(pixels, offset, sizes, params, grids),
                views=work.views,
                patch_size=work.sides.patch_size,
                num_threads=work.num_threads,
            )
        return *views, params, sizes[:, 0].contiguous(), grids

    def _params(self, positions: NDArray[np.int64], sizes: Tensor) -> Tensor:
        """Return the parameters [B, V, 13] of the views of pictures of sizes [B, M, 2]."""
        work = self._work
        if not work.centre:
            at = torch.from_numpy(positions.copy())
            return draw_views(sizes, at, seed=work.seed, views=work.views)
        return centre_squares(sizes[:, 0], len(work.views))


def _grids(
    params: Tensor,  # [B, V, 13]
    most_tokens: Integers,  # [B, V]
) -> Tensor:  # [B, V, 2] int64
    """Return rows and columns of patches of views, of the aspects of their boxes."""
    boxes = params[:, :, 2:4].tolist()
    return torch.tensor(
        [
            [grid_of(height, width, most) for (height, width), most in zip(*own, strict=True)]
            for own in zip(boxes, most_tokens.tolist(), strict=True)
        ]
    )


def read_sample(rows: BatchRows, index: int, work: SampleWork) -> DecodedSample:
    """Read and decode a sample of a batch; raises SampleError, or as `_read_range`."""
    row = dict(zip(COLUMNS, rows.rows[index].tolist(), strict=True))
    file = rows.path(index)
    content = _read_range(file, row["offset"], row["size"])
    try:
        return _sample(content, row, work)
    except ValueError as error:
        raise SampleError(
            sample_id=row["sample_id"], position=row["position"], file=file, reason=str(error)
        ) from error


def _read_range(file: str, offset: int, size: int) -> bytes:
    """Read a range of a file. Raises RuntimeError where it is not all there."""
    try:
        number = os.open(file, os.O_RDONLY)
        try:
            content = os.pread(number, size, offset)
            while len(content) < size:  # as file systems of the network may give it
                if not (more := os.pread(number, size - len(content), offset + len(content))):
                    break
                content += more
        finally:
            os.close(number)
    except OSError as error:
        raise RuntimeError(f"{file}: cannot be read: {error.strerror}") from error
    if len(content) != size:
        raise RuntimeError(f"{file}: expected {size} bytes at {offset}, got {len(content)}")
    return content


def _sample(content: bytes, row: dict[str, int], work: SampleWork) -> DecodedSample:
    """Read a sample out of its members; raises ValueError, expected and got."""
    if row["crc32c"] >= 0:
        found = require("google_crc32c").value(content)
        if found != row["crc32c"]:
            raise ValueError(f"expected bytes of CRC-32C {row['crc32c']}, got {found}")
    members = _members(content)
    names = [name for name in PICTURES if name in members]
    if len(names) != 1:
        raise ValueError(f"expected one picture ({', '.join(PICTURES)}), got {names}")
    pictures = [members[names[0]]]
    if work.alternates:
        if not {alternates.PICTURES, alternates.SIZES} <= members.keys():
            raise ValueError(f"expected alt and aln, got {sorted(members)}")
        others = alternates.split(members[alternates.PICTURES], members[alternates.SIZES])
        pictures.append(others[_chosen(row["alternate"], len(others))])
    token_ids, text = np.zeros(0, np.int32), b""
    if work.caption_member == TOKENS:
        token_ids = _caption(members, row["caption"], work)
    else:
        text = members.get(work.caption_member, b"")
    return DecodedSample(
        pictures=tuple(decode_pixels(picture, work.max_pixels) for picture in pictures),
        token_ids=token_ids,
        text=text,
    )


def _members(content: bytes) -> dict[str, bytes]:
    """Return {extension: content} of one sample's members.

    Directories and blocks of zeros are passed over, as cuda/dali/tar_members.h does.
    """
    members: dict[str, bytes] = {}
    keys, end = set(), 0
    for member, after in tar_members(io.BytesIO(content), len(content)):
        end = after
        if not member.isfile():
            continue
        folder, _, name = member.name.rpartition("/")
        key, _, extension = name.partition(".")
        keys.add((folder, key))
        extension = extension.lower()
        if extension in members:
            raise ValueError(f"expected each member once, got two of {extension}")
        members[extension] = content[member.offset_data : member.offset_data + member.size]
    if content[end:].strip(b"\0"):  # tarfile stops at a header that is none
        raise ValueError(f"expected members of a tar up to {len(content)} bytes, got {end}")
    if len(keys) > 1:
        raise ValueError(f"expected members of one sample, got those of {len(keys)}")
    return members


def _caption(members: dict[str, bytes], draw: int, work: SampleWork) -> NDArray[np.int32]:
    """Return the token ids of one of a sample's captions; none where it has none."""
    stored, lengths = (members.get(name) for name in (captions.TOKENS, captions.LENGTHS))
    fault = captions.stored_fault(stored, lengths, work.tokenizer)
    if fault is not None:
        raise ValueError(fault)
    found = captions.separate(stored, lengths)
    return found[_chosen(draw, len(found))] if found else np.zeros(0, "<i4")


def _chosen(draw: int, count: int) -> int:
    """Return which of `count` things a draw of 2**32 chooses."""
    return draw * count >> 32
