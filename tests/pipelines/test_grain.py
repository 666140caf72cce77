"""Grain beside ours: epochs that are covers, and resumes that go on with the same samples.

Two loaders that share no code give the oracle of both claims: on the same data, stopped at the same
places, each has to give what it would have given. Their orders differ, since each has its own
permutation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.pipelines.loader import Loader

grain = pytest.importorskip("grain", reason="Grain needs Python 3.11")

SIZE, STEP, STEPS = 50, 10, 5  # samples of `fifty`, samples and steps of an epoch
IDS = list(range(SIZE))


class OursOnRanks:
    """The loaders of all ranks; a step is the ids that they take together."""

    def __init__(self, cfg: LoaderConfig, num_ranks: int, step: int = STEP) -> None:
        cfg = replace(
            cfg, batch_size=step // num_ranks, global_views=ViewConfig(size=8), local_views=None
        )
        self.ranks = [
            Loader(replace(cfg, backend="torch"), rank=r, num_ranks=num_ranks)
            for r in range(num_ranks)
        ]

    def step(self) -> list[int]:
        return sorted(i for loader in self.ranks for i in next(loader).sample_id.tolist())

    def state(self) -> list[Any]:
        return [loader.state_dict() for loader in self.ranks]

    def restore(self, states: list[Any]) -> None:
        for rank, loader in enumerate(self.ranks):
            loader.load_state_dict(states[rank % len(states)])


class GrainOnShards:
    """Grain's pipeline as its guide writes it: seeded, shuffled, repeated, sliced by the shards."""

    def __init__(self, _: LoaderConfig, num_ranks: int, step: int = STEP) -> None:
        whole = grain.MapDataset.source(IDS).seed(7).shuffle().repeat()
        self.ranks: list[Iterator[Any]] = [
            iter(
                whole[rank::num_ranks]
                .batch(step // num_ranks, drop_remainder=True)
                .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
            )
            for rank in range(num_ranks)
        ]

    def step(self) -> list[int]:
        return sorted(i for shard in self.ranks for i in next(shard).tolist())

    def state(self) -> list[Any]:
        return [shard.get_state() for shard in self.ranks]

    def restore(self, states: list[Any]) -> None:
        for rank, shard in enumerate(self.ranks):
            shard.set_state(states[rank % len(states)])


class ElasticGrain(GrainOnShards):
    """Grain's experimental iterator for another number of shards."""

    def __init__(self, _: LoaderConfig, num_ranks: int, step: int = STEP) -> None:
        whole = grain.MapDataset.source(IDS).seed(7).shuffle().repeat()
        self.ranks = [
            iter(
                grain.experimental.ElasticIterator(
                    whole,
                    step,
                    grain.sharding.ShardOptions(shard_index=rank, shard_count=num_ranks),
                    read_options=grain.ReadOptions(num_threads=1, prefetch_buffer_size=1),
                )
            )
            for rank in range(num_ranks)
        ]


ALL = [OursOnRanks, GrainOnShards, ElasticGrain]
Kind = type[OursOnRanks] | type[GrainOnShards]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_every_epoch_covers_all_samples_once(cfg: LoaderConfig, kind: Kind, num_ranks: int) -> None:
    loaders = kind(cfg, num_ranks)
    orders = []
    for _ in range(4):
        epoch = [loaders.step() for _ in range(STEPS)]
        assert sorted(sum(epoch, [])) == IDS
        orders.append(epoch)
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])  # shuffled anew


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("stopped", [0, 2, 5, 8])
def test_a_resume_gives_the_rest_of_the_stream(cfg: LoaderConfig, kind: Kind, stopped: int) -> None:
    """From a state that went through JSON: in an epoch, at its end, and past it."""
    whole = kind(cfg, 2)
    expected = [whole.step() for _ in range(stopped + 9)]
    first = kind(cfg, 2)
    for _ in range(stopped):
        first.step()
    states = json.loads(json.dumps(first.state()))
    resumed = kind(cfg, 2)
    resumed.restore(states)
    assert [resumed.step() for _ in range(9)] == expected[stopped:]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(("before", "after"), [(2, 5), (5, 1), (1, 2)])
def test_a_resume_on_other_ranks_gives_the_rest_of_the_stream(
    cfg: LoaderConfig, kind: Kind, before: int, after: int
) -> None:
    """Where all ranks together still take as many samples a step."""
    whole = kind(cfg, 1)
    expected = [whole.step() for _ in range(12)]
    first = kind(cfg, before)
    assert [first.step() for _ in range(3)] == expected[:3]
    resumed = kind(cfg, after)
    resumed.restore(json.loads(json.dumps(first.state())))
    assert [resumed.step() for _ in range(9)] == expected[3:]


@pytest.mark.parametrize("kind", ALL)
def test_another_whole_batch_in_an_epoch(cfg: LoaderConfig, kind: Kind) -> None:
    """Ours goes on at the sample. The state of Grain's plain iterator counts batches, whatever
    their size: samples come twice, as docs/start/data_at_scale.md says of it."""
    first = kind(cfg, 2)
    taken = sum((first.step() for _ in range(2)), [])
    resumed = kind(cfg, 1, step=5)
    resumed.restore(first.state())
    rest = sum((resumed.step() for _ in range((SIZE - 2 * STEP) // 5)), [])
    repeats = set(taken) & set(rest)
    if kind is GrainOnShards:
        assert len(repeats) == 2 * (STEP - 5)
    else:
        assert not repeats and sorted(taken + rest) == IDS
