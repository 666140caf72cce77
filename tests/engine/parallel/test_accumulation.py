"""Gradients of several batches added up: the step of one batch with all of their rows, in fp64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from m3i_fast.config import TrainConfig
from m3i_fast.config.objective.balance import BalanceConfig
from m3i_fast.config.parallel import ParallelConfig
from m3i_fast.engine.checkpoint.checkpoints import latest
from m3i_fast.engine.parallel.accumulation import merge_batch_metrics
from m3i_fast.engine.trainer import Trainer
from m3i_fast.objectives.mixing import Mix
from m3i_fast.observe.metrics import read_jsonl
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.loader import Loader
from m3i_fast.recipes import demo, demo_method
from tests.shared.engine.parts_of_batches import (
    NUM_STEPS,
    assert_close_states,
    in_parts,
    run_of_eight,
    train_in_parts,
)
from tests.shared.engine.replaced_step import replace_call

ACCUMULATE = 2
NUM_RANKS = 2
SHARDS = (1, -1)


def _without_the_batch(dataset: Path) -> TrainConfig:
    """M3I's dense terms with stop-gradient alone, and its category; weights are learnt."""
    cfg = run_of_eight(dataset, demo())
    terms = []
    for term in cfg.objective.active_terms:
        if term.target == "features":
            terms.append(replace(term, regulariser="stop_gradient"))
        elif term.target == "category":
            terms.append(term)
    balance = BalanceConfig(mode="uncertainty")
    return replace(cfg, objective=replace(cfg.objective, terms=tuple(terms), balance=balance))


def _cases(dataset: Path) -> dict[str, TrainConfig]:
    m3i = _without_the_batch(dataset)
    return {
        "m3i": m3i,
        "m3i of a frozen encoder": replace(m3i, optim=replace(m3i.optim, freeze_encoder=True)),
        "mae": run_of_eight(dataset, demo_method("mae")),
    }


@pytest.mark.parametrize("name", ["m3i", "m3i of a frozen encoder", "mae"])
def test_a_step_of_two_batches_is_that_of_one_with_both(
    name: str, dataset: Path, tmp_path: Path
) -> None:
    whole = _cases(dataset)[name]
    expected = train_in_parts(whole, whole, tmp_path / "whole", rank=0, num_parts=1)
    cfg = in_parts(whole, ACCUMULATE, accumulate=ACCUMULATE)
    found = train_in_parts(cfg, whole, tmp_path / "parts", rank=0, num_parts=ACCUMULATE)
    assert {k for k in found if k.startswith("members/")}
    assert all(torch.equal(found[k], v) for k, v in expected.items() if k.startswith("members/"))
    assert_close_states(found, expected)


def _work(rank: int, cfg: TrainConfig, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    num_parts = NUM_RANKS * ACCUMULATE
    for shard in SHARDS:
        mine = in_parts(cfg, num_parts, shard=shard, accumulate=ACCUMULATE)
        found = train_in_parts(mine, cfg, folder / f"run{shard}", rank=rank, num_parts=num_parts)
        torch.save(found, folder / f"{shard}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("accumulated")
    cfg = _cases(dataset)["m3i"]
    torch.save(train_in_parts(cfg, cfg, folder / "whole", rank=0, num_parts=1), folder / "whole.pt")
    mp.start_processes(_work, (cfg, folder), nprocs=NUM_RANKS, start_method="fork")
    return folder


@pytest.mark.parametrize("shard", SHARDS)
def test_ranks_reduce_what_they_have_added_up(shard: int, of_ranks: Path) -> None:
    expected = torch.load(of_ranks / "whole.pt", weights_only=True)
    for rank in range(NUM_RANKS):
        found = torch.load(of_ranks / f"{shard}-{rank}.pt", weights_only=True)
        assert_close_states(found, expected)


def test_a_run_reads_all_batches_and_mixes_each_its_own_way(dataset: Path, tmp_path: Path) -> None:
    whole = _without_the_batch(dataset)
    cfg = replace(in_parts(whole, 2, accumulate=2), log_every=1)
    trainer = Trainer(cfg, tmp_path / "run")
    seen, step = list[list[int]](), trainer.train_step.__call__
    mixes, draw = list[Tensor](), trainer.train_step.draw_mix

    def noted(*batches: Batch, monitor: bool = False) -> dict[str, Tensor]:
        seen.extend(batch.sample_id.tolist() for batch in batches)
        return step(*batches, monitor=monitor)

    def drawn(batch: Batch) -> Mix:
        mix = draw(batch)
        mixes.append(mix.token_priority)
        return mix

    replace_call(trainer, noted)
    trainer.train_step.draw_mix = drawn  # type: ignore[method-assign]
    trainer.train()
    loader = Loader(cfg.data)
    assert seen == [next(loader).sample_id.tolist() for _ in range(2 * NUM_STEPS)]
    loader.close()
    assert len(mixes) == 2 * NUM_STEPS
    assert not any(torch.equal(mixes[i], mixes[j]) for i in range(len(mixes)) for j in range(i))
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert all({"monitor/target_rank", "gradient/intra"} <= row.keys() for row in rows)
    assert latest(tmp_path / "run" / "checkpoints").step == NUM_STEPS
    with pytest.raises(
        ValueError,
        match=r"a step took 8 samples, 1 rank x 4 x 2 accumulated, and would take 4, 1 rank x 4: ",
    ):
        Trainer(replace(cfg, parallel=ParallelConfig()), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("m3i", "covariance"),
        ("members", "mean = members of the term 'category'"),
        ("by batch", "standardise = batch of the term 'intra'"),
        ("clip", "caption, boltzmann"),
        ("byol", "batch norm"),
        ("dino", "centring"),
        ("densecl", "queue"),
        ("balanced", "gradient_norm"),
    ],
)
def test_what_does_not_add_up_is_refused(
    name: str, word: str, dataset: Path, tmp_path: Path
) -> None:
    if name == "balanced":
        cfg = _without_the_batch(dataset)
        balance = BalanceConfig(mode="gradient_norm")
        cfg = replace(cfg, objective=replace(cfg.objective, balance=balance))
    elif name in ("members", "by batch"):
        cfg = _without_the_batch(dataset)
        terms = tuple(
            replace(t, standardise="batch")
            if t.is_dense and name == "by batch"
            else replace(t, mean="members" if not t.is_dense and name == "members" else "batch")
            for t in cfg.objective.terms
        )
        cfg = replace(cfg, objective=replace(cfg.objective, terms=terms))
    else:
        cfg = run_of_eight(dataset, demo_method(name))
    with pytest.raises(ValueError, match=rf"accumulate: expected 1 with.*{word}.*parallel.chunk"):
        Trainer(in_parts(cfg, 2, accumulate=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="parallel.accumulate: expected 1 to 65536, got 0"):
        ParallelConfig(accumulate=0)


def test_a_metric_that_some_batches_lack_is_the_mean_of_the_others() -> None:
    batches = [{"a": 1.0, "members/a": 1.0, "spread": 2.0}, {"a": 3.0, "members/a": 4.0}]
    merged = merge_batch_metrics(
        [{name: torch.tensor(value) for name, value in batch.items()} for batch in batches]
    )
    assert merged == {"a": 2.0, "members/a": 5.0, "spread": 2.0}
