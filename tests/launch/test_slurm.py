"""launch/slurm.sh on a real Slurm of two nodes: what ends a job, and how the run goes on."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed import run as torchrun

from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.observe.metrics import read_jsonl
from tests.launch.cluster import NODES, PATH, Cluster, Job, skip_reason
from tests.shared.engine.small_run import assert_same_run
from tests.shared.engine.two_ranks import run_of_adamw, spread

pytestmark = pytest.mark.skipif(skip_reason() is not None, reason=str(skip_reason()))

SCRIPT = str(Path(__file__).resolve().parents[2] / "launch" / "slurm.sh")
# What a node of this cluster has, in the place of eight GPUs and 64 cores.
SIZE = ("--gpus-per-node=1", "--cpus-per-task=1")
PROGRAMS = os.pathsep.join([str(Path(sys.executable).parent), PATH])
NUM_STEPS = 40


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(autouse=True)
def no_job_is_left(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.clear()


@pytest.fixture(scope="module")
def config(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of seconds on two ranks, whose every step is logged and every second one saved."""
    cfg = spread(run_of_adamw(dataset), 1)
    path = tmp_path_factory.mktemp("config") / "config.json"
    replace(cfg, num_steps=NUM_STEPS, log_every=1, checkpoint_every=2).save(path)
    return path


def submit(
    cluster: Cluster, config: Path, out: Path, *options: str, PATH: str = PROGRAMS, **changed: str
) -> Job:
    """Submit launch/slurm.sh as it stands, with some of the job's environment changed."""
    arguments = ("--config", str(config), "--out", str(out))
    return cluster.submit(*SIZE, *options, SCRIPT, *arguments, PATH=PATH, **changed)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run directory of a job that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    job = submit(cluster, config, out)
    job.wait_for_state("COMPLETED")
    return out


def wait_for_checkpoint(job: Job, out: Path) -> None:
    job.wait_until("there is a checkpoint", (out / "checkpoints" / "latest").exists)


def expect_went_on(out: Path, undisturbed: Path) -> None:
    """Hold that a run which was stopped ended as one that was not, step by step and bit for bit."""
    assert [row["step"] for row in read_jsonl(out / "metrics.jsonl")] == [*range(1, NUM_STEPS + 1)]
    assert_same_run(out, undisturbed)


def test_a_job_of_two_nodes_ends(undisturbed: Path) -> None:
    newest = checkpoint.latest(undisturbed / "checkpoints")
    assert newest.step == NUM_STEPS and newest.state()["num_ranks"] == len(NODES)


def test_a_job_out_of_time_saves_and_goes_on(
    cluster: Cluster, config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """The signal is Slurm's, five minutes before the limit, as the script asks for."""
    out = tmp_path / "run"
    job = submit(cluster, config, out, "--time=60")
    wait_for_checkpoint(job, out)
    with job.held():
        job.set_limit(minutes=5)
        job.wait_for_state("PENDING", restarts=1)
    assert 0 < checkpoint.latest(out / "checkpoints").step < NUM_STEPS
    job.set_limit(minutes=60)
    job.wait_for_state("COMPLETED", restarts=1)
    assert f"checkpoint saved; requeuing job {job.number}" in job.output
    expect_went_on(out, undisturbed)


def test_a_cancelled_job_saves_and_stays_cancelled(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    job = submit(cluster, config, out)
    wait_for_checkpoint(job, out)
    with job.held():
        cluster.call("scancel", str(job.number))
    job.wait_until("its processes have ended", lambda: not job.processes())
    assert 0 < checkpoint.latest(out / "checkpoints").step < NUM_STEPS
    assert "stopped and saved at step" in job.output
    fields = job.wait_for_state("CANCELLED")
    assert fields["ExitCode"] == "0:15"


@pytest.mark.nightly  # a signal as that of the limit
def test_a_preempted_job_saves_and_goes_on(
    cluster: Cluster, config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    job = submit(cluster, config, out)
    wait_for_checkpoint(job, out)
    with job.held():
        urgent = cluster.submit(
            "--partition=urgent", "--nodes=2", "--gpus-per-node=1", "--wrap=true"
        )
        job.wait_until("Slurm preempts it", lambda: job.fields["PreemptTime"] != "None")
    urgent.wait_for_state("COMPLETED")
    assert 0 < checkpoint.latest(out / "checkpoints").step < NUM_STEPS
    job.wait_for_state("COMPLETED", restarts=1)
    assert "stopped and saved at step" in job.output
    expect_went_on(out, undisturbed)


@pytest.mark.nightly  # a minute until Slurm misses it
def test_a_job_whose_node_falls_silent_goes_on_from_the_last_checkpoint(
    cluster: Cluster, config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    job = submit(cluster, config, out)
    wait_for_checkpoint(job, out)
    with cluster.silent(NODES[1]):
        job.wait_for_state("PENDING", restarts=1)
        assert 0 < checkpoint.latest(out / "checkpoints").step < NUM_STEPS
    job.wait_for_state("COMPLETED", restarts=1)
    assert "saved" not in job.output
    expect_went_on(out, undisturbed)


def test_a_job_whose_node_is_killed_is_queued_again(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    """The other rank fails at once, and the job would have ended before Slurm misses the node.

    How it goes on is not waited for: within the usual two minutes, which a requeued job waits for
    its start and this cluster's does not, Slurm still sends what ends the first start's step.
    """
    out = tmp_path / "run"
    job = submit(cluster, config, out, SLURM_WAIT="5")
    wait_for_checkpoint(job, out)
    with cluster.killed(NODES[1]):
        job.wait_for_state("PENDING", "COMPLETING", restarts=1)
    assert f"a node was lost; requeuing job {job.number}" in job.output
    assert 0 < checkpoint.latest(out / "checkpoints").step < NUM_STEPS


def test_a_rank_that_dies_before_the_ranks_meet_fails_the_job(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    job = submit(cluster, config, tmp_path / "run", SLURM_WAIT="15")
    job.wait_until("its second node has a rank", lambda: job.ranks(NODES[1]))
    Job.signal(signal.SIGKILL, job.ranks(NODES[1]))
    job.wait_for_state("FAILED")
    assert f"{NODES[1]}: task 1: Exited with exit code 137" in job.output
    assert not job.processes()


# ---- What the script calls, and makes of its exit code: no run is trained ------------------------


def program(folder: Path, body: str) -> str:
    """Write a program to call in the place of m3i-fast; return the PATH that finds it first."""
    path = folder / "bin" / "m3i-fast"
    path.parent.mkdir()
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return os.pathsep.join([str(path.parent), PROGRAMS])


def test_a_node_that_cannot_start_fails_the_job(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    """The other node, which waits for it at the rendezvous, is ended."""
    body = f'[[ $SLURMD_NODENAME == {NODES[1]} ]] && exit 1\nPATH=${{PATH#*:}}\nexec m3i-fast "$@"'
    changed = {"PATH": program(tmp_path, body), "SLURM_WAIT": "10"}
    job = submit(cluster, config, tmp_path / "run", **changed)
    fields = job.wait_for_state("FAILED")
    assert f"{NODES[1]}: task 1: Exited with exit code 1\n" in job.output
    assert "First task exited 10s ago" in job.output
    assert fields["ExitCode"] == "137:0" and not job.processes()


def test_each_node_is_told_of_all(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    path = program(tmp_path, f'printf "%s\\n" "$@" > "{tmp_path}/$SLURMD_NODENAME"')
    job = submit(cluster, config, tmp_path / "run", "--gpus-per-node=2", PATH=path)
    job.wait_for_state("COMPLETED")
    first, second = ((tmp_path / node).read_text().splitlines() for node in NODES)
    assert first == second and first[0] == "launch"
    asked = torchrun.parse_args(first[1:])
    assert (asked.nnodes, asked.nproc_per_node, asked.rdzv_id) == ("2", "2", f"{job.number}-0")
    assert asked.rdzv_endpoint == f"{NODES[0]}:{10000 + job.number % 20000}"
    out = str(tmp_path / "run")
    assert asked.training_script == "train"
    assert asked.training_script_args == ["--config", str(config), "--out", out, "--auto-resume"]


def test_a_job_is_queued_again_after_75_alone(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    path = program(tmp_path, "exit $((${SLURM_RESTART_COUNT:-0} ? 0 : CODE))")
    jobs = {
        code: submit(cluster, config, tmp_path / "run", "--nodes=1", PATH=path, CODE=str(code))
        for code in (0, 1, 2, 75, 76, 137)
    }
    for code, job in jobs.items():
        again = code == 75
        fields = job.wait_for_state("COMPLETED" if again or not code else "FAILED", restarts=again)
        assert fields["ExitCode"] == f"{0 if again else code}:0"


def test_a_job_that_slurm_does_not_requeue_says_so(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    path = program(tmp_path, "exit 75")
    job = submit(cluster, config, tmp_path / "run", "--no-requeue", PATH=path)
    assert job.wait_for_state("FAILED")["ExitCode"] == "75:0"
    assert f"job {job.number} is not requeued: sbatch the same line" in job.output
