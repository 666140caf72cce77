"""Ranks that meet, ranks that are missing, and ranks that hang before the first step."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from m3i_fast import cli
from m3i_fast.benchmarks.faults.held_port import hold_port
from m3i_fast.cli import train as train_verb
from m3i_fast.config import TrainConfig
from m3i_fast.config.parallel import ParallelConfig
from m3i_fast.engine.parallel import rendezvous, watchdog
from m3i_fast.engine.parallel.ranks import join_world, leave_world
from m3i_fast.engine.parallel.rendezvous import join_store, missing_ranks
from m3i_fast.engine.parallel.watchdog import EXIT_CODE, MissingRanks
from m3i_fast.engine.trainer import Trainer
from tests.engine.parallel.test_watchdog import _config
from tests.shared.engine.two_ranks import spread

LIMIT = 5.0  # s
FORK = mp.get_context("fork")


@pytest.fixture
def port() -> Iterator[int]:
    with hold_port() as held:
        yield held.getsockname()[1]


@pytest.fixture(params=["rank 0", "agent"])
def host(request: pytest.FixtureRequest, port: int) -> Iterator[dict[str, str]]:
    """The environment of ranks whose store rank 0 hosts, or torchrun's agent: this process."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if request.param == "rank 0":
        yield place
        return
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    yield place | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    del store


def _run(
    ranks: list[int],
    size: int,
    environment: dict[str, str],
    folder: Path,
    work: Callable[[], int],
    *,
    until: int | None = None,
) -> dict[int, tuple[int, str]]:
    """Exit code and standard error of each rank that is there; all begin `work` at once.

    until: the rank that is waited for, if not all; the others are killed then.
    """
    barrier = FORK.Barrier(len(ranks))

    def one(rank: int) -> None:
        torch.set_num_threads(1)
        os.dup2(os.open(folder / f"{rank}.err", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        cli.console.file = sys.stderr
        os.environ.update(environment, RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
        barrier.wait()
        os._exit(work())

    processes = {rank: FORK.Process(target=one, args=(rank,)) for rank in ranks}
    for process in processes.values():
        process.start()
    for process in processes.values() if until is None else [processes[until]]:
        process.join(120)
    for process in processes.values():
        process.kill()
        process.join()
    return {
        rank: (int(process.exitcode or 0), (folder / f"{rank}.err").read_text())
        for rank, process in processes.items()
    }


def _train(cfg: TrainConfig, folder: Path, minutes: float) -> int:
    config = folder / "config.json"
    if os.environ.get("RANK", "0") == "0":
        cfg.save(config)
    arguments = ["--config", str(config), "--out", str(folder / "run")]
    return cli.main(["train", *arguments, "--init-minutes", str(minutes)])


# ---- Who is missing ------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", [[], [0], [1023], [3, 4, 700], list(range(1024))])
def test_the_missing_are_found_with_few_questions(absent: list[int]) -> None:
    store, asked = dist.HashStore(), 0

    class Counted:
        def check(self, keys: list[str]) -> bool:
            nonlocal asked
            asked += 1
            return store.check(keys)

    for rank in set(range(1024)).difference(absent):
        store.set(f"joined/{rank}", "")
    assert missing_ranks(Counted(), range(1024)) == absent  # type: ignore[arg-type]
    assert asked <= max(1, 22 * len(absent)) and asked <= 2047


@pytest.mark.parametrize(
    ("ranks", "told"), [([0, 1], "rank 2 (of 0 to 2)"), ([0], "2 ranks: 1, 2 (of 0 to 2)")]
)
def test_who_is_missing_is_named_on_every_rank(
    ranks: list[int], told: str, host: dict[str, str], dataset: Path, tmp_path: Path
) -> None:
    cfg = spread(_config(dataset), 1)
    cfg.save(tmp_path / "config.json")
    found = _run(ranks, 3, host, tmp_path, lambda: _train(cfg, tmp_path, LIMIT / 60))
    for code, said in found.values():
        said = " ".join(said.split())
        assert code == EXIT_CODE and "--init-minutes" in said
        assert f"missing after {LIMIT / 60:.2g} minutes: {told};" in said
        assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_the_host_of_the_store_is_named(port: int, tmp_path: Path) -> None:
    """Rank 0 itself never comes, so nothing listens where the others look."""

    def work() -> int:
        with pytest.raises(MissingRanks, match=r"rank 0 \(of 0 to 1\); .* rank 0 is not reached"):
            join_store(LIMIT / 3)
        return 0

    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    assert _run([1], 2, place, tmp_path, work)[1][0] == 0


def test_a_port_that_is_taken_is_no_missing_rank(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1])}

        def work() -> int:
            with pytest.raises(RuntimeError, match="EADDRINUSE"):
                join_store(LIMIT)
            return 0

        assert _run([0], 2, place, tmp_path, work)[0][0] == 0


@pytest.mark.parametrize("absent", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_variable_that_is_missing_is_named(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(absent)
    with pytest.raises(ValueError, match=rf"^{absent}: expected .* WORLD_SIZE = 2, got none"):
        join_world(torch.device("cpu"))


def test_a_rank_that_is_late_is_waited_for_and_named_meanwhile(
    host: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "_LOOK_EVERY", 0.2)

    def work() -> int:
        logging.basicConfig(format="%(message)s", force=True)
        if os.environ["RANK"] == "1":
            time.sleep(1)
        world = join_world(torch.device("cpu"), seconds=math.inf)
        assert world.gather(world.rank) == [0, 1, 2]
        leave_world()
        return 0

    found = _run([0, 1, 2], 3, host, tmp_path, work)
    assert [code for code, _ in found.values()] == [0, 0, 0], found
    assert "waiting for rank 1 (of 0 to 2) since" in found[0][1]
    assert found[1][1] == "" and found[2][1] == ""  # the first that is there tells it


def test_a_store_without_a_limit_of_its_own_is_handed_on(port: int, tmp_path: Path) -> None:
    """A collective later waits as long as it did before there was a limit to the meeting."""

    def work() -> int:
        store = join_store(LIMIT)
        assert store.timeout == timedelta(minutes=30)
        return 0

    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    assert _run([0], 1, place, tmp_path, work)[0] == (0, "")


# ---- Between the meeting and the first step ------------------------------------------------------


def _hang(where: Path) -> None:
    time.sleep(600)


def _stop(where: Path) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize(("how", "ended"), [(_hang, 1), (_stop, 0)])
def test_a_start_that_hangs_ends(
    how: Callable[[Path], None],
    ended: int,
    port: int,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rank that hangs says where; one that waits for a stopped one says what it waits in."""
    cfg, open_shards = spread(_config(dataset), 1), Trainer._open_shards
    cfg.save(tmp_path / "config.json")

    def hang_in_one(self: Trainer) -> object:
        if self.world.rank == 1:
            how(tmp_path)
        return open_shards(self)

    monkeypatch.setattr(Trainer, "_open_shards", hang_in_one)
    monkeypatch.setattr(watchdog, "GRACE", 2)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    work = partial(_train, cfg, tmp_path, LIMIT / 60)
    code, said = _run([0, 1], 2, place, tmp_path, work, until=ended)[ended]
    assert code == EXIT_CODE
    assert f"rank {ended}, process" in said and "stacks in standard error" in said
    minutes = 2 * LIMIT / 60
    assert f"no end of the start for {minutes:g} minutes (--init-minutes" in said
    assert ("in _hang" if ended else "in _distribute") in said


# ---- By torchrun ---------------------------------------------------------------------------------

LATE = """
import os, sys, time
if os.environ["RANK"] == "1":
    time.sleep(600)
from m3i_fast.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_rank_that_never_comes_ends_a_launch(dataset: Path, tmp_path: Path) -> None:
    cfg = replace(spread(_config(dataset), 1), num_steps=1)
    config, script = tmp_path / "config.json", tmp_path / "late.py"
    cfg.save(config)
    script.write_text(LATE)
    of_torchrun = ["--standalone", "--nproc-per-node", "2", str(script)]
    of_train = ["train", "--config", str(config), "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "m3i_fast.cli", "launch", *of_torchrun, *of_train]
    done = subprocess.run(
        [*command, "--init-minutes", "0.05"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "400"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == EXIT_CODE, done.stderr
    assert "missing after 0.05 minutes: rank 1 (of 0 to 1);" in done.stderr


# ---- After the first step ------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("disk full"), ZeroDivisionError("a bug")])
def test_an_error_of_one_rank_is_told_and_ends_it_while_others_wait(
    error: Exception, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over NCCL, leaving the world waits for all ranks: so here, where gloo would not."""

    def verb(arguments: list[str]) -> int:
        world = join_world(torch.device("cpu"))
        if world.rank == 1:
            raise error
        world.wait_for_all()
        return 0

    def leave() -> None:
        time.sleep(600)

    monkeypatch.setattr(train_verb, "main", verb)
    monkeypatch.setattr(dist, "destroy_process_group", leave)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def work() -> int:
        code = cli.main(["train"])
        sys.stderr.write("left")  # and Python would go on to its own end
        return code

    code, said = _run([0, 1], 2, place, tmp_path, work, until=1)[1]
    assert code == 1 and str(error) in said and "left" not in said
    assert ("Traceback" in said) == isinstance(error, ZeroDivisionError)


def test_ranks_wait_for_each_other_for_a_day(port: int, tmp_path: Path) -> None:
    """Torch's ten minutes over NCCL, and thirty over gloo, would end a run before its watchdog."""

    def work() -> int:
        world = join_world(torch.device("cpu"))
        mesh = world.mesh(ParallelConfig(shard=2))
        assert mesh is not None
        for group in (world.group, world.control, *mesh.get_all_groups()):
            backend = group._get_backend(torch.device("cpu"))
            assert backend.options._timeout == timedelta(days=1)
        leave_world()
        return 0

    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = _run([0, 1], 2, place, tmp_path, work)
    assert [code for code, _ in found.values()] == [0, 0], found


def test_a_rank_that_waits_for_others_is_busy_meanwhile(port: int, tmp_path: Path) -> None:
    def work() -> int:
        world = join_world(torch.device("cpu"))
        seen: list[float] = []
        if world.rank == 1:
            time.sleep(3)
        world.wait_for_all(lambda: seen.append(time.monotonic()))
        assert (len(seen) > 1) == (world.rank == 0), seen
        leave_world()
        return 0

    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = _run([0, 1], 2, place, tmp_path, work)
    assert [code for code, _ in found.values()] == [0, 0], found
