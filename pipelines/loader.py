"""`Loader`, the training iterator with exact resume, and the ordered pass for evaluation."""

from __future__ import annotations

import logging
import shlex
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from m3i_fast.config.data import MAX_PIXELS, BackendName, LoaderConfig, ViewConfig
from m3i_fast.ops.views import view_specs
from m3i_fast.pipelines.backends import start_backend
from m3i_fast.pipelines.batch import Batch, copy_to_device
from m3i_fast.pipelines.batch_rows import TrainingRows, good_rows, ordered_rows
from m3i_fast.pipelines.dataset.manifest import Manifest
from m3i_fast.pipelines.dataset.sample_table import SampleTable
from m3i_fast.pipelines.make_batch import cuts_alternates, to_batch
from m3i_fast.pipelines.opened.mixed_table import MixedTable
from m3i_fast.pipelines.opened.mixture import MixedData
from m3i_fast.pipelines.opened.open_data import OpenSplit, open_data
from m3i_fast.pipelines.sample_order.positions import Layout, StepLayout
from m3i_fast.pipelines.samples_to_views import (
    Backend,
    MadeBatch,
    PatchSides,
    SampleError,
    SampleWork,
)
from m3i_fast.pipelines.skipped_samples import SkippedSamples
from m3i_fast.pipelines.storage.objects import place_of
from m3i_fast.pipelines.storage.shards import BucketReads
from m3i_fast.pipelines.text_captions import caption_member, with_captions
from m3i_fast.pipelines.threads import place_loader

__all__ = ["Loader", "LoaderConfig", "ViewConfig", "evaluation_batches"]

STATE_VERSION = 2

logger = logging.getLogger(__name__)


AnyBatch = TypeVar("AnyBatch")


class Features(Protocol):
    """What an encoder gave of every row of a table, kept somewhere."""

    def take(self, rows: NDArray[np.int64], /) -> torch.Tensor:  # [B] -> [B, N, C]
        """Read the tokens of rows, on the CPU."""


class BatchesOfRun(ABC, Generic[AnyBatch]):
    """An endless iterator over batches of one rank, which resumes exactly.

    The samples of a run stand in one order, whatever the ranks, batches, threads and backend; which
    of them a step takes the layout says. Raises as `Loader`.
    """

    def __init__(
        self,
        cfg: LoaderConfig,
        layout: Layout,
        *,
        rank: int,
        num_ranks: int,
        device_id: int | None,
        skipped_file: Path | None,
        opened: OpenSplit | None,
    ) -> None:
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank: expected 0 to {num_ranks - 1}, got {rank}")
        if device_id is None and cfg.hw_decoder_load is not None:
            raise ValueError(
                "data.hw_decoder_load: expected None without a GPU, since it sets the load of a "
                f"GPU's decoder, got {cfg.hw_decoder_load}"
            )
        self.cfg = cfg
        self._rank, self._device_id, self._layout = rank, device_id, layout
        self.placement = place_loader(cfg.affinity, cfg.num_threads, device_id)
        """Where the loader's threads run, and why."""
        self._open = opened or open_data(
            cfg,
            rank=rank,
            num_ranks=num_ranks,
            images_per_input=layout.images_per_input,
            cores=self.placement.cores,
        )
        self.manifest = self._open.manifest
        self._start = 0  # position at which the step begins of which the next batch is
        self._batches = 0  # of this step that this rank has taken
        self._skipped = SkippedSamples(skipped_file, rank)
        self._rows: TrainingRows | None = None
        self._backend: Backend | None = None

    @property
    def described(self) -> Manifest | MixedData:
        """Return what is known of the data, as `mixture.read_described` reads it."""
        return self._open.described

    @property
    def samples(self) -> int:
        """Return how many samples all ranks have taken, of whole steps."""
        return self._start

    def bucket_reads(self) -> BucketReads | None:
        """Return what this rank has read from object storage so far; None for local data."""
        return self._open.shards.reads()

    def __iter__(self) -> Iterator[AnyBatch]:
        return self

    def __next__(self) -> AnyBatch:
        """Return the next batch.

        A sample that cannot be used is replaced by another one, alike on any ranks, and named in a
        warning and in `skipped_file`. Raises RuntimeError, which names it, with `data.strict`, and
        where there are more than `data.max_skipped`.
        """
        while True:
            try:
                if self._backend is None:
                    self._rows, self._backend = self._begin()
                made = next(self._backend)
                batch = self._to_batch(made)
                self._batches += 1
                if self._batches == self._layout.accumulate:
                    self._start, self._batches = self._layout.next_start(self._start), 0
                return batch
            except SampleError as error:
                self._stop_backend()
                self._skip(error)
            except BaseException:  # the backend is past this batch, where the next call begins
                self.close()
                raise

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last whole step, for JSON: alike on all ranks."""
        return {**self._identity(), "samples": self.samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly from the state of any rank, whatever the ranks and batches were.

        Raises ValueError with expected and got where it is not a state of this data and seed.
        """
        if (version := state.get("version")) != STATE_VERSION:
            raise ValueError(f"loader state: expected version {STATE_VERSION}, got {version!r}")
        samples, images = state.get("samples"), self._layout.images_per_input
        if type(samples) is not int or samples < 0 or samples % images:
            raise ValueError(
                f"loader state: expected samples, a multiple of {images}, got {samples!r}"
            )
        differing = [
            f"{key}: expected {state.get(key)!r}, got {value!r}"
            for key, value in self._identity().items()
            if state.get(key) != value
        ]
        if differing:
            raise ValueError("loader state of another run: " + "; ".join(differing))
        self._stop_backend()
        self._skipped.read()
        self._start, self._batches = samples, 0

    def close(self) -> None:
        """Stop all threads and release the cached files of a bucket.

        Another `next` starts them again at the same position.
        """
        with closing(self._open.shards):  # though Ctrl-C ends the wait for threads
            self._stop_backend()

    def _stop_backend(self) -> None:
        """Stop the backend's threads; what was fetched from a bucket stays."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()
            self._open.shards.expect_no_more()

    def _identity(self) -> dict[str, Any]:
        """Return everything that decides which sample stands at which position."""
        return {
            "version": STATE_VERSION,
            "seed": self.cfg.seed,
            "dataset": self._open.digest,
            "split": self.cfg.split,
            "order": self._open.order_identity(self._layout.images_per_input),
        }

    def _begin(self) -> tuple[TrainingRows, Backend]:
        ahead = -(-self.cfg.fetch_ahead // self.cfg.batch_size) if self._open.lanes else 0
        rows = TrainingRows(
            self._open.table,
            self._open.shards,
            self._layout,
            rank=self._rank,
            seed=self.cfg.seed,
            start=self._start,
            order=self._open.order(self.cfg.seed, self._layout.images_per_input),
            first_batch=self._batches,
            skipped=frozenset(self._skipped.known),
            batches_ahead=ahead,
        )
        backend = start_backend(self.cfg.backend, rows, self._work)
        return rows, with_captions(backend, self.manifest, self.placement.cores)

    @cached_property
    def _work(self) -> SampleWork:
        cfg = self.cfg
        return SampleWork(
            views=view_specs(cfg.global_views, cfg.local_views),
            centre=not cfg.augment,
            seed=cfg.seed,
            tokenizer=self.manifest.tokenizer,
            max_pixels=cfg.max_pixels,
            caption_member=caption_member(self.manifest),
            alternates=cuts_alternates(cfg, self._open),
            batch_size=self._layout.most_samples,
            num_threads=cfg.num_threads,
            cores=self.placement.cores,
            prefetch=cfg.prefetch,
            device_id=self._device_id,
            hw_decoder_load=cfg.decoder_load,
            sides=self._sides,
        )

    @property
    def _sides(self) -> PatchSides | None:
        """Return how large views of any size are; None where they are squares."""
        return None

    @abstractmethod
    def _to_batch(self, made: MadeBatch) -> AnyBatch:
        """Make a batch of what a backend made; raises SampleError as `expect_allowed`."""

    def _skip(self, error: SampleError) -> None:
        """Take note of a sample that cannot be used; raises where it ends the run."""
        assert self._rows is not None
        sample = int(self._rows.samples_at(np.array([error.position]))[0])
        command = f"m3i-fast data verify --decode {self._place_of(sample)}"
        if self.cfg.strict:
            raise RuntimeError(f"{error}; check the files with: {command}") from error
        if sample in self._skipped.known:
            raise RuntimeError(f"{error}, although it was replaced") from error
        self._skipped.add(sample, error)
        if self._skipped.count > self.cfg.max_skipped:
            raise RuntimeError(
                f"data.max_skipped: expected at most {self.cfg.max_skipped} samples that cannot be "
                f"used, got another: {error}; check the files with: {command}"
            ) from error
        logger.warning("SKIPPED, another sample takes its place: %s", error)

    def _place_of(self, sample: int) -> str:
        """Return where the data set of a sample, a row of the table, lies, quoted for a shell."""
        table, path = self._open.table, self.cfg.path
        if isinstance(table, MixedTable):
            ((dataset,), _) = table.mixed.split_rows(np.array([sample]))
            path = table.mixed.parts[dataset].path
        return shlex.quote(place_of(path))


class Loader(BatchesOfRun[Batch]):
    """An endless iterator over training batches of one rank, which resumes exactly.

    The samples of a run stand in one order, whatever the ranks, batches, threads and backend; a
    step takes the next `batch_size * num_ranks * accumulate` of them, `images_per_input` neighbours
    an input (`StepLayout`). Its batches are equal for both backends on a CPU; on a GPU DALI decodes
    with another library, to other pixels. The model has to match the manifest:
    `manifest.tokenizer`, `manifest.class_names`. With a `device_id` that GPU decodes and holds the
    batches.

    Raises ValueError or FileNotFoundError as `open_split`, ValueError where the split is smaller
    than the batches of all ranks, or for a rank or data.hw_decoder_load out of range, and
    ImportError as `start_backend`.
    """

    def __init__(
        self,
        cfg: LoaderConfig,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        accumulate: int = 1,
        images_per_input: int = 1,
        device_id: int | None = None,
        skipped_file: Path | None = None,
        opened: OpenSplit | None = None,
    ) -> None:
        """skipped_file: JSON lines of samples that cannot be used (`SkippedSamples`).

        opened: the data that `cfg` names, where they are open already.
        """
        self._steps = StepLayout(
            batch_size=cfg.batch_size,
            num_ranks=num_ranks,
            accumulate=accumulate,
            images_per_input=images_per_input,
        )
        super().__init__(
            cfg,
            self._steps,
            rank=rank,
            num_ranks=num_ranks,
            device_id=device_id,
            skipped_file=skipped_file,
            opened=opened,
        )
        self.features: Mapping[str, Features] = {}
        """What frozen encoders gave of every row of the table, which each batch is given its part
        of, by `Batch.features`."""
        self._expect_batch_size()

    @property
    def steps_per_epoch(self) -> int:
        """Return the whole steps in one pass over the split."""
        return len(self._open.table) // self._steps.samples_a_step

    def _expect_batch_size(self) -> None:
        """Raise ValueError where the data are fewer than the batches of all ranks."""
        layout, got = self._steps, self.cfg.batch_size
        num_samples, num_ranks = len(self._open.table), layout.num_ranks
        if got * num_ranks <= num_samples:
            return
        parts = self.cfg.mixture_parts or (self.cfg,)
        of = " and ".join(f"split {part.split} of {place_of(part.path)}" for part in parts)
        most = num_samples // num_ranks // layout.images_per_input * layout.images_per_input
        advice = (
            f"add --data.batch-size {most}"
            if most
            else f"pack at least {num_ranks * layout.images_per_input} pictures"
        )
        raise ValueError(
            f"data.batch_size: expected at most {most} ({of} has {num_samples} samples for "
            f"{num_ranks} {'ranks' if num_ranks > 1 else 'rank'}), got {got}: {advice}"
        )

    def _to_batch(self, made: MadeBatch) -> Batch:
        batch = to_batch(made, self._open, self.cfg, self.cfg.global_views.count, self._device_id)
        if not self.features:
            return batch
        of_rows = {name: stored.take(made.rows.samples) for name, stored in self.features.items()}
        device = batch.sample_id.device
        moved = {name: copy_to_device(tokens, device) for name, tokens in of_rows.items()}
        return replace(batch, features=moved)

    @property
    def num_rows(self) -> int:
        """Return how many rows the table of samples has, bad ones among them."""
        return len(self._open.table)

    @property
    def digest(self) -> str:
        """Return the digest of the data set."""
        return self._open.digest

    def fixed_views(self, rows: NDArray[np.int64]) -> Generator[Batch, None, None]:
        """Iterate once over rows of the table, with the global view that each has at every step.

        Rows that the table marks as bad are left out; a batch's `position` is the row of each
        sample. To be called before the first batch. Raises ValueError with `data.augment`, and
        RuntimeError naming a corrupt sample, whose cause is a SampleError.
        """
        if self.cfg.augment:
            raise ValueError("data.augment: expected False for views that are fixed, got True")
        table = self._open.table
        assert isinstance(table, SampleTable)  # one data set
        view = replace(self.cfg.global_views, count=1)
        work = replace(self._work, views=view_specs(view), batch_size=self.cfg.batch_size)
        good = np.intersect1d(good_rows(table, representatives_only=False), rows)
        ordered = ordered_rows(
            table,
            self._open.shards,
            self.cfg.batch_size,
            representatives_only=False,
            fetch_ahead=self.cfg.fetch_ahead,
            rows=good,
        )
        if not len(good):
            return
        made = with_captions(start_backend(self.cfg.backend, ordered, work), self.manifest)
        try:
            for _ in range(0, len(good), self.cfg.batch_size):
                yield to_batch(next(made), self._open, self.cfg, 1, self._device_id)
        except SampleError as error:
            raise _with_command(error, self.cfg.path) from error
        finally:
            made.close()
            self._open.shards.expect_no_more()


def evaluation_batches(
    path: Path,
    split: str,
    *,
    image_size: int,
    batch_size: int,
    representatives_only: bool = False,
    num_threads: int = 1,
    device_id: int | None = None,
    max_pixels: int = MAX_PIXELS,
    backend: BackendName = "auto",
    bucket_fields_of: LoaderConfig | None = None,
    rows: NDArray[np.int64] | None = None,
) -> Generator[Batch, None, None]:
    """Iterate once over a split in order, without augmentation: one global view, the centre square.

    Batches have the first of several captions; the last batch may be smaller. With
    representatives_only they hold one sample a group (sample_id == group_id). bucket_fields_of: a
    config of which the cache and the limits are taken where `path` is a URL; None: the defaults.
    rows: rows of the split's table to read in their place, in this order; a batch's `position` is
    the row of each sample.
    Raises as `open_data`, ValueError for a size below 1, and RuntimeError naming a corrupt sample,
    whose cause is a SampleError.
    """
    for name, value in (("image_size", image_size), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    cfg = LoaderConfig(
        path=path,
        split=split,
        max_pixels=max_pixels,
        batch_size=batch_size,
        lanes=1,  # clumps come in their order, one after the other
    )
    if bucket_fields_of is not None:
        cfg = cfg.with_bucket_fields_of(bucket_fields_of)
    opened = open_data(cfg)
    assert isinstance(opened.table, SampleTable)  # one data set
    work = SampleWork(
        views=view_specs(ViewConfig(count=1, size=image_size)),
        centre=True,
        seed=0,
        tokenizer=opened.manifest.tokenizer,
        max_pixels=max_pixels,
        caption_member=caption_member(opened.manifest),
        alternates=False,
        batch_size=batch_size,
        num_threads=num_threads,
        prefetch=cfg.prefetch,
        device_id=device_id,
        hw_decoder_load=None,
    )
    ordered = ordered_rows(
        opened.table,
        opened.shards,
        batch_size,
        representatives_only=representatives_only,
        fetch_ahead=cfg.fetch_ahead,
        rows=rows,
    )

    def batches() -> Generator[Batch, None, None]:
        made: Backend | None = None
        try:
            made = with_captions(start_backend(backend, ordered, work), opened.manifest)
            while True:
                try:
                    batch = to_batch(next(made), opened, cfg, 1, device_id)
                except StopIteration:
                    return
                except SampleError as error:
                    raise _with_command(error, path) from error
                yield batch
        finally:
            if made is not None:
                made.close()
            opened.shards.close()

    return batches()


def _with_command(error: SampleError, path: Path) -> RuntimeError:
    """Return the error of a corrupt sample, with the command that reads all of its data set."""
    command = f"m3i-fast data verify --decode {shlex.quote(place_of(path))}"
    return RuntimeError(f"{error}; check the files with: {command}")
