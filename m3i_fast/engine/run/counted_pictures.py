"""What the batches of an interval held, where views have any shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from m3i_fast.config import TrainConfig
from m3i_fast.costs.packed_pictures import PackedPictures, num_tokens
from m3i_fast.pipelines.any_shape.batch import AnyBatch, PackedBatch, step_counts


class CountedPictures:
    """Counts the images of all ranks, and the patches of this rank's views; of squares nothing."""

    def __init__(self, cfg: TrainConfig) -> None:
        local = cfg.data.local_views
        num_views = cfg.data.global_views.count + (0 if local is None else local.count)
        self._lengths = tuple(Counter[int]() for _ in range(num_views))
        self._num_batches = self._num_own = 0
        self.num_images = 0
        """Images of all ranks."""

    def add(self, batches: Sequence[AnyBatch], num_ranks: int) -> None:
        """Add a step's batches of this rank."""
        for batch in batches:
            assert isinstance(batch, PackedBatch)
            for view, lengths in enumerate(self._lengths):
                lengths.update(batch.lengths(view))
            self._num_batches += 1
            self._num_own += batch.batch_size
        self.num_images += sum(step_counts(batches, num_ranks))

    @property
    def num_tokens(self) -> int:
        """Return the patches of this rank's views."""
        return sum(map(num_tokens, self._lengths))

    @property
    def pictures(self) -> PackedPictures | None:
        """Return this rank's views; None where there are none."""
        if not self._num_batches:
            return None
        return PackedPictures(
            num_steps=self._num_batches, num_samples=self._num_own, lengths=self._lengths
        )
