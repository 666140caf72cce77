"""What others load the same shards with, a function each, and how each is left out by name.

Each yields batches without end, as lists of tensors in the order of `Batch`: global views, local
views, boxes, image_size, token_ids, num_tokens, label, sample_id, group_id. Processes or threads
are as many as our loader has threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from m3i_fast.benchmarks.loader.work import PILLOW, TENSORS, StoredSamples, Views, Work

PREFETCH_FACTOR = 2  # batches ahead of each process, DataLoader's default
EXTRA = "pip install 'm3i-fast[bench-data]'"
Batches = Iterator[list[Tensor]]


@dataclass(frozen=True, slots=True)
class Peer:
    """A loader that others wrote, and the package that it needs."""

    batches: Callable[[Work], Batches]
    package: str
    num_ahead: Callable[[Work], int]
    """Most batches that it holds ready."""
    reads_buckets: bool = True

    @property
    def absence(self) -> str:
        """Return why it is left out here; empty where it can run."""
        try:
            found = find_spec(self.package) is not None
        except ModuleNotFoundError:  # the package that this one is in
            found = False
        return "" if found else f"{self.package} is not installed: {EXTRA}"


def torchvision_pillow(work: Work) -> Batches:
    """Load by a DataLoader that reads samples by number, and torchvision on Pillow images."""
    return _data_loader(work, PILLOW)


def torchvision_tensors(work: Work) -> Batches:
    """Load by a DataLoader that reads samples by number, and torchvision on uint8 tensors."""
    return _data_loader(work, TENSORS)


def webdataset_tensors(work: Work) -> Batches:
    """Load by webdataset's shards in order, with its shuffle buffer, and torchvision on tensors.

    Raises ValueError where there are fewer shards than processes, which read whole ones.
    """
    import webdataset

    if len(work.shards) < work.num_threads:
        raise ValueError(
            f"--data.num-threads: expected at most {len(work.shards)}, the shards, since a process "
            f"of webdataset reads whole ones; got {work.num_threads}"
        )
    samples = (
        webdataset.WebDataset(_urls(work), shardshuffle=len(work.shards), seed=work.seed)
        .repeat()
        .shuffle(max(work.shuffle_buffer // work.num_threads, 1))
        .map(_views(work, TENSORS))
        .batched(work.batch_size, collation_fn=default_collate, partial=False)
    )
    loader = webdataset.WebLoader(
        samples,
        batch_size=None,
        num_workers=work.num_threads,
        prefetch_factor=PREFETCH_FACTOR,
        multiprocessing_context=_processes(),
    )
    return iter(loader)


def grain_tensors(work: Work) -> Batches:
    """Load by Grain's MapDataset in processes, and torchvision on tensors."""
    import grain

    dataset = (
        grain.MapDataset.source(StoredSamples(work.shards, work.address))
        .seed(work.seed)
        .shuffle()
        .repeat()
        .random_map(SeededViews(_views(work, TENSORS)))
        .batch(work.batch_size, drop_remainder=True)
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        .mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=work.num_threads, per_worker_buffer_size=PREFETCH_FACTOR
            )
        )
    )
    return ([torch.from_numpy(np.asarray(part)) for part in batch] for batch in dataset)


def spdl_tensors(work: Work) -> Batches:
    """Load by SPDL's pipeline of threads, and torchvision on tensors, which release Python."""
    from spdl.pipeline import PipelineBuilder

    stored, views = StoredSamples(work.shards, work.address), _views(work, TENSORS)
    pipeline = (
        PipelineBuilder()
        .add_source(iter(_Endless(len(stored), work.seed)))
        .pipe(lambda index: views(stored[index]), concurrency=work.num_threads)
        .aggregate(work.batch_size)
        .pipe(default_collate)
        .add_sink(work.prefetch)
        .build(num_threads=work.num_threads)
    )
    with pipeline.auto_stop():
        yield from pipeline


def dali_operators(work: Work) -> Batches:
    """Load by DALI alone, whose operators cut and colour each view."""
    from m3i_fast.benchmarks.loader import dali_operators as dali

    return dali.batches(work)


def _of_processes(work: Work) -> int:
    return PREFETCH_FACTOR * work.num_threads


PEERS: dict[str, Peer] = {
    "torchvision, Pillow": Peer(torchvision_pillow, "torchvision", _of_processes),
    "torchvision, tensors": Peer(torchvision_tensors, "torchvision", _of_processes),
    "webdataset": Peer(webdataset_tensors, "webdataset", _of_processes),
    # Seen to hand out seven at once for each process with buffers of two, and one of a stage.
    "Grain": Peer(grain_tensors, "grain", lambda work: 8 * work.num_threads),
    # Two in each of its three queues, and those in work.
    "SPDL": Peer(spdl_tensors, "spdl.pipeline", lambda work: 6 + work.prefetch),
    "DALI's operators": Peer(
        dali_operators, "nvidia.dali", lambda work: work.prefetch, reads_buckets=False
    ),
}


# ---- What several of them share ------------------------------------------------------------------


def _urls(work: Work) -> list[str]:
    """Return the shards as webdataset opens them: files, or what curl prints."""
    if work.address is None:
        return list(map(str, work.shards))
    return [f"pipe:curl -sSf {work.address}/{shard.name}" for shard in work.shards]


def _views(work: Work, kind: str) -> Views:
    return Views(work.views, kind, work.context_length)


@dataclass(frozen=True)
class SeededViews:
    """Views that Grain draws: by a random number generator of each sample, as arrays."""

    views: Views

    def random_map(self, sample: dict[str, bytes], rng: np.random.Generator) -> tuple[Any, ...]:
        torch.set_num_threads(1)  # a process each
        torch.manual_seed(int(rng.integers(2**63)))
        made = self.views(sample)
        return tuple(v.numpy() if isinstance(v, Tensor) else np.int64(v) for v in made)

    def __call__(self, sample: dict[str, bytes], rng: np.random.Generator) -> tuple[Any, ...]:
        return self.random_map(sample, rng)


@dataclass(frozen=True)
class _ByNumber(Dataset[Any]):
    stored: StoredSamples
    views: Views

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.views(self.stored[index])


class _Endless(Sampler[int]):
    """Every number once an epoch, in another order each."""

    def __init__(self, num_samples: int, seed: int) -> None:
        self._num_samples, self._seed = num_samples, seed

    def __iter__(self) -> Iterator[int]:
        rng = torch.Generator().manual_seed(self._seed)
        while True:
            yield from torch.randperm(self._num_samples, generator=rng).tolist()


def _data_loader(work: Work, kind: str) -> Batches:
    from torch.utils.data import DataLoader

    stored = StoredSamples(work.shards, work.address)
    loader: DataLoader[Any] = DataLoader(
        _ByNumber(stored, _views(work, kind)),
        sampler=_Endless(len(stored), work.seed),
        batch_size=work.batch_size,
        num_workers=work.num_threads,
        prefetch_factor=PREFETCH_FACTOR,
        multiprocessing_context=_processes(),
    )
    return iter(loader)


def _processes() -> ForkServerContext:
    """Forks of a process without threads: our loader has some, which a fork of this one breaks."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torchvision.transforms.v2", "webdataset", __name__])
    return context
