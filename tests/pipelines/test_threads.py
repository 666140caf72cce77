"""Where a loader's threads run: read of a tree of /sys, chosen, and found in /proc."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from m3i_fast.config.data import LoaderConfig
from m3i_fast.pipelines import threads
from m3i_fast.pipelines.loader import Loader
from m3i_fast.pipelines.storage.requests import DaemonPool
from m3i_fast.pipelines.threads import Cores, choose, format_cores, parse_cores, start_pool

TASKS = Path("/proc/self/task")
LINUX = pytest.mark.skipif(not TASKS.is_dir(), reason="asks Linux")
TWO = {0: frozenset(range(4)), 1: frozenset(range(4, 8))}
ALL = frozenset(range(8))


@LINUX
def test_threads_of_a_pool_have_its_name_for_the_system_too() -> None:
    def names() -> tuple[str, str]:
        task = TASKS / str(threading.get_native_id())
        return threading.current_thread().name, (task / "comm").read_text().strip()

    with start_pool(1, "m3i-read") as pool:
        assert pool.submit(names).result() == ("m3i-read_0", "m3i-read")


@LINUX
def test_threads_run_where_cores_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    """As after a change of the process's cpuset; which is warned of once."""
    own = os.sched_getaffinity(0)
    gone = frozenset({4_000})
    with start_pool(1, "m3i-read", gone) as pool:
        assert pool.submit(os.sched_getaffinity, 0).result() == own
    reads = DaemonPool(1, "m3i-fetch", gone)
    assert reads.submit(os.sched_getaffinity, 0).result(10) == own
    reads.close()
    with threads.threads_on(gone):
        assert os.sched_getaffinity(0) == own
    assert caplog.text.count("expected cores that this process may use, got 4000") == 1


def write_nodes(sysfs: Path, cores: list[str]) -> Path:
    """Write what Linux says of NUMA nodes, beside other files of that folder."""
    folder = sysfs / "devices/system/node"
    folder.mkdir(parents=True)
    (folder / "possible").write_text(f"0-{len(cores) - 1}\n")
    for node, text in enumerate(cores):
        (folder / f"node{node}").mkdir()
        (folder / f"node{node}" / "cpulist").write_text(f"{text}\n")
    return sysfs


@pytest.mark.parametrize(
    ("text", "cores"), [("0-3,8", {0, 1, 2, 3, 8}), ("5", {5}), ("0,2-3", {0, 2, 3}), ("", set())]
)
def test_lists_of_cores_are_read_and_written_as_linux_does(
    text: str, cores: set[int], tmp_path: Path
) -> None:
    (tmp_path / "cpulist").write_text(f"{text}\n")
    assert parse_cores(tmp_path / "cpulist") == cores
    assert format_cores(cores) == text


def test_this_machines_cores_are_those_of_its_nodes() -> None:
    nodes = threads.numa_nodes(threads.SYSFS)
    if not nodes:
        pytest.skip("the system names no NUMA node")
    assert frozenset(os.sched_getaffinity(0)) <= frozenset().union(*nodes.values())


def test_nodes_without_cores_are_left_out(tmp_path: Path) -> None:
    """Of memory alone, as HBM and CXL are."""
    nodes = threads.numa_nodes(write_nodes(tmp_path, ["0-3", "", "4-5,12-13"]))
    assert nodes == {0: {0, 1, 2, 3}, 2: {4, 5, 12, 13}}
    assert threads.numa_nodes(tmp_path / "nowhere") == {}


def test_a_gpus_node_is_found_by_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimpleNamespace(pci_domain_id=1, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    assert threads.node_of_gpu(0, tmp_path) is None
    file = tmp_path / "bus/pci/devices/0001:3b:00.0/numa_node"
    file.parent.mkdir(parents=True)
    for text, node in (("1\n", 1), ("-1\n", None)):
        file.write_text(text)
        assert threads.node_of_gpu(0, tmp_path) == node


def chosen(
    nodes: dict[int, Cores] = TWO,
    allowed: Cores = ALL,
    *,
    gpu: int | None = None,
    ranks: int = 1,
    rank: int = 0,
    num_threads: int = 2,
) -> threads.Placement:
    return choose(
        nodes,
        allowed,
        num_threads=num_threads,
        gpu=None if gpu is None else (rank, gpu),
        local_rank=rank,
        ranks_a_node=ranks,
    )


def test_a_gpus_loader_runs_on_its_node_on_the_cores_that_it_may_use() -> None:
    assert chosen(gpu=1).cores == {4, 5, 6, 7}
    found = chosen(gpu=1, allowed=frozenset({0, 1, 5, 6}))
    assert found.cores == {5, 6} and found.reason == "cores 5-6 of NUMA node 1"


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_ranks_without_a_gpu_are_dealt_to_nodes_in_blocks(ranks: int) -> None:
    dealt = [chosen(ranks=ranks, rank=rank).cores for rank in range(ranks)]
    assert dealt == sorted(dealt, key=min) and set(dealt) == set(TWO.values())
    assert abs(dealt.count(TWO[0]) - dealt.count(TWO[1])) <= 1


def test_a_rank_that_may_use_one_node_keeps_it() -> None:
    """As Slurm binds ranks, each of which is the first of those that it sees, or the fourth."""
    for rank in range(4):
        assert chosen(allowed=TWO[1], ranks=4, rank=rank).cores == TWO[1]


def test_what_would_cost_cores_is_left_to_the_system() -> None:
    assert chosen({0: ALL}, gpu=0).cores is None
    assert chosen({}).cores is None
    one_rank = chosen(ranks=1)
    assert one_rank.cores is None and "1 ranks without a GPU on 2 NUMA nodes" in one_rank.reason
    few = chosen(gpu=0, num_threads=6)
    assert few.cores is None and "6 threads, and 4 cores of NUMA node 0" in few.reason
    assert chosen(gpu=0, allowed=frozenset({0, 1}), num_threads=6).cores == {0, 1}


def test_a_node_that_is_out_of_reach_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = min(os.sched_getaffinity(0))
    monkeypatch.setattr(threads, "SYSFS", write_nodes(tmp_path, [f"{first}", "4000-4003"]))
    monkeypatch.setattr(threads, "node_of_gpu", lambda *_: 1)
    threads._tell.cache_clear()
    for _ in range(2):
        found = threads.place_loader("auto", 1, 0)
        assert found.cores is None and found.is_wrong
    (warned,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "expected cores of NUMA node 1, where GPU 0 is" in warned.message


def tasks() -> dict[int, tuple[str, Cores]]:
    """Name and cores of each thread of this process, as Linux has them."""
    found = {}
    for task in TASKS.iterdir():
        number = int(task.name)
        with suppress(FileNotFoundError, ProcessLookupError):  # ended since it was listed
            name = (task / "comm").read_text().strip()
            found[number] = name, frozenset(os.sched_getaffinity(number))
    return found


@pytest.fixture
def second_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A core that is the whole of the second of two nodes, to which this process is the rank."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("needs two cores")
    monkeypatch.setattr(threads, "SYSFS", write_nodes(tmp_path, [str(c) for c in allowed[:2]]))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    yield allowed[1]
    assert sorted(os.sched_getaffinity(0)) == allowed


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_threads_of_a_loader_run_on_the_ranks_node(
    cfg: LoaderConfig, second_core: int, backend: str
) -> None:
    """All that it starts, and nothing else: neither threads of before nor those started after."""
    elsewhere = Loader(replace(cfg, backend=backend, affinity="none"))
    expected = next(elsewhere)
    elsewhere.close()  # pools start threads when they have work
    before = tasks()
    loader = Loader(replace(cfg, backend=backend))
    batch = next(loader)
    started = {task: each for task, each in tasks().items() if task not in before}
    names = {name for name, _ in started.values()}
    assert {cores for _, cores in started.values()} == {frozenset({second_core})}, started
    assert any(name.startswith("[DALI]") for name in names) or {"m3i-read", "m3i-views"} <= names
    assert torch.equal(batch.global_views[0], expected.global_views[0])
    after = tasks()
    assert all(after[task] == each for task, each in before.items() if task in after)
    with start_pool(1, "after") as pool:
        assert len(pool.submit(os.sched_getaffinity, 0).result()) >= 2
    loader.close()
