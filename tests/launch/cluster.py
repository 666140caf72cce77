"""A Slurm cluster of two nodes on this machine, in a folder of its own."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from m3i_fast.benchmarks.faults.held_port import hold_port

NODES = ("127.0.0.1", "127.0.0.2")  # names that resolve, to addresses that are this machine
DAEMONS = ("munged", "slurmctld", "slurmd")
FINAL = {"COMPLETED", "FAILED", "TIMEOUT", "OUT_OF_MEMORY"}
CLIENTS = ("sbatch", "srun", "scancel", "scontrol", "sinfo")
OWN = ("SLURM", "SBATCH_", "SRUN_")
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])

# cred_expire: how long a requeued job waits before it starts again; 5 s is the least, 120 usual.
# KillWait: from SIGTERM to SIGKILL. MessageTimeout, SlurmdTimeout: a busy machine is no dead one.
CONFIG = """\
ClusterName=m3i-fast-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
GresTypes=gpu
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
FirstJobId={first_job}
KillWait=30
MessageTimeout=60
SlurmdTimeout=90
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={nodes[0]} NodeHostname={host} NodeAddr={nodes[0]} Port={ports[1]} CPUs=2 Gres=gpu:2
NodeName={nodes[1]} NodeHostname={host} NodeAddr={nodes[1]} Port={ports[2]} CPUs=2 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


def skip_reason() -> str | None:
    """Why no cluster can be started here, or None."""
    for program in (*DAEMONS, *CLIENTS):
        if shutil.which(program, path=PATH) is None:
            return f"{program} is absent: scripts/slurm.sh installs Slurm, as root"
    return None


def _parent(pid: int, name: str) -> int | None:
    """Return the parent of a process, if that has this name."""
    with suppress(OSError):
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        if Path(f"/proc/{parent}/comm").read_text().startswith(name):
            return parent
    return None


class Job:
    """A job of the cluster, and what is known of it."""

    def __init__(self, cluster: Cluster, number: int, output: Path) -> None:
        self.cluster, self.number, self._output = cluster, number, output

    @property
    def fields(self) -> dict[str, str]:
        """Return what `scontrol show job` says: JobState, Restarts, ExitCode and others."""
        line = self.cluster.call("scontrol", "--oneliner", "show", "job", str(self.number))
        return dict(re.findall(r"(\w+)=(\S*)", line))

    @property
    def output(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    def wait_until(self, what: str, is_so: Callable[[], object], *, seconds: int = 300) -> None:
        """Wait until `is_so()`; fail with all that is known of the job if that takes too long."""
        deadline = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > deadline:
                log = self.cluster.log()[-3000:]
                raise AssertionError(
                    f"waited {seconds} s until {what}\n{self.fields}\n{self.output}\n{log}"
                )
            time.sleep(0.1)

    def wait_for_state(self, *states: str, restarts: int = 0) -> dict[str, str]:
        """Wait for one of the states, after so many restarts; return the job's fields."""
        fields: dict[str, str] = {}

        def reached() -> bool:
            nonlocal fields
            fields = self.fields
            now = (fields["JobState"], int(fields["Restarts"]))
            assert now[0] in states or now[0] not in FINAL, f"{now}\n{self.output}"
            return now[0] in states and now[1] == restarts

        self.wait_until(f"the job is {' or '.join(states)} after {restarts} restarts", reached)
        return fields

    def processes(self, node: str | None = None) -> list[int]:
        """Return the job's processes, or those on one of the nodes."""
        marks = {f"SLURM_JOB_ID={self.number}"}
        if node is not None:
            marks.add(f"SLURMD_NODENAME={node}")
        return [pid for pid, variables in self.cluster.processes() if marks <= set(variables)]

    def ranks(self, node: str | None = None) -> list[int]:
        """Return the processes that torchrun started, and those that they started."""
        own = set(self.processes(node))
        return [
            pid
            for pid, variables in self.cluster.processes()
            if pid in own and any(variable.startswith("LOCAL_RANK=") for variable in variables)
        ]

    def set_limit(self, *, minutes: int) -> None:
        self.cluster.call("scontrol", "update", f"JobId={self.number}", f"TimeLimit={minutes}")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the ranks still until Slurm signals them, so that a short run does not end before.

        Slurm sends SIGCONT with every signal to a job.
        """
        pids = self.ranks()
        try:
            self.signal(signal.SIGSTOP, pids)
            yield
        finally:
            self.signal(signal.SIGCONT, pids)

    @staticmethod
    def signal(number: int, pids: list[int]) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


class Cluster:
    """slurmctld, two slurmd and a munged, all of which keep to a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "slurm.conf"
        # Nothing of a Slurm of this machine's own, of which these tests may be a job.
        own = {name: value for name, value in os.environ.items() if not name.startswith(OWN)}
        self.environment = {**own, "PATH": PATH, "SLURM_CONF": str(self.config)}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._held = [hold_port() for _ in range(3)]

    def start(self) -> None:
        """Start all daemons, and wait until both nodes are idle."""
        self._configure()
        self._munge()
        self._daemon("slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        self._wait_for_nodes("idle")

    def _configure(self) -> None:
        host, user = socket.gethostname().split(".")[0], subprocess.getoutput("id -un")
        ports = [held.getsockname()[1] for held in self._held]
        # The port at which a job's nodes meet comes of its number: none that another cluster has.
        first_job = 1 + secrets.randbelow(19000)
        self.folder.joinpath("state").mkdir()
        for node in NODES:
            self.folder.joinpath(f"spool-{node}").mkdir()
        config = CONFIG.format(
            host=host, user=user, ports=ports, folder=self.folder, nodes=NODES, first_job=first_job
        )
        self.config.write_text(config)
        self.folder.joinpath("cgroup.conf").write_text("CgroupPlugin=disabled\n")
        self.folder.joinpath("gres.conf").write_text(
            "AutoDetect=off\nName=gpu File=/dev/null\nName=gpu File=/dev/zero\n"
        )

    def _munge(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        socket_ = self.folder / "munge.socket"
        files = {"key-file": key, "socket": socket_}
        files |= {f"{name}-file": self.folder / f"munge.{name}" for name in ("pid", "seed", "log")}
        options = [f"--{name}={path}" for name, path in files.items()]
        # --force: the folder may be closed to other users, whom this munged does not serve.
        self._daemon("munged", "munged", "--foreground", "--force", *options)
        self._wait("munged has a socket", socket_.exists)

    def start_node(self, node: str) -> None:
        self._daemon(node, "slurmd", "-D", "-N", node)

    def _daemon(self, name: str, *command: str) -> None:
        # Ends with the process that started it, also where that is killed.
        tied = ("setpriv", "--pdeathsig", "KILL", *command)
        with open(self.folder / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                tied, env=self.environment, cwd=self.folder, stdout=out, stderr=out
            )

    def processes_of(self, node: str) -> list[int]:
        """Return a node's slurmd, its slurmstepd, and the processes of jobs on it."""
        mark = f"SLURMD_NODENAME={node}"
        pids = [pid for pid, variables in self.processes() if mark in variables]
        steps = {parent for pid in pids if (parent := _parent(pid, "slurmstepd"))}
        return [self.daemons[node].pid, *steps, *pids]

    @contextmanager
    def silent(self, node: str) -> Iterator[None]:
        """Have a node stop without a connection being closed, and Slurm take it for dead.

        It comes back as after a restart.
        """
        pids = self.processes_of(node)
        Job.signal(signal.SIGSTOP, pids)
        try:
            self.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=silent")
            yield
        finally:
            self._restart(node, pids)

    @contextmanager
    def killed(self, node: str) -> Iterator[None]:
        """Kill all of a node, so that its peers see their connections closed; then restart it."""
        pids = self.processes_of(node)
        Job.signal(signal.SIGKILL, pids)
        try:
            yield
        finally:
            self._restart(node, pids)

    def _restart(self, node: str, pids: list[int]) -> None:
        Job.signal(signal.SIGKILL, pids)
        self.daemons[node].wait()
        # Sockets of steps that are no more: slurmd would wait for them for KillWait, then kill what
        # runs of the job, which has started again by then (5 s after, not the usual 120).
        shutil.rmtree(self.folder / f"spool-{node}")
        self.folder.joinpath(f"spool-{node}").mkdir()
        self.start_node(node)

    def _wait(self, what: str, is_so: Callable[[], object], *, seconds: int = 60) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            for name, daemon in self.daemons.items():
                assert daemon.poll() is None, f"{name} ended with {daemon.returncode}\n{self.log()}"
            assert time.monotonic() < deadline, f"waited {seconds} s until {what}\n{self.log()}"
            time.sleep(0.1)

    def _wait_for_nodes(self, state: str) -> None:
        def all_so() -> bool:
            shown = self.call(
                "sinfo", "--Node", "--noheader", "--format=%T", "-p", "main", check=False
            )
            return shown.split() == [state] * len(NODES)

        self._wait(f"both nodes are {state}", all_so)

    def log(self) -> str:
        """Return what slurmctld and the nodes have logged."""
        files = [self.folder / "slurmctld.log", *self.folder.glob("*.out")]
        return "\n".join(f"-- {file.name}\n{file.read_text()}" for file in files if file.exists())

    def call(self, *command: str, check: bool = True) -> str:
        """Run one of Slurm's commands; return what it prints."""
        done = subprocess.run(
            command, env=self.environment, text=True, capture_output=True, timeout=120
        )
        assert not check or done.returncode == 0, f"{command}: {done.stderr}\n{self.log()}"
        return done.stdout

    def submit(self, *command: str, **environment: str) -> Job:
        """Call sbatch; `environment` is that of the job, beside this process's own."""
        folder = self.folder / "jobs"
        folder.mkdir(exist_ok=True)
        output = folder / f"{secrets.token_hex(4)}.out"
        done = subprocess.run(
            ["sbatch", "--parsable", f"--output={output}", f"--chdir={folder}", *command],
            env=self.environment | environment,
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        return Job(self, int(done.stdout), output)

    def processes(self) -> Iterator[tuple[int, list[str]]]:
        """Yield all processes of the cluster and its jobs, each with its environment."""
        mark, place = f"SLURM_CONF={self.config}", str(self.folder)
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with suppress(OSError):
                    variables = (entry / "environ").read_text(errors="replace").split("\0")
                    # slurmstepd writes its title over its environment.
                    if mark in variables or os.readlink(entry / "cwd") == place:
                        yield int(entry.name), variables

    def clear(self) -> None:
        """End all jobs, of which a failed test has left some."""
        self.call("scancel", "--me")
        of_jobs = [
            pid
            for pid, variables in self.processes()
            if any(variable.startswith("SLURM_JOB_ID=") for variable in variables)
        ]
        Job.signal(signal.SIGKILL, of_jobs)
        self._wait_for_nodes("idle")

    def stop(self) -> None:
        """End all processes, those of jobs as well."""
        deadline = time.monotonic() + 60
        while left := [pid for pid, _ in self.processes()]:
            assert time.monotonic() < deadline, f"processes that do not end: {left}"
            Job.signal(signal.SIGKILL, left)
            for daemon in self.daemons.values():
                daemon.poll()
            time.sleep(0.1)
        for held in self._held:
            held.close()
