"""The training iterator with exact resume, and the ordered pass for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.config import LoaderConfig, ViewConfig

__all__ = ["Loader", "LoaderConfig", "ViewConfig", "evaluation_batches"]


class Loader:
    """Endless training batches of one rank; `state_dict` restores the position exactly.

    Every epoch has `steps_per_epoch` full batches on every rank; the rest of the epoch is dropped.
    The manifest gives what the model must match: `manifest.tokenizer.vocab_size`,
    `manifest.tokenizer.context_length` (T of `Batch.token_ids`), `manifest.class_names`.
    """

    def __init__(
        self,
        cfg: LoaderConfig,
        *,
        shard_id: int = 0,
        num_shards: int = 1,
        device_id: int | None = None,
        tokenizer_fingerprint: str | None = None,
    ) -> None:
        self.cfg = cfg
        self.steps_per_epoch: int = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch; RuntimeError naming the sample where one cannot be decoded."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch handed out, JSON-able."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly there; ValueError with expected and got where that is not possible."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop DALI's threads; the loader cannot be used afterwards."""


def evaluation_batches(
    path: Path,
    split: str,
    *,
    image_size: int,
    batch_size: int,
    representatives_only: bool = False,
    num_threads: int = 1,
    device_id: int | None = None,
    tokenizer_fingerprint: str | None = None,
) -> Iterator[Batch]:
    """One ordered pass without augmentation: the centre square, resized to image_size; one global view.

    The last batch may be smaller. With representatives_only, one sample a group
    (sample_id == group_id), so batches vary in size.
    """
    raise NotImplementedError
