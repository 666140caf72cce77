"""A process in which no step gets done ends with its stacks, and one that works does not."""

from __future__ import annotations

import ctypes
import faulthandler
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
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType

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
from tests.shared.ranks import start_ranks

LIMIT = 100.0  # s, of a clock that a test feeds
POLL = 5.0


class FedClock:
    """Time that passes only as a test feeds it; the watchdog looks once after each step of it.

    log: the file that has the time now, also after the watchdog has ended the process.
    """

    def __init__(self, log: Path | None = None) -> None:
        self.now_s, self._log = 0.0, log
        self._steps: deque[float] = deque()
        self._changed, self._is_idle = threading.Condition(), False
        self._runs: Callable[[], bool] = lambda: False

    def __call__(self) -> float:
        return self.now_s

    def pause(self, stopped: threading.Event, seconds: float) -> bool:
        with self._changed:
            while not (self._steps or self._runs() or stopped.is_set()):
                self._is_idle = True
                self._changed.notify_all()
                self._changed.wait(0.01)
            if stopped.is_set():
                return True
            self._is_idle = False
            self.now_s += self._steps.popleft() if self._steps else seconds
            if self._log is not None:
                self._log.write_text(str(self.now_s))
        return False

    def feed(self, *steps_s: float) -> None:
        """Let time pass in these steps; return once the watchdog has looked after each."""
        with self._changed:
            self._steps.extend(steps_s)
            self._is_idle = False
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._is_idle, 60)

    def pass_s(self, seconds: float) -> None:
        self.feed(*[POLL] * int(seconds / POLL))

    def run_once(self, reached: Callable[[], bool]) -> None:
        """Let time pass by itself from the moment at which something is reached."""
        self._runs = reached


def _in_call(name: str) -> bool:
    """Whether some thread of this process is in a function of this name."""
    frames: list[FrameType | None] = list(sys._current_frames().values())
    while frames:
        if (frame := frames.pop()) is not None:
            if frame.f_code.co_name == name:
                return True
            frames.append(frame.f_back)
    return False


def _child(function: Callable[[], object]) -> int:
    """Of this process, whose threads wait for nothing here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return in_child(function)


def _hang() -> None:
    lock = threading.Lock()
    with lock:
        lock.acquire()


def _hang_with_pythons_lock() -> None:
    sleep = ctypes.PyDLL(None).sleep  # PyDLL keeps it
    sleep(600)


def _end_of(
    work: Callable[[Watchdog, FedClock], None], folder: Path, doing: str = "the first step"
) -> tuple[float, str]:
    """Return at which time work that then hangs was ended, and what was written."""
    stacks, log = folder / "stacks.txt", folder / "now"

    def child() -> None:
        clock = FedClock(log)
        clock.run_once(lambda: _in_call(_hang.__name__))
        with Watchdog(
            stacks, seconds=LIMIT, doing=doing, clock=clock, pause=clock.pause
        ) as watchdog:
            work(watchdog, clock)
            _hang()

    assert _child(child) == EXIT_CODE
    return float(log.read_text()), stacks.read_text()


def test_what_hangs_ends_with_every_threads_stack(tmp_path: Path) -> None:
    def work(watchdog: Watchdog, clock: FedClock) -> None:
        threading.Thread(target=threading.Event().wait, name="idle", daemon=True).start()
        watchdog.beat()
        clock.pass_s(LIMIT / 2)
        watchdog.beat()

    end_s, text = _end_of(work, tmp_path)
    assert end_s == 1.5 * LIMIT + POLL
    assert f"in {_hang.__name__}" in text and text.count("hread 0x") >= 3
    assert f"no end of a step for {LIMIT / 60:g} minutes" in text


def test_what_hangs_with_pythons_lock_ends_by_faulthandler(tmp_path: Path) -> None:
    """Its timer is of real time, in a thread of C, and a limit later than the watchdog's."""
    stacks, limit = tmp_path / "stacks.txt", 1.5

    def work() -> None:
        clock = FedClock()
        with Watchdog(stacks, seconds=limit, clock=clock, pause=clock.pause) as watchdog:
            watchdog.beat()
            clock.feed(0.0)  # the timer is armed
            _hang_with_pythons_lock()

    began = time.monotonic()
    assert _child(work) == 1
    assert time.monotonic() - began > 2 * limit
    text = stacks.read_text()
    assert f"in {_hang_with_pythons_lock.__name__}" in text and "no end of" not in text


def test_the_first_step_a_save_and_a_beat_have_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks, clock = tmp_path / "stacks.txt", FedClock()
    armed: list[float | None] = []
    monkeypatch.setattr(
        faulthandler, "dump_traceback_later", lambda later, **_: armed.append(later)
    )
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: armed.append(None))

    def work() -> None:
        with Watchdog(stacks, seconds=LIMIT, clock=clock, pause=clock.pause) as watchdog:
            clock.pass_s(GRACE * LIMIT)
            with watchdog.allow_longer("a save"):
                clock.pass_s(GRACE * LIMIT)
                assert armed[-1] == LIMIT  # later than the watchdog, which has no time left
            watchdog.beat()
            for _ in range(3):
                clock.pass_s(LIMIT / 2)
                watchdog.beat()
                assert watchdog._deadline == clock.now_s + LIMIT
            clock.feed(0.0)
            assert armed[-1] == 2 * LIMIT
        assert not stacks.exists()
        assert armed[-1] is None  # nothing is left that would end a process that goes on
        assert "watchdog" not in [thread.name for thread in threading.enumerate()]

    assert _child(work) == 0


def test_work_with_more_time_has_not_all_of_it(tmp_path: Path) -> None:
    def work(watchdog: Watchdog, clock: FedClock) -> None:
        watchdog.beat()
        clock.pass_s(LIMIT / 2)
        with watchdog.allow_longer("a save"):
            _hang()

    end_s, text = _end_of(work, tmp_path)
    assert end_s == (0.5 + GRACE) * LIMIT + POLL
    assert f"no end of a save for {GRACE * LIMIT / 60:g} minutes" in text


def test_a_part_that_is_done_gives_the_next_one_its_time(tmp_path: Path) -> None:
    """A start that fills a cache may take any time, and a part of it no more than a start."""

    def work(watchdog: Watchdog, clock: FedClock) -> None:
        for _ in range(4):
            clock.pass_s(0.5 * GRACE * LIMIT)
            watchdog.renew()

    end_s, text = _end_of(work, tmp_path, "the start")
    assert end_s == 3 * GRACE * LIMIT + POLL
    assert f"no end of the start for {GRACE * LIMIT / 60:g} minutes" in text


def test_slow_steps_have_their_time(tmp_path: Path) -> None:
    """A default that is no one's choice ends no run whose every step takes longer."""

    def work(watchdog: Watchdog, clock: FedClock) -> None:
        for seconds in (4.5 * LIMIT, 4 * LIMIT, 5 * LIMIT):
            clock.pass_s(seconds)
            watchdog.beat()
        with watchdog.allow_longer("a save"):
            pass  # it is no step, and says nothing of how fast they are

    end_s, text = _end_of(work, tmp_path)
    assert end_s == (13.5 + 4 * GRACE) * LIMIT + POLL
    [minutes] = re.findall(r"no end of a step for (\S+) minutes", text)
    assert minutes == f"{4 * GRACE * LIMIT / 60:g}"


def test_time_in_which_the_process_was_stopped_does_not_count(tmp_path: Path) -> None:
    """As of SIGSTOP, of which a process sees nothing but that a pause was long."""

    def work(watchdog: Watchdog, clock: FedClock) -> None:
        watchdog.beat()
        clock.pass_s(LIMIT / 2)
        clock.feed(POLL + 3 * LIMIT)

    assert _end_of(work, tmp_path)[0] == 4 * LIMIT + POLL


def test_a_process_that_was_suspended_goes_on_however_late(tmp_path: Path) -> None:
    """Past faulthandler's timer, which is of real time and would end it."""
    limit = 0.5
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            clock = FedClock()
            with Watchdog(
                tmp_path / "stacks.txt", seconds=limit, clock=clock, pause=clock.pause
            ) as watchdog:
                watchdog.beat()
                clock.feed(0.0)  # the timer is armed
                os.kill(os.getpid(), signal.SIGTSTP)
                clock.feed(9 * limit)
                watchdog.beat()
            assert signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL
            os._exit(0)
        os._exit(3)
    assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
    time.sleep(3 * limit)
    os.kill(child, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


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


def _num_collectives() -> int:
    """Of this rank, in all groups."""
    groups = dist.distributed_c10d._world.pg_map
    return sum(group._get_sequence_number_for_group() for group in groups)


def _train(cfg: TrainConfig, out: Path, where: str, frame: str, seconds: float = LIMIT) -> None:
    """Hang in the fourth step, in what `where` says; time passes once some thread is in `frame`."""
    trainer, clock = Trainer(cfg, out), FedClock()

    def hang(*_: object, **__: object) -> None:
        clock.run_once(lambda: _in_call(frame))
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
                case "waiting rank":
                    before = _num_collectives()
                    clock.run_once(lambda: _num_collectives() > before)
        return step(batch, monitor=monitor)

    replace_call(trainer, train_step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "m3i_fast.engine.trainer.Watchdog",
            partial(Watchdog, clock=clock, pause=clock.pause),
        )
        trainer.train(watchdog_seconds=seconds)


@pytest.mark.parametrize(
    ("where", "frame"), [("data", "__next__"), ("save", "wait")], ids=["data", "save"]
)
def test_a_run_that_hangs_ends(where: str, frame: str, dataset: Path, tmp_path: Path) -> None:
    assert _child(lambda: _train(_config(dataset), tmp_path / "run", where, frame)) == EXIT_CODE
    text = (tmp_path / "run" / "stacks-rank0.txt").read_text()
    assert "no end of " in text and "in hang" in text and f"in {frame}" in text


def _rank(rank: int, cfg: TrainConfig, folder: Path, where: str) -> None:
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    # The others wait for half a limit, or 5 s, for what a stopped rank would say.
    seconds = 10.0 if where == "stopped rank" else LIMIT
    mine = where if rank else "dead peer" if where == "dead rank" else "waiting rank"
    _train(spread(cfg, 1), folder / "run", mine, "hang", seconds)


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
    connected = dist.distributed_c10d._get_default_store()
    if rank == 1:
        connected.get("done")
        os.kill(os.getpid(), signal.SIGKILL)
    connected.set("done", "")
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
    context = start_ranks(_lose_a_peer, (str(tmp_path / "store"), told), 2, join=False)
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
    """All-reduce in pairs and among four ranks, one of which hangs after some rounds.

    Time passes on the others once they have started the last collective that they can.
    """
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    store = dist.TCPStore("127.0.0.1", port, 4, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    clock, before = FedClock(), _num_collectives()
    if rank != hanging:
        most = 7 if rank == hanging ^ 1 else 8
        clock.run_once(lambda: _num_collectives() - before == most)
    # The ranks that answer wait for half a limit, or 5 s, for one that cannot.
    seconds = LIMIT if hang in ("sleeps", "waits for the store") else 3.0
    with Watchdog(
        folder / f"stacks-rank{rank}.txt", seconds=seconds, clock=clock, pause=clock.pause
    ) as watchdog:
        for turn in range(1000):
            watchdog.beat()
            if rank == hanging and turn == 3:
                match hang:
                    case "sleeps":
                        clock.run_once(lambda: True)
                        time.sleep(600)
                    case "holds Python's lock":
                        clock.feed(0.0)  # faulthandler's timer is armed, for two limits
                        _hang_with_pythons_lock()
                    case "is stopped":
                        os.kill(os.getpid(), signal.SIGSTOP)
                    case "waits for the store":
                        clock.run_once(lambda: _in_call("_wait_for_the_store"))
                        _wait_for_the_store()
            dist.all_reduce(torch.ones(1), group=pairs[rank // 2])
            dist.all_reduce(torch.ones(1))


def _wait_for_the_store() -> None:
    dist.distributed_c10d._get_default_store().get("never")


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
