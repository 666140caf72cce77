"""What a backend makes of the rows of a batch, and how it names a sample that it cannot use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from m3i_fast.ops.views import ViewSpec
from m3i_fast.pipelines.batch_rows import BatchRows
from m3i_fast.pipelines.dataset.annotations.tokenizer import TokenizerInfo
from m3i_fast.pipelines.sample_order.positions import Integers
from m3i_fast.pipelines.threads import Cores

TOKENS = "tok"  # the member with token ids; another one holds a caption's text


@dataclass(frozen=True, slots=True)
class PatchSides:
    """How many patches the views of each sample may have."""

    patch_size: int
    """Pixels along a side of a patch."""
    most_tokens: Callable[[Integers], Integers]
    """[B] positions -> [B, V]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleWork:
    """How samples are read, decoded and cut, and how many at once."""

    views: tuple[ViewSpec, ...]
    centre: bool
    """Cut the largest centred square in place of random crops."""
    seed: int
    tokenizer: TokenizerInfo
    max_pixels: int
    caption_member: str
    """Extension of the member that holds a sample's captions."""
    alternates: bool
    """Cut view 1 of another picture of the sample."""
    batch_size: int
    """Samples of a batch; with `sides` at most."""
    num_threads: int
    cores: Cores | None = None
    """Where the threads run; None: where the system puts them."""
    prefetch: int
    """Batches made ahead."""
    device_id: int | None
    """The GPU that decodes and holds the views; None: the CPU."""
    hw_decoder_load: float | None
    sides: PatchSides | None = None
    """Cut each view to a grid of patches of its own; None: squares of each view's size."""


@dataclass(frozen=True, slots=True)
class MadeBatch:
    """What a backend made of a batch's rows. Legend: B samples, V views, T token ids."""

    rows: BatchRows
    views: tuple[Tensor, ...]  # V x [B, 3, S, S] uint8; of any size V x [T, 3 P P]
    params: Tensor  # [B, V, 13] float32, m3i_fast.ops.views.VIEW_PARAMS
    image_size: Tensor  # [B, 2] int64: height, width of the upright picture
    token_ids: Tensor  # [B, T] int32, zero padded
    num_tokens: Tensor  # [B] int64
    texts: Callable[[], list[bytes]] | None  # gives B captions where they are stored as text
    grids: Tensor | None = None  # [B, V, 2] int64, rows and columns of patches of views of any size


class Backend(Protocol):
    """Makes batches of rows, in their order, some of them ahead."""

    def __next__(self) -> MadeBatch:
        """Return the next batch.

        Raises SampleError for the first sample that cannot be used; the backend is then closed and
        another one made. Raises StopIteration after the last rows.
        """

    def close(self) -> None:
        """Stop the threads."""


class SampleError(RuntimeError):
    """A sample that cannot be used: damaged bytes, a picture that does not decode."""

    def __init__(self, *, sample_id: int, position: int, file: str, reason: str) -> None:
        super().__init__(f"corrupt sample {sample_id} at position {position} in {file}: {reason}")
        self.sample_id, self.position, self.file, self.reason = sample_id, position, file, reason
