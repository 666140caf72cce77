"""A process in which no step gets done ends with its stacks, and one that works does not."""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from m3i_fast import cli
from m3i_fast.benchmarks.faults.failing_files import in_child
from m3i_fast.config import TrainConfig
from m3i_fast.engine.parallel.watchdog import EXIT_CODE, GRACE, LOST_PEER, Watchdog, lost_a_peer
from m3i_fast.engine.trainer import Trainer
from m3i_fast.pipelines.batch import Batch
from m3i_fast.recipes import demo, shrink
from tests.shared.engine.replaced_step import replace_call
from tests.shared.engine.small_run import TEXT
from tests.shared.engine.two_ranks import spread

LIMIT = 0.4  # s


def _child(function: Callable[[], object]) -> int:
    """Of this process, whose threads wait for nothing here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return in_child(function)


def _hang_in_a_lock() -> None:
    lock = threading.Lock()
    with lock:
        lock.acquire()


def _hang_with_pythons_lock() -> None:
    sleep = ctypes.PyDLL(None).sleep  # PyDLL keeps it
    sleep(600)


@pytest.mark.parametrize(
    ("hang", "code", "limits"), [(_hang_in_a_lock, EXIT_CODE, 1), (_hang_with_pythons_lock, 1, 2)]
)
def test_what_hangs_ends_with_every_threads_stack(
    hang: Callable[[], None], code: int, limits: int, tmp_path: Path
) -> None:
    stacks = tmp_path / "stacks.txt"

    def work() -> None:
        threading.Thread(target=threading.Event().wait, name="idle", daemon=True).start()
        with Watchdog(stacks, seconds=LIMIT) as watchdog:
            watchdog.beat()
            time.sleep(LIMIT / 2)
            watchdog.beat()
            hang()

    began = time.monotonic()
    assert _child(work) == code
    assert time.monotonic() - began > limits * LIMIT
    text = stacks.read_text()
    assert f"in {hang.__name__}" in text and text.count("hread 0x") >= 3
    assert (f"no end of a step for {LIMIT / 60:g} minutes" in text) == (code == EXIT_CODE)


def test_the_first_step_a_save_and_a_beat_have_their_time(tmp_path: Path) -> None:
    stacks = tmp_path / "stacks.txt"

    def work() -> None:
        with Watchdog(stacks, seconds=LIMIT) as watchdog:
            time.sleep(2 * LIMIT)
            with watchdog.allow_longer("a save"):
                time.sleep(2 * LIMIT)
            watchdog.beat()
            for _ in range(3):
                time.sleep(LIMIT / 2)
                before = watchdog._deadline
                watchdog.beat()
                assert before < watchdog._deadline <= time.monotonic() + LIMIT
        assert not stacks.exists()
        time.sleep(2 * LIMIT)  # nothing is left that would end a process that goes on

    assert _child(work) == 0


def test_work_with_more_time_has_not_all_of_it(tmp_path: Path) -> None:
    stacks = tmp_path / "stacks.txt"

    def work() -> None:
        with Watchdog(stacks, seconds=LIMIT / 4) as watchdog, watchdog.allow_longer("a save"):
            time.sleep(600)

    assert _child(work) == EXIT_CODE
    assert f"no end of a save for {GRACE * LIMIT / 4 / 60:g} minutes" in stacks.read_text()


def test_a_part_that_is_done_gives_the_next_one_its_time(tmp_path: Path) -> None:
    """A start that fills a cache may take any time, and a part of it no more than a start."""
    stacks, limit = tmp_path / "stacks.txt", LIMIT / 4

    def work() -> None:
        with Watchdog(stacks, seconds=limit, doing="the start") as watchdog:
            for _ in range(4):
                time.sleep(0.5 * GRACE * limit)
                watchdog.renew()
            time.sleep(600)

    assert _child(work) == EXIT_CODE
    assert f"no end of the start for {GRACE * limit / 60:g} minutes" in stacks.read_text()


def test_slow_steps_have_their_time(tmp_path: Path) -> None:
    """A default that is no one's choice ends no run whose every step takes longer."""
    stacks = tmp_path / "stacks.txt"

    def work() -> None:
        with Watchdog(stacks, seconds=LIMIT / 4) as watchdog:
            for _ in range(3):
                time.sleep(LIMIT)
                watchdog.beat()
            with watchdog.allow_longer("a save"):
                pass  # it is no step, and says nothing of how fast they are
            time.sleep(600)

    assert _child(work) == EXIT_CODE
    [minutes] = re.findall(r"no end of a step for (\S+) minutes", stacks.read_text())
    assert GRACE * LIMIT <= 60 * float(minutes) < 2 * GRACE * LIMIT


def _stop_parent(number: signal.Signals, seconds: float) -> None:
    """From a child of this process, a moment from now and for so long."""
    if os.fork() == 0:
        time.sleep(LIMIT)
        os.kill(os.getppid(), number)
        time.sleep(seconds)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)


def test_a_process_that_was_stopped_goes_on(tmp_path: Path) -> None:
    def work() -> None:
        _stop_parent(signal.SIGSTOP, 3 * LIMIT)
        with Watchdog(tmp_path / "stacks.txt", seconds=3 * LIMIT) as watchdog:
            watchdog.beat()
            time.sleep(5 * LIMIT)

    assert _child(work) == 0


def test_a_process_that_was_suspended_goes_on_however_late(tmp_path: Path) -> None:
    """Past both timers, Python's and faulthandler's."""
    limit, suspended = 3 * LIMIT, 9 * LIMIT

    def work() -> None:
        _stop_parent(signal.SIGTSTP, suspended)
        ends, longest = time.monotonic() + suspended + limit, 0.0
        with Watchdog(tmp_path / "stacks.txt", seconds=limit) as watchdog:
            while (began := time.monotonic()) < ends:
                time.sleep(0.01)  # the signal's handler runs between two of them
                watchdog.beat()
                longest = max(longest, time.monotonic() - began)
        assert longest > suspended / 2  # it was
        assert signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL

    assert _child(work) == 0


def test_an_error_leaves_its_traceback_and_none_asked_for_nothing(tmp_path: Path) -> None:
    stacks = tmp_path / "stacks.txt"
    with pytest.raises(RuntimeError), Watchdog(stacks, seconds=60):
        raise RuntimeError("connection closed by peer")
    assert "connection closed by peer" in stacks.read_text()
    with Watchdog(tmp_path / "none.txt", seconds=math.inf) as watchdog:
        watchdog.beat()
    assert not (tmp_path / "none.txt").exists()


def test_a_directory_that_goes_is_not_the_watchdogs_error(tmp_path: Path) -> None:
    """What the run itself raises, of what it could not write, is what is told."""
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(OSError, match="no place"), Watchdog(folder / "stacks.txt", seconds=60):
        shutil.rmtree(folder)
        raise OSError("no place")


# ---- Runs ----------------------------------------------------------------------------------------


def _config(dataset: Path) -> TrainConfig:
    cfg = shrink(demo(), path=dataset, num_classes=9, text=TEXT)
    return replace(
        cfg,
        num_threads=1,
        num_steps=50,
        checkpoint_every=50,
        data=replace(cfg.data, batch_size=8),
        optim=replace(cfg.optim, matrices="adamw"),
    )


def _train(cfg: TrainConfig, out: Path, where: str) -> None:
    """Hang in the fourth step, in what `where` says."""
    trainer = Trainer(cfg, out)

    def hang(*_: object, **__: object) -> None:
        time.sleep(600)

    step = trainer.train_step.__call__

    def train_step(batch: Batch, *, monitor: bool = False) -> dict[str, torch.Tensor]:
        if trainer.step == 3:
            match where:
                case "data":
                    trainer.loader.close()
                    trainer.loader._begin = hang  # type: ignore[method-assign,union-attr]
                case "save":
                    trainer.run.saver._write = hang  # type: ignore[method-assign]
                    trainer.save()
                    trainer.run.saver.saved_step = None
                    trainer.save()
                case "sleeping rank":
                    hang()
                case "stopped rank":
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "dead rank":
                    os._exit(9)
        return step(batch, monitor=monitor)

    replace_call(trainer, train_step)
    trainer.train(watchdog_seconds=1.0)


@pytest.mark.parametrize(
    ("where", "frame"), [("data", "in __next__"), ("save", "in wait")], ids=["data", "save"]
)
def test_a_run_that_hangs_ends(where: str, frame: str, dataset: Path, tmp_path: Path) -> None:
    assert _child(lambda: _train(_config(dataset), tmp_path / "run", where)) == EXIT_CODE
    text = (tmp_path / "run" / "stacks-rank0.txt").read_text()
    assert "no end of " in text and "in hang" in text and frame in text


def _rank(rank: int, cfg: TrainConfig, folder: Path, where: str) -> None:
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    _train(spread(cfg, 1), folder / "run", where if rank else "nowhere")


@pytest.mark.parametrize("where", ["sleeping rank", "stopped rank", "dead rank"])
def test_a_rank_that_others_wait_for_ends_them(where: str, dataset: Path, tmp_path: Path) -> None:
    context = mp.get_context("fork")
    arguments = (_config(dataset), tmp_path, where)
    ranks = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    ranks[0].join(120)
    ranks[1].kill()
    ranks[1].join()
    text = (tmp_path / "run" / "stacks-rank0.txt").read_text()
    if where != "dead rank":
        assert ranks[0].exitcode == EXIT_CODE and "no end of a step" in text
        assert "hanging: rank 1 (of 0 to 1)" in text
    else:
        assert ranks[0].exitcode == 1 and "RuntimeError" in text
    assert "train_step" in text


def _lose_a_peer(rank: int, store: str, told: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    dist.all_reduce(torch.ones(1))
    if rank == 1:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        while True:
            dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        told.write_text(str(error))
    os._exit(0)


def test_a_peer_that_is_killed_has_an_exit_code_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = tmp_path / "told"
    context = mp.start_processes(
        _lose_a_peer, (str(tmp_path / "store"), told), nprocs=2, join=False, start_method="spawn"
    )
    for process in context.processes:
        process.join(60)
    error = RuntimeError(told.read_text())
    assert lost_a_peer(error) and not lost_a_peer(RuntimeError("expected 3 rows, got 4"))

    def verb(arguments: list[str]) -> int:
        raise error

    codes: list[int] = []
    monkeypatch.setattr("m3i_fast.cli.doctor.main", verb)
    monkeypatch.setattr(cli, "end_at_once", codes.append)
    assert cli.main(["doctor"]) == 1 and codes == []  # of one process: an error like any other
    monkeypatch.setattr(cli, "in_a_world", lambda: True)
    assert cli.main(["doctor"]) == LOST_PEER and codes == [LOST_PEER]
    assert "another rank has ended" in capsys.readouterr().err


def _talk(rank: int, port: int, folder: Path, hanging: int, hang: str) -> None:
    """All-reduce in pairs and among four ranks, one of which hangs after some rounds."""
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    store = dist.TCPStore("127.0.0.1", port, 4, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    with Watchdog(folder / f"stacks-rank{rank}.txt", seconds=2.0) as watchdog:
        for turn in range(1000):
            watchdog.beat()
            if rank == hanging and turn == 3:
                match hang:
                    case "sleeps":
                        time.sleep(600)
                    case "holds Python's lock":
                        time.sleep(0.5)  # the watchdog arms faulthandler's timer
                        _hang_with_pythons_lock()
                    case "is stopped":
                        os.kill(os.getpid(), signal.SIGSTOP)
                    case "waits for the store":
                        dist.distributed_c10d._get_default_store().get("never")
            dist.all_reduce(torch.ones(1), group=pairs[rank // 2])
            dist.all_reduce(torch.ones(1))


@pytest.mark.parametrize(
    ("hanging", "hang", "code", "named"),
    [
        (0, "sleeps", EXIT_CODE, "6 collectives started there, 8 by others"),
        (3, "sleeps", EXIT_CODE, "6 collectives started there, 8 by others"),
        (3, "waits for the store", EXIT_CODE, "6 collectives started there, 8 by others"),
        (3, "holds Python's lock", 1, "no answer of the watchdog there"),
        (3, "is stopped", -signal.SIGKILL, "no answer of the watchdog there"),
        (0, "is stopped", -signal.SIGKILL, "not known, the ranks' store does not answer"),
    ],
)
def test_every_rank_names_the_one_that_hangs(
    hanging: int, hang: str, code: int, named: str, tmp_path: Path
) -> None:
    """Rank 0 has the store, as without torchrun."""
    context = mp.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (port, tmp_path, hanging, hang)
    ranks = [context.Process(target=_talk, args=(rank, *arguments)) for rank in range(4)]
    for process in ranks:
        process.start()
    for process in ranks[:hanging] + ranks[hanging + 1 :]:
        process.join(60)
    ranks[hanging].join(0 if hang == "is stopped" else 60)
    ranks[hanging].kill()
    ranks[hanging].join()
    assert [process.exitcode for process in ranks] == [
        code if rank == hanging else EXIT_CODE for rank in range(4)
    ]
    told = {
        line
        for rank in range(4)
        if code == EXIT_CODE or rank != hanging
        for line in (tmp_path / f"stacks-rank{rank}.txt").read_text().splitlines()[-1:]
    }
    where = "" if "not known" in named else f"rank {hanging} (of 0 to 3); "
    assert [line.startswith(f"hanging: {where}{named}") for line in told] == [True], told
