"""How many patches the views of any shape of a step have: those of a run's log, or those expected.

Legend: V views of a sample, global ones first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from m3i_fast.config.data import LoaderConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.config.objective.flops import NONE, Flops
from m3i_fast.config.objective.mixing import MixingConfig
from m3i_fast.costs.encoder_flops import vit_packed


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """Say what the trained encoder is shown of global views."""

    mixing: MixingConfig
    num_global: int
    progress: float
    """Of the run, 0 to 1."""

    def num_own(self, num_cells: int) -> int:
        """Return the cells that an image of so many shows, one at least."""
        return max(self.mixing.num_own(num_cells, self.progress), 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedPictures:
    """Hold the views of one rank's steps, by their patches."""

    num_steps: float
    """Steps of one batch each, that the views are of."""
    num_samples: int
    """Samples of these steps."""
    lengths: tuple[Counter[int], ...]  # V
    """How many views have so many patches, of each of a sample's views."""

    @property
    def samples_a_step(self) -> float:
        """Return the samples of a step, on average."""
        return self.num_samples / self.num_steps

    @property
    def tokens_a_step(self) -> float:
        """Return the patches of a step, of all views, on average."""
        return sum(map(num_tokens, self.lengths)) / self.num_steps

    def encode(self, vision: ViTConfig, views: Iterable[int], shown: Shown | None = None) -> Flops:
        """Count one step's pass of an encoder over these views, of global ones what is shown.

        Images that share an input are counted as if their grids were alike.
        """
        of_views = [self._sequences(view, shown) for view in views]
        flops = [vit_packed(vision, each).scaled(share) for each, share in of_views]
        return sum(flops, start=NONE).scaled(1 / self.num_steps)

    def tokens_of(self, views: Iterable[int], num_prefix: int, shown: Shown | None = None) -> int:
        """Return the tokens of a step's pass over these views, with the prefix of each sequence."""
        of_views = [self._sequences(view, shown) for view in views]
        tokens = sum(
            share * (num_tokens(each) + num_prefix * each.total()) for each, share in of_views
        )
        return round(tokens / self.num_steps)

    def _sequences(self, view: int, shown: Shown | None) -> tuple[Counter[int], float]:
        """Return how many sequences of the encoder have so many cells, times a share."""
        lengths = self.lengths[view]
        if shown is None or view >= shown.num_global or shown.mixing.encodes_hidden:
            return lengths, 1.0
        if shown.mixing.mode == "joint":  # a sequence is of the parts of several
            return lengths, 1 / shown.mixing.images_per_input
        cells = Counter[int]()
        for length, count in lengths.items():
            cells[shown.num_own(length)] += count
        return cells, 1.0

    def mean_length(self, views: Iterable[int]) -> int:
        """Return the patches of a view, on average."""
        chosen = [self.lengths[view] for view in views]
        return round(sum(map(num_tokens, chosen)) / max(sum(each.total() for each in chosen), 1))


def num_tokens(lengths: Counter[int]) -> int:
    """Return the patches of all pictures."""
    return sum(length * count for length, count in lengths.items())


def expected_pictures(data: LoaderConfig, patch_size: int) -> PackedPictures:
    """Return the views of steps that are full, each of a size as likely as every other.

    A view is counted with all patches that it may have: rounding to whole rows and columns leaves
    about a tenth of them out.
    """
    sides = _sides(data, patch_size)
    num_samples = math.lcm(*(high - low + 1 for low, high in sides))
    lengths = []
    for low, high in sides:
        each = num_samples // (high - low + 1)
        lengths.append(Counter({side**2: each for side in range(low, high + 1)}))
    tokens = sum(map(num_tokens, lengths))
    return PackedPictures(
        num_steps=tokens / data.max_tokens_per_batch,
        num_samples=num_samples,
        lengths=tuple(lengths),
    )


def most_samples(data: LoaderConfig, patch_size: int, images_per_input: int = 1) -> int:
    """Return the samples that a batch has at most: of the smallest views alone, whole inputs."""
    least = sum(low**2 for low, _ in _sides(data, patch_size))
    samples = data.max_tokens_per_batch // least
    return samples - samples % images_per_input


def _sides(data: LoaderConfig, patch_size: int) -> Sequence[tuple[int, int]]:
    of_global, of_local = data.patch_sides(patch_size)
    sides = [of_global] * data.global_views.count
    if data.local_views is not None and of_local is not None:
        sides += [of_local] * data.local_views.count
    return sides
