"""Sharded checkpoints over gloo ranks: FSDP2's parts come back on any number of ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from m3i_fast.benchmarks.faults.failing_files import FaultyFiles, flip_byte
from m3i_fast.config.optim import OptimConfig
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.engine.checkpoint.saver import Saver
from m3i_fast.engine.optim.optimizers import Optimizers, build_optimizer
from tests.shared.engine.checkpoint_cases import (
    assert_equal,
    loaded,
    make_model,
    save,
    train,
    weights,
)
from tests.shared.ranks import start_ranks

SEED = 5


@contextmanager
def _group(rank: int, num_ranks: int, folder: Path) -> Iterator[None]:
    store = dist.FileStore(str(folder / f"store-{num_ranks}"), num_ranks)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=60)
    )
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _sharded(seed: int, num_steps: int, *mesh: int) -> tuple[nn.Module, Optimizers]:
    """Sizes 7, 5 and 2 over the ranks: parts of unequal size, and none."""
    names = ("replicas", "parts")[-len(mesh) :]
    model = fully_shard(make_model(seed), mesh=init_device_mesh("cpu", mesh, mesh_dim_names=names))
    optimizer = build_optimizer(OptimConfig(lr=1e-2), model)
    train(model, optimizer, num_steps)
    return model, optimizer


def _whole(model: nn.Module, optimizer: Optimizers) -> dict[str, Tensor]:
    found = weights(model, optimizer)
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in found.items()}


def _save_on_four(rank: int, folder: Path) -> None:
    with _group(rank, 4, folder):
        model, optimizer = _sharded(SEED, 3, 4)
        with Saver(folder / "four", keep=1, background=True) as saver:
            saver.save(step=7, model=model, optimizer=optimizer, state={"rank": rank})
            expected = _whole(model, optimizer)
            train(model, optimizer, 2)
        hybrid, its_optimizer = _sharded(SEED, 3, 2, 2)  # each part on two ranks, and saved once
        with Saver(folder / "hybrid", keep=1) as saver:
            saver.save(step=7, model=hybrid, optimizer=its_optimizer, state={"rank": rank})
        same = _whole(hybrid, its_optimizer)
        if rank == 0:
            torch.save(expected, folder / "expected.pt")
            torch.save(same, folder / "hybrid.pt")


def _load_on_two(rank: int, folder: Path) -> None:
    with _group(rank, 2, folder):
        expected = torch.load(folder / "expected.pt")
        for name, step in (("four", 7), ("one", 2)):  # what 4 ranks and what 1 rank saved
            model, optimizer = _sharded(SEED + 1, 0, 2)
            saved = checkpoint.latest(folder / name, dist.group.WORLD)
            saved.load_model(model)
            saved.load_optimizer(model, optimizer)
            assert saved.step == step
            moments = [optimizer.state[p] for p in model.parameters() if p.requires_grad]
            assert all(isinstance(moment["exp_avg"], DTensor) for moment in moments)
            if name == "four":
                assert_equal(_whole(model, optimizer), expected)
                assert saved.state() == {"rank": rank}
        _refused_on_all(rank, folder, model, optimizer)
        with Saver(folder / "two", keep=1) as saver:
            saver.save(step=9, model=model, optimizer=optimizer, state={"rank": rank})


def _refused_on_all(rank: int, folder: Path, model: nn.Module, optimizer: Optimizers) -> None:
    """No space on one rank alone, and a damaged checkpoint that one rank alone reads."""
    saver = Saver(folder / "one", keep=1)
    fail_at = 2 if rank == 1 else None
    with FaultyFiles(folder, fail_at=fail_at), pytest.raises(OSError, match="rank 1.*No space"):
        saver.save(step=3, model=model, optimizer=optimizer, state={})
    dist.barrier()
    assert sorted(os.listdir(folder / "one")) == ["latest", "step_00000002"]
    if rank == 0:
        flip_byte(folder / "one" / "step_00000002" / "state" / "00001-of-00001.json")
    with pytest.raises(ValueError, match=r"no good checkpoint .*state/00001"):
        checkpoint.latest(folder / "one", saver.group)


def _run(function: Callable[[int, Path], None], num_ranks: int, folder: Path) -> None:
    start_ranks(function, (folder,), num_ranks)


@pytest.mark.distributed
def test_ranks_change_between_save_and_load(tmp_path: Path) -> None:
    _run(_save_on_four, 4, tmp_path)
    save(tmp_path / "one", 2)
    one = loaded(checkpoint.latest(tmp_path / "one"))
    files = {p.name for p in (tmp_path / "four/step_00000007/model").iterdir()}
    assert len(files) > 1 and "00001-of-00004.safetensors" in files
    four = checkpoint.latest(tmp_path / "four")
    expected = torch.load(tmp_path / "expected.pt")
    assert_equal(loaded(four), expected)  # 4 to 1
    assert [four.state(rank) for rank in range(5)] == [{"rank": r} for r in (0, 1, 2, 3, 0)]
    hybrid = checkpoint.latest(tmp_path / "hybrid")
    assert_equal(loaded(hybrid), torch.load(tmp_path / "hybrid.pt"))
    sizes = [sum(f.stat().st_size for f in c.path.rglob("*.safetensors")) for c in (four, hybrid)]
    assert sizes[1] < 1.5 * sizes[0]
    _run(_load_on_two, 2, tmp_path)  # 4 to 2, 1 to 2
    assert_equal(loaded(checkpoint.latest(tmp_path / "two")), one)  # 2 to 1

    missing = four.path / "model" / "00002-of-00004.safetensors"
    missing.unlink()
    with pytest.raises(ValueError, match=r"00002-of-00004\.safetensors: missing"):
        checkpoint.latest(tmp_path / "four")


def _save_and_die(rank: int, folder: Path) -> None:
    """The second rank is killed in the middle of its part."""
    with _group(rank, 2, folder):
        model, optimizer = _sharded(SEED, 1, 2)
        kill_at = 1 if rank == 1 else None
        with Saver(folder / "run", keep=1) as saver, FaultyFiles(folder / "run", kill_at=kill_at):
            saver.save(step=3, model=model, optimizer=optimizer, state={})
        (folder / "went on").touch()


@pytest.mark.distributed
def test_a_rank_killed_in_a_save_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    save(tmp_path / "run", 2)
    with pytest.raises((mp.ProcessExitedException, mp.ProcessRaisedException)):
        _run(_save_and_die, 2, tmp_path)
    assert not (tmp_path / "went on").exists()
    assert [c.step for c in checkpoint.checkpoints(tmp_path / "run")] == [2]
    assert checkpoint.latest(tmp_path / "run").step == 2
    save(tmp_path / "run", 3)
    assert sorted(os.listdir(tmp_path / "run")) == ["latest", "step_00000002", "step_00000003"]
