"""Gradients of several batches added up: the step of one batch with all of their rows, in fp64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from m3i_fast.config import TrainConfig
from m3i_fast.config.balance import BalanceConfig
from m3i_fast.config.parallel import ParallelConfig
from m3i_fast.engine.checkpoint.checkpoints import latest, tensors_of
from m3i_fast.engine.trainer import Trainer
from m3i_fast.objectives.mixing import Mix
from m3i_fast.observe.metrics import read_jsonl
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.loader import Loader
from m3i_fast.recipes import demo, demo_method, shrink
from tests.engine.parallel.parallel_work import _double, _in_dtype, own_mix
from tests.shared.engine.replaced_step import replace_call
from tests.shared.engine.small_run import TEXT
from tests.shared.engine.two_ranks import full
from tests.shared.ranks import joined, part

STEPS = 3
ACCUMULATE = 2
NUM_RANKS = 2
SHARDS = (1, -1)


def _config(dataset: Path, cfg: TrainConfig) -> TrainConfig:
    """Eight pictures a step, all of them asked."""
    cfg = shrink(cfg, path=dataset, num_classes=9, text=TEXT)
    mixing = replace(cfg.objective.mixing, dense_fraction=1.0)
    return replace(
        cfg,
        num_steps=STEPS,
        num_threads=1,
        checkpoint_every=STEPS,
        data=replace(cfg.data, batch_size=8),
        optim=replace(cfg.optim, matrices="adamw", clip_grad_norm=0.1),
        objective=replace(cfg.objective, mixing=mixing),
    )


def _without_the_batch(dataset: Path) -> TrainConfig:
    """M3I's dense terms with stop-gradient alone, and its category; weights are learnt."""
    cfg = _config(dataset, demo())
    terms = []
    for term in cfg.objective.active_terms:
        if term.target == "features":
            terms.append(replace(term, regulariser="stop_gradient"))
        elif term.target == "category":
            terms.append(term)
    balance = BalanceConfig(mode="uncertainty")
    return replace(cfg, objective=replace(cfg.objective, terms=tuple(terms), balance=balance))


def _cases(dataset: Path) -> dict[str, TrainConfig]:
    return {
        "m3i": _without_the_batch(dataset),
        "mae": _config(dataset, demo_method("mae")),
    }


def _parts(cfg: TrainConfig, num_parts: int, **parallel: Any) -> TrainConfig:
    data = replace(cfg.data, batch_size=cfg.data.batch_size // num_parts)
    return replace(cfg, data=data, parallel=ParallelConfig(**parallel))


def _train(
    cfg: TrainConfig, whole: TrainConfig, out: Path, *, rank: int, num_parts: int
) -> dict[str, Tensor]:
    """Losses and what is saved, after steps on parts of the whole's batches.

    Part k of the rank r is part k * ranks + r of the whole batch; one process has all.
    """
    with _double():
        loader, trainer = Loader(whole.data), Trainer(cfg, out)
        count = cfg.parallel.accumulate
        ranks = num_parts // count if num_parts > 1 else 1
        mine = [k * ranks + rank for k in range(count)] if num_parts > 1 else []
        found: dict[str, Tensor] = {}
        for step in range(STEPS):
            batch = _in_dtype(next(loader), True)
            batch = replace(batch, label=batch.sample_id % 9)  # as many members in each part
            mixes = [own_mix(trainer, i, part(batch, i, 4)) for i in range(4)]
            mixes = [_join(mixes, i, num_parts) for i in range(num_parts)]
            batches = [part(batch, i, num_parts) for i in mine] if mine else [batch]
            given = iter([mixes[i] for i in mine] if mine else mixes)
            trainer.train_step.draw_mix = lambda *_, given=given: next(given)  # type: ignore[method-assign,misc]
            metrics = trainer.train_step(*batches)
            found[f"loss {step}"] = trainer.world.mean(metrics["loss/total"].clone())
            found[f"norm {step}"] = metrics["optim/grad_norm"].clone()
            for name, value in metrics.items():
                if name.startswith("members/"):
                    found[f"{name} {step}"] = trainer.world.mean(value.clone()) * trainer.world.size
        tensors = tensors_of(trainer.objective, trainer.optimizer)
        found |= {name: full(tensor) for name, tensor in tensors.items()}
        trainer.loader.close()
        loader.close()
        trainer.run.close()
    return found


def _join(quarters: list[Mix], index: int, num_parts: int) -> Mix:
    size = len(quarters) // num_parts
    return joined(quarters[index * size : (index + 1) * size])


def _assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if name.startswith("members/category"):
            continue  # in a process group those of all ranks, on each
        torch.testing.assert_close(
            ours[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", ["m3i", "mae"])
def test_a_step_of_two_batches_is_that_of_one_with_both(
    name: str, dataset: Path, tmp_path: Path
) -> None:
    whole = _cases(dataset)[name]
    expected = _train(whole, whole, tmp_path / "whole", rank=0, num_parts=1)
    cfg = _parts(whole, ACCUMULATE, accumulate=ACCUMULATE)
    found = _train(cfg, whole, tmp_path / "parts", rank=0, num_parts=ACCUMULATE)
    assert {k for k in found if k.startswith("members/")}
    assert all(torch.equal(found[k], v) for k, v in expected.items() if k.startswith("members/"))
    _assert_close(found, expected)


def _work(rank: int, cfg: TrainConfig, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    num_parts = NUM_RANKS * ACCUMULATE
    for shard in SHARDS:
        mine = _parts(cfg, num_parts, shard=shard, accumulate=ACCUMULATE)
        found = _train(mine, cfg, folder / f"run{shard}", rank=rank, num_parts=num_parts)
        torch.save(found, folder / f"{shard}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("accumulated")
    cfg = _cases(dataset)["m3i"]
    torch.save(_train(cfg, cfg, folder / "whole", rank=0, num_parts=1), folder / "whole.pt")
    mp.start_processes(_work, (cfg, folder), nprocs=NUM_RANKS, start_method="fork")
    return folder


@pytest.mark.parametrize("shard", SHARDS)
def test_ranks_reduce_what_they_have_added_up(shard: int, of_ranks: Path) -> None:
    expected = torch.load(of_ranks / "whole.pt", weights_only=True)
    for rank in range(NUM_RANKS):
        found = torch.load(of_ranks / f"{shard}-{rank}.pt", weights_only=True)
        _assert_close(found, expected)


def test_a_run_reads_all_batches_and_mixes_each_its_own_way(dataset: Path, tmp_path: Path) -> None:
    whole = _without_the_batch(dataset)
    cfg = replace(_parts(whole, 2, accumulate=2), log_every=1)
    trainer = Trainer(cfg, tmp_path / "run")
    seen, step = list[list[int]](), trainer.train_step.__call__
    mixes, draw = list[Tensor](), trainer.train_step.draw_mix

    def noted(*batches: Batch, monitor: bool = False) -> dict[str, Tensor]:
        seen.extend(batch.sample_id.tolist() for batch in batches)
        return step(*batches, monitor=monitor)

    def drawn(batch: Batch, index: int = 0) -> Mix:
        mix = draw(batch, index)
        mixes.append(mix.token_priority)
        return mix

    replace_call(trainer, noted)
    trainer.train_step.draw_mix = drawn  # type: ignore[method-assign]
    trainer.train()
    loader = Loader(cfg.data)
    assert seen == [next(loader).sample_id.tolist() for _ in range(2 * STEPS)]
    loader.close()
    assert len(mixes) == 2 * STEPS
    assert not any(torch.equal(mixes[i], mixes[j]) for i in range(len(mixes)) for j in range(i))
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert all({"monitor/target_rank", "gradient/intra"} <= row.keys() for row in rows)
    assert latest(tmp_path / "run" / "checkpoints").step == STEPS
    with pytest.raises(
        ValueError, match=r"expected 8, .*batch of 8 .*--parallel.accumulate 2, got 4"
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
        cfg = _config(dataset, demo_method(name))
    with pytest.raises(ValueError, match=rf"accumulate: expected 1 with.*{word}.*parallel.chunk"):
        Trainer(_parts(cfg, 2, accumulate=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="parallel.accumulate: expected 1 to 65536, got 0"):
        ParallelConfig(accumulate=0)
