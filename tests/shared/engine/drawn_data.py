"""Batches of drawn pictures in a run's order: what a loader gives, without a data set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3i_fast.config import TrainConfig
from m3i_fast.keyed_draws import Purpose, uniform
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.sample_order.positions import ORDER_VERSION, Integers, StepLayout, shuffled


class DrawnData:
    """An endless iterator over a rank's batches; what a sample shows is drawn by its id.

    Boxes are drawn by position, as a loader's crops. All pictures are annotated, so that batches
    have as many members of each term.
    """

    def __init__(
        self, cfg: TrainConfig, *, rank: int = 0, num_ranks: int = 1, size: int = 75
    ) -> None:
        self._cfg, self._rank, self._size = cfg, rank, size
        self._layout = StepLayout(
            batch_size=cfg.data.batch_size,
            num_ranks=num_ranks,
            accumulate=cfg.parallel.accumulate,
            images_per_input=cfg.objective.mixing.images_per_input,
        )
        self.samples, self._batch = 0, 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.batch(self._layout.positions(self.samples, self._rank, self._batch))
        self._batch = (self._batch + 1) % self._layout.accumulate
        if self._batch == 0:
            self.samples += self._layout.samples_a_step
        return batch

    def batch(self, positions: Integers) -> Batch:
        """The samples at these positions of the run."""
        cfg, ids = self._cfg, shuffled(positions, size=self._size, seed=self._cfg.data.seed)
        sizes = [cfg.data.global_views.size] * cfg.data.global_views.count
        if cfg.data.local_views is not None:
            sizes += [cfg.data.local_views.size] * cfg.data.local_views.count
        pixels = iter(drawn(ids, Purpose.CELLS, *((3, side, side) for side in sizes)))
        views = [(next(pixels) * 256).to(torch.uint8) for _ in sizes]
        [places] = drawn(positions, Purpose.CELLS, (len(sizes), 4))
        side = cfg.data.global_views.size
        extent = torch.tensor([0.3, 0.3, 0.3, 0.3]), torch.tensor([0.0, 0.0, 0.4, 0.4])
        boxes = (places * extent[0] + extent[1]) * side
        text = cfg.text
        words, length, label = drawn(ids, Purpose.CAPTION, (text.context_length,), (), ())
        count = 3 + (length * (text.context_length - 3)).long()
        tokens = 1 + (words * (text.vocab_size - 1)).to(torch.int32)
        number = cfg.data.global_views.count
        return Batch(
            global_views=tuple(views[:number]),
            local_views=tuple(views[number:]),
            boxes=torch.cat([boxes, (places[..., :1] > 0.5).float()], -1),
            image_size=torch.full((len(ids), 2), float(side)),
            token_ids=tokens.masked_fill(torch.arange(text.context_length) >= count[:, None], 0),
            num_tokens=count,
            label=(label * cfg.num_classes).long(),
            sample_id=torch.from_numpy(ids),
            group_id=torch.from_numpy(ids),
            position=torch.from_numpy(positions),
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "version": 2,
            "samples": self.samples,
            "seed": self._cfg.data.seed,
            "dataset": f"drawn {self._size}",
            "split": self._cfg.data.split,
            "order": ORDER_VERSION,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a state's sample; ValueError for another data set or order."""
        expected = {**self.state_dict(), "samples": state.get("samples")}
        if state != expected:
            raise ValueError(f"loader state: expected {expected}, got {state}")
        self.samples, self._batch = state["samples"], 0

    def close(self) -> None:
        """Nothing is open."""


def drawn(keys: Integers, purpose: Purpose, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Numbers in [0, 1) for each key, [N, *shape] of each shape."""
    counts = [int(np.prod(shape)) for shape in shapes]
    numbers = torch.from_numpy(uniform(keys, sum(counts), seed=1, purpose=purpose))
    parts = numbers.split(counts, 1)
    return [part.reshape(len(keys), *shape) for part, shape in zip(parts, shapes, strict=True)]
