"""Ranks begin as new processes do, although they are forked from one that has imported torch."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from m3i_fast.engine.parallel.ranks import leave_world
from tests.shared.ranks import start_ranks


def note(rank: int, folder: Path) -> None:
    draws = (random.random(), np.random.random(), torch.rand(()).item())  # noqa: NPY002
    torch.save((os.environ.get("RANK_OF_TEST"), os.getppid(), *draws), folder / f"{rank}.pt")


def test_ranks_have_the_tests_environment_and_their_own_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name in ("first", "second"):
        monkeypatch.setenv("RANK_OF_TEST", name)
        start_ranks(note, (tmp_path,), 2)
        found += [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    names, parents, *draws = zip(*found, strict=True)
    assert names == ("first", "first", "second", "second")
    assert len(set(parents)) == 1 and parents[0] != os.getpid()
    assert [len(set(values)) for values in draws] == [4, 4, 4]


def threads_of_gloo() -> int:
    names = Path("/proc/self/task").glob("*/comm")
    return sum(name.read_text().strip() == "pt_gloo_runloop" for name in names)


def leave(rank: int, store: str, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = DistributedDataParallel(nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    model.itself = model  # as a trainer's parts hold one another
    del model
    before = threads_of_gloo()
    leave_world()
    torch.save((before, threads_of_gloo()), folder / f"{rank}.pt")


def test_no_thread_of_gloo_outlives_the_world(tmp_path: Path) -> None:
    """One that drops a tensor while Python ends aborts the process."""
    start_ranks(leave, (str(tmp_path / "store"), tmp_path), 2)
    for rank in range(2):
        before, after = torch.load(tmp_path / f"{rank}.pt")
        assert before > 0 and after == 0
