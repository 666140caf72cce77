"""`Loader`, the training iterator with exact resume, and the ordered pass for evaluation."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from m3i_fast.config.data import MAX_PIXELS, LoaderConfig, ViewConfig
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.dataset.captions import epoch_key
from m3i_fast.pipelines.dataset.directory import open_split
from m3i_fast.pipelines.dataset.manifest import Manifest, SplitInfo
from m3i_fast.pipelines.graph.batch_assembly import Origin, run, to_batch
from m3i_fast.pipelines.loader_state import Fingerprint, Position, pack_state, unpack_state

if TYPE_CHECKING:  # DALI is imported on first use: configs are read on machines without it
    from m3i_fast.pipelines.graph.dali import Pipeline
    from m3i_fast.pipelines.graph.reader import Shuffle, Source

__all__ = ["Loader", "LoaderConfig", "ViewConfig", "evaluation_batches"]

logger = logging.getLogger(__name__)


class Loader:
    """An endless iterator over training batches of one rank, which resumes exactly.

    Every epoch has `steps_per_epoch` full batches on every rank; the remaining samples are dropped.
    The model has to match the manifest: `manifest.tokenizer.vocab_size`,
    `manifest.tokenizer.context_length` (T of `Batch.token_ids`), `manifest.class_names`. With a
    `device_id` that GPU decodes and holds the batches. Of several captions one is drawn by (seed,
    epoch, sample_id), whatever the rank, batch and step.

    Raises ValueError or FileNotFoundError as `open_split`, and ValueError where the split is
    smaller than one batch, or for shard_id or data.hw_decoder_load out of range.
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
        if not 0 <= shard_id < num_shards:
            raise ValueError(f"shard_id: expected 0 to {num_shards - 1}, got {shard_id}")
        self.cfg = cfg
        self.shard_id = shard_id
        self.num_shards = num_shards
        self.device_id = device_id
        if device_id is None and cfg.hw_decoder_load is not None:
            raise ValueError(
                "data.hw_decoder_load: expected None without a GPU, since it sets the load of a "
                f"GPU's decoder, got {cfg.hw_decoder_load}"
            )
        self._origin = _open(
            cfg.path,
            cfg.split,
            max_pixels=cfg.max_pixels,
            device_id=device_id,
            fingerprint=tokenizer_fingerprint,
            shard_id=shard_id,
            num_shards=num_shards,
        )
        self.manifest, self._split = self._origin.manifest, self._origin.split
        smallest = self._split.num_samples // num_shards
        largest = -(-self._split.num_samples // num_shards)
        self.steps_per_epoch: int = smallest // cfg.batch_size
        self._runs_per_epoch = -(-largest // cfg.batch_size)
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"batch_size: expected at most {smallest} (split {cfg.split} of {cfg.path} has "
                f"{self._split.num_samples} samples for {num_shards} ranks), got {cfg.batch_size}"
            )
        self._pipeline: Pipeline | None = None
        self._fingerprint: Fingerprint | None = None
        self._position = Position(epoch=0, step=0, checkpoint=None)

    @property
    def epoch(self) -> int:
        """Index of the epoch that the last batch belongs to, from 0."""
        return self._position.epoch

    @property
    def samples(self) -> int:
        """Number of samples that all ranks have taken after as many batches as this one."""
        batches = self._position.epoch * self.steps_per_epoch + self._position.step
        return batches * self.cfg.batch_size * self.num_shards

    @property
    def fingerprint(self) -> Fingerprint:
        """Everything that has to be equal in a loader that continues from this one's state."""
        if self._fingerprint is None:
            self._fingerprint = self._make_fingerprint()
        return self._fingerprint

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Return the next batch; RuntimeError names a corrupt sample."""
        if self._pipeline is None:
            self._pipeline = self._build(self._position.checkpoint)
        epoch, step = self._position.epoch, self._position.step
        if step == self.steps_per_epoch:
            for _ in range(self._runs_per_epoch - step):
                run(self._pipeline, self._origin)
            epoch, step = epoch + 1, 0
        tensors = run(self._pipeline, self._origin)
        # DALI's checkpoint is taken in state_dict only, since taking it at every step is slow.
        self._position = Position(epoch=epoch, step=step + 1, checkpoint=None)
        key = epoch_key(self.cfg.seed, epoch)
        return to_batch(
            tensors, self.cfg.global_views.count, self._origin, key, self._positions(epoch, step)
        )

    def _positions(self, epoch: int, step: int) -> Tensor:  # [B] int64
        """Return the positions of a batch's samples in the run.

        The ranks take samples in turn: the n-th sample of a rank, counted over all epochs, is at
        n * num_shards + shard_id.
        """
        first = (epoch * self.steps_per_epoch + step) * self.cfg.batch_size
        return (first + torch.arange(self.cfg.batch_size)) * self.num_shards + self.shard_id

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last returned batch, for JSON, whatever is prefetched."""
        if self._pipeline is not None:
            checkpoint = bytes(self._pipeline.checkpoint())
            self._position = replace(self._position, checkpoint=checkpoint)
        return pack_state(self._position, self.fingerprint)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly from a state; ValueError with expected and got where it does not fit."""
        position = unpack_state(state, self.fingerprint)
        if position.step > self.steps_per_epoch:
            raise ValueError(
                f"loader state: expected step 0 to {self.steps_per_epoch}, got {position.step}"
            )
        self._position = position
        self._pipeline = None

    def close(self) -> None:
        """Stop DALI's threads; another `next` starts them again at the same position."""
        if self._pipeline is not None:
            self.state_dict()
            self._pipeline = None

    def _build(self, checkpoint: bytes | None, *, for_digest: bool = False) -> Pipeline:
        """Build the pipeline; `for_digest` leaves out paths, threads and prefetching."""
        from m3i_fast.pipelines.graph.reader import Shuffle, training_graph

        cfg = self.cfg
        shuffle = Shuffle(seed=_derived_seed(cfg.seed, "tars"), initial_fill=cfg.initial_fill)
        source = _source(
            Path() if for_digest else cfg.path,
            self._split,
            self.manifest,
            on_gpu=self.device_id is not None,
            shuffle=shuffle,
            shard_id=self.shard_id,
            num_shards=self.num_shards,
            hw_decoder_load=cfg.hw_decoder_load,
            alternates=cfg.alternates and cfg.global_views.count > 1,
        )
        return training_graph(
            source,
            cfg.global_views,
            cfg.local_views,
            batch_size=cfg.batch_size,
            num_threads=1 if for_digest else cfg.num_threads,
            prefetch_queue_depth=1 if for_digest else cfg.prefetch,
            device_id=None if for_digest else self.device_id,
            seed=_derived_seed(cfg.seed, "rank", self.shard_id),
            checkpoint=checkpoint,
        )

    def _make_fingerprint(self) -> Fingerprint:
        from m3i_fast.pipelines.graph.dali import __version__, graph_digest

        return Fingerprint(
            dali_version=__version__,
            device="cpu" if self.device_id is None else "gpu",
            dataset=self.manifest.digest,
            split=self.cfg.split,
            batch_size=self.cfg.batch_size,
            shard_id=self.shard_id,
            num_shards=self.num_shards,
            seed=self.cfg.seed,
            graph=graph_digest(lambda: self._build(None, for_digest=True)),
        )


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
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Batch]:
    """Iterate once over a split in order, without augmentation: one global view, the centre square.

    Batches have the first of several captions; the last batch may be smaller. With
    representatives_only they hold one sample a group (sample_id == group_id), so that they vary in
    size and may be empty. Raises as `open_split`, and ValueError for a size below 1.
    """
    for name, value in (("image_size", image_size), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    origin = _open(
        path,
        split,
        max_pixels=max_pixels,
        device_id=device_id,
        fingerprint=tokenizer_fingerprint,
    )
    from m3i_fast.pipelines.graph.reader import evaluation_graph

    num_samples = origin.split.num_samples
    source = _source(
        path, origin.split, origin.manifest, on_gpu=device_id is not None, shuffle=None
    )
    pipeline = evaluation_graph(
        source, image_size, batch_size=batch_size, num_threads=num_threads, device_id=device_id
    )

    def batches() -> Iterator[Batch]:
        for start in range(0, num_samples, batch_size):
            tensors = run(pipeline, origin)
            position = torch.arange(start, min(start + batch_size, num_samples))
            tensors = tuple(t[: len(position)] for t in tensors)
            if representatives_only:
                first = tensors[-1] == tensors[-2]
                tensors, position = tuple(t[first] for t in tensors), position[first]
            yield to_batch(tensors, 1, origin, None, position)

    return batches()


def _open(
    path: Path,
    split: str,
    *,
    max_pixels: int,
    device_id: int | None,
    fingerprint: str | None,
    shard_id: int = 0,
    num_shards: int = 1,
) -> Origin:
    """Open a split for batches on a device."""
    manifest, split_info = open_split(
        path,
        split,
        max_pixels=max_pixels,
        fingerprint=fingerprint,
        shard_id=shard_id,
        num_shards=num_shards,
    )
    return Origin(
        path=path, split=split_info, manifest=manifest, max_pixels=max_pixels, device_id=device_id
    )


def _source(
    path: Path,
    split: SplitInfo,
    manifest: Manifest,
    *,
    on_gpu: bool,
    shuffle: Shuffle | None,
    shard_id: int = 0,
    num_shards: int = 1,
    hw_decoder_load: float | None = None,
    alternates: bool = False,
) -> Source:
    from m3i_fast.pipelines.graph.reader import Source

    return Source(
        paths=tuple(str(path / shard.file) for shard in split.shards),
        index_paths=tuple(str(path / shard.index_file) for shard in split.shards),
        shard_id=shard_id,
        num_shards=num_shards,
        context_length=manifest.tokenizer.context_length,
        max_captions=split.max_captions,
        max_alternates=split.max_alternates if alternates else 0,
        on_gpu=on_gpu,
        shuffle=shuffle,
        hw_decoder_load=hw_decoder_load,
    )


def _derived_seed(*key: object) -> int:
    """Hash a key to 31 bits, so that neighbouring seeds and ranks give independent draws."""
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1
