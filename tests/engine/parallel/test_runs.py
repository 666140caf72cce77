"""Runs of two ranks: stopped by one of them, resumed bit for bit, or by one process."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m3i_fast.config.objective.balance import BalanceConfig
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.observe.metrics import read_jsonl
from tests.engine.parallel.run_work import SHARDS, Watched, work
from tests.shared.engine.two_ranks import NUM_RANKS, NUM_STEPS, run_of_adamw, spread
from tests.shared.ranks import start_ranks


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    cfg = run_of_adamw(dataset)
    for shard in SHARDS:  # runs of one process that stopped after four steps
        run = Watched(cfg, folder / f"alone-{shard}")
        torch.save(run.train(stop_at=4), folder / f"alone-{shard}.pt")
    start_ranks(work, (cfg, folder), NUM_RANKS)
    return folder


def _of(runs: Path, name: str, shard: int) -> list[dict[str, Tensor]]:
    files = [runs / f"{name}-{shard}-{rank}.pt" for rank in range(NUM_RANKS)]
    return [torch.load(file, weights_only=True) for file in files]


def _assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("shard", SHARDS)
def test_one_rank_stops_all_and_a_resume_equals_the_whole_run(shard: int, runs: Path) -> None:
    """Weights, moments, averages, samples and the log."""
    for whole, first, second in zip(
        *(_of(runs, name, shard) for name in ("whole", "first", "second")), strict=True
    ):
        assert 4 < len(first["samples"]) < NUM_STEPS
        second["samples"] = torch.cat([first["samples"], second["samples"]])
        _assert_equal(second, whole)
    assert len({len(first["samples"]) for first in _of(runs, "first", shard)}) == 1
    rows = [read_jsonl(runs / f"{name}-{shard}" / "metrics.jsonl") for name in ("whole", "part")]
    losses = [[(row["step"], row["loss/total"], row["members/caption"]) for row in r] for r in rows]
    assert losses[0] == losses[1] and len(losses[0]) == NUM_STEPS


@pytest.mark.parametrize("shard", SHARDS)
def test_ranks_see_different_samples(shard: int, runs: Path) -> None:
    a, b = (found["samples"] for found in _of(runs, "whole", shard))
    assert a.shape == b.shape == (NUM_STEPS, 4)
    first = 6  # steps, of an epoch of seven
    assert set(a[:first].flatten().tolist()).isdisjoint(b[:first].flatten().tolist())


@pytest.mark.parametrize("shard", SHARDS)
def test_one_process_becomes_two(shard: int, runs: Path) -> None:
    alone = torch.load(runs / f"alone-{shard}.pt", weights_only=True)
    del alone["samples"]
    for found in _of(runs, "of one", shard):
        _assert_equal(found, alone)
    assert checkpoint.latest(runs / f"alone-{shard}" / "checkpoints").step == NUM_STEPS


@pytest.mark.parametrize("shard", SHARDS)
def test_two_ranks_become_one(
    shard: int, runs: Path, dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    [whole, _] = _of(runs, "whole", shard)
    del whole["samples"]
    with caplog.at_level(logging.INFO):
        run = Watched(run_of_adamw(dataset), runs / f"whole-{shard}", resume=True)
    _assert_equal(run.state(), whole)
    assert run.trainer.step == NUM_STEPS
    assert run.trainer.loader.samples == run.trainer.train_step.samples_taken == NUM_STEPS * 8
    assert (
        "1 rank x 8 in place of 2 ranks x 4, from step 10 on: a step takes the same 8 samples"
        in caplog.text
    )
    assert "1 rank(s) go on with what 2 saved: the means of metrics" in caplog.text
    run.trainer.run.close()


def test_what_cannot_be_dealt_out_is_refused(dataset: Path) -> None:
    from m3i_fast.engine.parallel.ranks import World

    world = World(torch.device("cpu"), rank=0, size=3)
    cfg = run_of_adamw(dataset)
    with pytest.raises(ValueError, match="parallel.shard: expected a divisor of the 3 ranks"):
        world.mesh(spread(cfg, 2).parallel)
    with pytest.raises(ValueError, match=r"optim\.matrices: .* got muon and shard = -1"):
        spread(replace(cfg, optim=replace(cfg.optim, matrices="muon")), -1)
    balance = BalanceConfig(mode="gradient_norm")
    with pytest.raises(ValueError, match=r"objective\.balance\.mode: .* and shard = 2"):
        spread(replace(cfg, objective=replace(cfg.objective, balance=balance)), 2)
