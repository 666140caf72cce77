"""The files in launch/: their command lines, and whole runs (under Slurm: test_slurm.py)."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow.training import models as kubeflow
from kubeflow_trainer_api.models import IoK8sApiCoreV1PodTemplateSpec, JobsetV1alpha2JobSet

from m3i_fast.benchmarks.faults.held_port import hold_port
from m3i_fast.cli import launch, main, train
from m3i_fast.config import TrainConfig
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.observe.metrics import read_jsonl
from tests.shared.engine.two_ranks import run_of_adamw, spread

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
RECIPE = ("m3i_vit_b_h100", "--data.path", "/shards", "--out", "runs/x")
CONTROLLERS_SET = {
    "JOB_COMPLETION_INDEX": "1",
    "RANK": "1",
    "MASTER_ADDR": "m3i-fast-master-0",
    "MASTER_PORT": "23456",
}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A folder for what a script calls, and says."""
    return tmp_path / "log"


def _script(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def _start(log: Path, name: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(log / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "LOG": str(log), "COLUMNS": "200", **environment}
    return subprocess.Popen([LAUNCH / name, *arguments], env=environment)


def _command(log: Path, name: str, **environment: str) -> list[str]:
    """What a script calls m3i-fast with."""
    _script(log / "bin" / "m3i-fast", 'printf "%s\\n" "$@" > "$LOG/command"')
    assert _start(log, name, *RECIPE, **environment).wait() == 0
    return (log / "command").read_text().splitlines()


def _expect_command(arguments: list[str]) -> Any:
    """Parse it as it will be, by torchrun and train; what torchrun was asked for."""
    assert arguments[0] == "launch"
    _, rest = launch.retry_code(arguments[1:])
    asked = launch.parse(rest)
    assert asked.module and asked.training_script == "m3i_fast.cli"
    verb, *of_train = asked.training_script_args
    assert verb == "train"
    command = train.parse(of_train)
    assert command.auto_resume and str(command.config.data.path).endswith("shards")
    return asked


# ---- What the files say --------------------------------------------------------------------------


def test_torchrun_is_asked_for_one_node_or_several(log: Path) -> None:
    one = _expect_command(_command(log, "torchrun.sh"))
    assert one.standalone and one.nproc_per_node == "gpu"
    several = {"NNODES": "4", "RENDEZVOUS": "node1:29400", "NPROC_PER_NODE": "8"}
    asked = _expect_command(_command(log, "torchrun.sh", **several))
    assert (asked.nnodes, asked.nproc_per_node, asked.rdzv_backend) == ("4", "8", "c10d")
    assert asked.rdzv_endpoint == "node1:29400" and not asked.standalone
    assert _start(log, "torchrun.sh", *RECIPE, NNODES="4").wait() == 1


def test_slurm_is_told_to_send_the_signal_that_saves() -> None:
    lines = (LAUNCH / "slurm.sh").read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {"--signal=USR1@300", "--requeue", "--ntasks-per-node=1"} <= set(options)


def _job(name: str) -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / "kubernetes" / f"{name}.yaml").read_text())


def _asked(container: dict[str, Any]) -> Any:
    """What its command asks for, with the variables that the controllers set."""
    program, *arguments = [*container["command"], *container["args"]]
    assert program == "m3i-fast"
    for name, value in CONTROLLERS_SET.items():
        arguments = [argument.replace(f"$({name})", value) for argument in arguments]
    return _expect_command(arguments)


def _container(template: dict[str, Any]) -> dict[str, Any]:
    [container] = template["spec"]["containers"]
    return container


def test_the_jobset_is_one_and_restarts_after_75() -> None:
    job = _job("jobset")
    assert JobsetV1alpha2JobSet.from_dict(job).to_dict() == job  # an unknown field would be lost
    [replicated] = job["spec"]["replicatedJobs"]
    spec, container = (
        replicated["template"]["spec"],
        _container(replicated["template"]["spec"]["template"]),
    )
    asked = _asked(container)
    assert asked.nnodes == str(spec["completions"]) == str(spec["parallelism"])
    name = job["metadata"]["name"]
    assert asked.master_addr == f"{name}-{replicated['name']}-0-0.{name}"
    [rule] = [r for r in spec["podFailurePolicy"]["rules"] if "onExitCodes" in r]
    codes = rule["onExitCodes"]
    assert rule["action"] == "FailJob" and codes["operator"] == "NotIn" and 75 in codes["values"]
    assert codes["containerName"] == container["name"]
    assert not {1, 2} & set(codes["values"])
    [ended] = job["spec"]["failurePolicy"]["rules"]
    assert (ended["action"], ended["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    _expect_room(replicated["template"]["spec"]["template"], asked)


def test_the_pytorchjob_is_one_and_restarts_after_75() -> None:
    job = _job("pytorchjob")
    assert job["apiVersion"] == "kubeflow.org/v1"
    _expect_fields(job, kubeflow.KubeflowOrgV1PyTorchJob)
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas.keys() == {"Master", "Worker"}
    for replica in replicas.values():
        template = replica["template"]
        pod = IoK8sApiCoreV1PodTemplateSpec.from_dict(template)
        assert pod.to_dict() == template and replica["restartPolicy"] == "ExitCode"
        container = _container(template)
        assert container["name"] == "pytorch"
        asked = _asked(container)
        code, _ = launch.retry_code(container["command"][2:])
        assert code is not None and code >= 128  # what the operator starts again
        assert asked.nnodes == str(sum(r["replicas"] for r in replicas.values()))
        assert asked.nproc_per_node == job["spec"]["nprocPerNode"]
        _expect_room(template, asked)


def _expect_fields(value: dict[str, Any], model: type) -> None:
    """Every field is one of the operator's API, down to the pods."""
    named = {api: model.openapi_types[own] for own, api in model.attribute_map.items()}  # type: ignore[attr-defined]
    assert value.keys() <= named.keys(), model
    for key, kind in named.items():
        inner, one = kind.removeprefix("dict(str, ").removesuffix(")"), kind == named[key]
        if key in value and hasattr(kubeflow, inner) and inner.startswith("Kubeflow"):
            parts = [value[key]] if inner == kind and one else value[key].values()
            for part in parts:
                _expect_fields(part, getattr(kubeflow, inner))


def _expect_room(template: dict[str, Any], asked: Any) -> None:
    """A GPU a rank, shared memory for NCCL and the loader, claims for what is mounted."""
    container, spec = _container(template), template["spec"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == asked.nproc_per_node
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    of_train = train.parse(asked.training_script_args[1:])
    for path in (of_train.config.data.path, of_train.out):
        assert "persistentVolumeClaim" in mounts[f"/{path.parts[1]}"]


def _image() -> list[str]:
    """The container file, an instruction a line."""
    return (LAUNCH / "Containerfile").read_text().replace("\\\n", " ").splitlines()


def _copied(lines: list[str]) -> list[str]:
    return [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]


def test_the_image_is_made_of_what_is_there() -> None:
    lines, project = _image(), (ROOT / "pyproject.toml").read_text()
    copied = _copied(lines)
    assert copied and all((ROOT / name).exists() for name in copied)
    ignored = (LAUNCH / "Containerfile.dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in copied} == {line for line in ignored if line.startswith("!")}
    [extras] = [line.removeprefix("ARG EXTRAS=") for line in lines if line.startswith("ARG EXTRAS")]
    assert all(f"\n{extra} = [" in project for extra in extras.split(","))
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    for name in ("jobset", "pytorchjob"):
        assert f"runAsUser: {users[-1]}\n" in (LAUNCH / "kubernetes" / f"{name}.yaml").read_text()


@pytest.mark.nightly
def test_what_the_image_copies_is_enough_to_build(tmp_path: Path) -> None:
    """Its last pip command, without CUDA, in a folder with its files and nothing else."""
    lines, source = _image(), tmp_path / "src"
    source.mkdir()
    for name in _copied(lines):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, source)
        else:
            ignored = shutil.ignore_patterns("results", "__pycache__", "*.so")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
    [install] = [line for line in lines if line.startswith("RUN pip install") and '".[' in line]
    words = shlex.split(install.removeprefix("RUN pip").replace("M3I_CUDA=ON", "M3I_CUDA=OFF"))
    options = [word for word in words if "${" not in word]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *options]
    subprocess.run([*pip, "--no-deps", "--target", tmp_path / "site", "."], check=True, cwd=source)
    assert (tmp_path / "site" / "m3i_fast" / "_C.abi3.so").is_file()
    assert (tmp_path / "site" / "m3i_fast" / "benchmarks" / "core" / "harness.py").is_file()


# ---- Whole runs ----------------------------------------------------------------------------------


C10D = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:{port}")
STATIC = ("--master-addr", "127.0.0.1", "--master-port", "{port}", "--node-rank")


@pytest.fixture
def port() -> Iterator[int]:
    with hold_port() as held:
        yield held.getsockname()[1]


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _wait_for(path: Path, process: subprocess.Popen[bytes], *, seconds: int = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, f"ended with {process.returncode} before {path.name}"
        assert time.monotonic() < deadline, f"waited for {path}"
        time.sleep(0.01)


def test_a_run_that_is_stopped_goes_on_by_the_same_line(
    dataset: Path, log: Path, tmp_path: Path
) -> None:
    """Two ranks, stopped by the signal that Slurm sends before the time limit."""
    cfg = replace(run_of_adamw(dataset), num_steps=400, checkpoint_every=2, keep_checkpoints=2)
    config, out = tmp_path / "config.json", tmp_path / "run"
    cfg.save(config)
    arguments = ("--config", str(config), "--out", str(out))
    job = _start(log, "torchrun.sh", *arguments, NPROC_PER_NODE="2")
    _wait_for(out / "checkpoints" / "latest", job)
    job.send_signal(signal.SIGUSR1)
    assert job.wait() == 75
    stopped = checkpoint.latest(out / "checkpoints").step
    assert 0 < stopped < cfg.num_steps
    # Nothing but the number of steps left is changed, so that the test is short.
    shorter = replace(cfg, num_steps=stopped + 2)
    for path in (config, out / "config.json"):
        shorter.save(path)
    assert _start(log, "torchrun.sh", *arguments, NPROC_PER_NODE="2").wait() == 0
    assert checkpoint.latest(out / "checkpoints").step == stopped + 2
    rows = read_jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, stopped + 3))
    assert TrainConfig.load(out / "config.json") == shorter


def test_a_signal_to_one_node_saves_on_all(
    dataset: Path, log: Path, tmp_path: Path, port: int
) -> None:
    """Two agents that meet, of a rank each; FSDP2, with compiled blocks."""
    cfg = replace(run_of_adamw(dataset), num_steps=4000, checkpoint_every=2, compile=True)
    cfg = spread(cfg, -1)
    config, out = tmp_path / "config.json", tmp_path / "run"
    cfg.save(config)
    arguments = ("--config", str(config), "--out", str(out))
    nodes = {"NNODES": "2", "NPROC_PER_NODE": "1", "RENDEZVOUS": f"localhost:{port}"}
    first, second = (_start(log, "torchrun.sh", *arguments, **nodes) for _ in range(2))
    _wait_for(out / "checkpoints" / "latest", first, seconds=400)
    second.send_signal(signal.SIGTERM)
    assert [first.wait(), second.wait()] == [75, 75]
    saved = checkpoint.latest(out / "checkpoints")
    assert saved.state()["num_ranks"] == 2 and saved.step < cfg.num_steps


def test_a_wrong_request_is_a_2(log: Path, tmp_path: Path) -> None:
    """Through torchrun, whose own exit code is 1, and not to be tried again."""
    out = str(tmp_path / "run")
    wrong = ("demo", "--data.path", str(tmp_path / "absent"), "--out", out)
    assert _start(log, "torchrun.sh", *wrong, NPROC_PER_NODE="1").wait() == 2


def test_nodes_need_not_end_together(tmp_path: Path, port: int) -> None:
    """The node that hosts the rendezvous ends first, and the other's rank has its own exit code."""
    rank = tmp_path / "rank.py"
    body = "import os, time\ntime.sleep(2 * int(os.environ['RANK']))\nraise SystemExit(75)\n"
    rank.write_text(body)
    options = [*C10D[:-1], C10D[-1].format(port=port), "--nnodes=2", str(rank)]
    command = [sys.executable, "-m", "m3i_fast.cli", "launch", *options]
    first = subprocess.Popen(command)
    while first.poll() is None and not _listens(port):
        time.sleep(0.1)
    second = subprocess.Popen(command)
    assert [first.wait(), second.wait()] == [75, 75]


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        (C10D, "join_timeout"),
        ((*STATIC, "0"), "timeout"),  # a node waits for the others
        ((*STATIC, "1"), "timeout"),  # and the others for the first
    ],
)
def test_a_node_that_never_comes_is_a_76(
    options: tuple[str, ...], limit: str, port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    place = [option.format(port=port) for option in options]
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        asked = ["--nnodes", "2", *place, "--rdzv-conf", f"{limit}=1", "-m", "m3i_fast.cli"]
        assert main(["launch", *asked]) == 76
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    said = capfd.readouterr().err
    assert f"expected 2 to meet at 127.0.0.1:{port}" in said and f"{limit}=SECONDS" in said
    assert "Traceback" not in said


def test_a_verb_stands_for_a_script() -> None:
    node = ["--nproc-per-node", "8"]
    asked = launch.parse([*node, "train", "demo", "--out", "runs/a"])
    assert (asked.module, asked.training_script, asked.nproc_per_node) == (
        True,
        "m3i_fast.cli",
        "8",
    )
    assert asked.training_script_args == ["train", "demo", "--out", "runs/a"]
    before = launch.parse([*node, "-m", "m3i_fast.cli", "train", "demo", "--out", "runs/a"])
    assert vars(before) == vars(asked)
    own = launch.parse([*node, "train.py", "demo"])
    assert (own.module, own.training_script) == (False, "train.py")
    module = launch.parse([*node, "-m", "train", "demo"])
    assert (module.module, module.training_script) == (True, "train")


def test_what_launch_makes_of_exit_codes() -> None:
    usr1, kill = int(signal.SIGUSR1), int(signal.SIGKILL)
    assert [launch.exit_code(code, set()) for code in (2, 75, -kill, -usr1)] == [2, 75, 137, 138]
    assert launch.exit_code(-usr1, {usr1}) == 75  # before the rank could heed it
    assert launch.exit_code(-int(signal.SIGINT), {int(signal.SIGINT)}) == 130
    assert launch.retry_code(["--retry-code=138", "-m", "x"]) == (138, ["-m", "x"])
    assert launch.retry_code(["--retry-code", "138", "-m", "x"]) == (138, ["-m", "x"])
    assert launch.retry_code(["-m", "x"]) == (None, ["-m", "x"])
    for wrong in (["--retry-code"], ["--retry-code=0", "x"], ["--retry-code", "256"]):
        with pytest.raises(ValueError, match="--retry-code: expected a number from 1 to 255"):
            launch.retry_code(wrong)
    assert main(["launch"]) == 2 and main(["launch", "--retry-code=0"]) == 2


@pytest.mark.parametrize(
    ("of_rank", "flags", "expected"),
    [(75, [], 75), (69, [], 69), (75, ["--retry-code=138"], 138), (69, ["--retry-code=138"], 138),
     (1, ["--retry-code=138"], 1)],
)  # fmt: skip
def test_the_retry_code_stands_for_what_may_be_started_again(
    of_rank: int, flags: list[str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "run_torchrun", lambda arguments, forward: of_rank)
    monkeypatch.setattr(launch.signal, "signal", lambda number, handler: None)
    assert launch.main([*flags, "train", "demo"]) == expected


def test_signals_go_to_children_that_lead_a_session() -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    rank, other = subprocess.Popen(sleep, start_new_session=True), subprocess.Popen(sleep)
    try:
        found = launch._ranks()
        assert rank.pid in found and other.pid not in found
    finally:
        for process in (rank, other):
            process.kill()
            process.wait()
    assert rank.pid not in launch._ranks()
