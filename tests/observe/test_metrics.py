"""What a run's rows become, read by TensorBoard's own reader."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from m3i_fast.engine.parallel.ranks import World
from m3i_fast.observe.metrics import DeviceMeans, TensorBoardSink, last_step, read_curves


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def _row(step: int) -> dict[str, float]:
    return {"loss/total": 1.0 / step, "monitor/a b": float("nan"), "throughput/img_s": 3e3 * step}


def test_tensorboard_reads_what_torch_would_have_written(tmp_path: Path) -> None:
    """Rows of before and after a resume at step 10, which drops those of 15 and 20."""
    for start, steps in ((0, (5, 10, 15, 20)), (10, (12, 14))):
        sink = TensorBoardSink(tmp_path / "ours", start_step=start)
        torchs = SummaryWriter(str(tmp_path / "torchs"), purge_step=start + 1 if start else None)
        for step in steps:
            sink.log(step, _row(step))
            for name, value in _row(step).items():
                torchs.add_scalar(name, value, step)
            assert _scalars(tmp_path / "ours")["loss/total"][-1][0] == step  # there at once
        sink.close()
        torchs.close()
        time.sleep(1)  # names of torch's files of one second do not sort: 10 is before 9
    ours, expected = _scalars(tmp_path / "ours"), _scalars(tmp_path / "torchs")
    assert repr(ours) == repr(expected)  # NaN is not itself
    assert [step for step, _ in ours["loss/total"]] == [5, 10, 12, 14]


def test_a_full_disk_is_an_error_of_the_row(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    sink = TensorBoardSink(tmp_path / "folder")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, sink._file.fileno())
    os.close(full)
    with pytest.raises(OSError) as error:
        sink.log(1, _row(1))
    assert error.value.errno == errno.ENOSPC
    sink.close()


def test_curves_are_the_rows_by_name_without_damaged_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [_row(step) | ({"evaluate/knn_top1": 0.5} if step == 10 else {}) for step in (5, 10)]
    lines = [json.dumps({"step": 5 * (i + 1), **row}) for i, row in enumerate(rows)]
    path.write_text("\n".join([lines[0], '{"step": 7, "loss', lines[1], '{"step": 15, "lo']))
    found = read_curves(path)
    assert {name: steps.tolist() for name, (steps, _) in found.items()} == {
        "loss/total": [5, 10],
        "monitor/a b": [5, 10],
        "throughput/img_s": [5, 10],
        "evaluate/knn_top1": [10],
    }
    assert found["loss/total"][1].tolist() == [0.2, 0.1] and np.isnan(found["monitor/a b"][1]).all()
    assert last_step(path) == 10
    assert last_step(tmp_path / "none") == 0
    path.write_text("nonsense\n")
    assert read_curves(path) == {} and last_step(path) == 0


def _read_what_ranks_lack(rank: int, folder: Path) -> None:
    """One of two ranks: the first lacks a metric, then the second one has none at all."""
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    world = World(torch.device("cpu"), rank, 2, dist.group.WORLD, dist.group.WORLD)
    means = DeviceMeans(world.device, world.mean, world.gather)
    spread = {"spread": torch.tensor(3.0)} if rank else {}
    means.add({"loss": torch.tensor(1.0 + rank)} | spread)
    means.add({"loss": torch.tensor(6.0)})
    found = [means.read()]
    means.reset()
    if not rank:
        means.add({"loss": torch.tensor(5.0)})
    found.append(means.read())
    means.reset()
    found.append(means.read())
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_ranks_agree_on_the_means_of_metrics_that_some_of_them_lack(tmp_path: Path) -> None:
    mp.start_processes(_read_what_ranks_lack, (tmp_path,), nprocs=2, start_method="fork")
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == [{"loss": (1 + 2 + 6 + 6) / 4, "spread": 3.0}, {"loss": 5.0}, {}]
