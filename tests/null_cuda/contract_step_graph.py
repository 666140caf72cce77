"""Runs of `m3i-fast` whose whole step is captured and replayed, on the null device.

What the graph holds is computed at each replay by the CPU's operators, at the addresses of the
capture: memory that was freed and given away, or a value that was baked in, shows in the numbers.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from m3i_fast.benchmarks.launches.trace import split_at_marks
from m3i_fast.config import TrainConfig
from m3i_fast.config.guard import GuardConfig
from m3i_fast.observe.metrics import read_jsonl
from scripts.null_cuda import environment, program
from tests.null_cuda.contract_runs import (
    EVERY,
    LIBRARIES,
    NUM_STEPS,
    ROOT,
    STOPPED,
    Done,
    config,
    losses,
    saved,
    verb,
)
from tests.shared.engine.small_run import assert_same_run

__all__ = ["config"]  # the fixture

SPOILT = 4  # a replayed step, before the run is stopped
PLANTED = ("--plant", f"nan-once:{SPOILT}")


@pytest.fixture(scope="module")
def graphed(config: TrainConfig) -> TrainConfig:
    """The small run with the graph, its spikes watched and its weight decay changing."""
    optim = replace(config.optim, final_weight_decay=0.4)
    guard = GuardConfig(spikes="skip", spike_window=4)
    return replace(config, cuda_graphs="step", optim=optim, guard=guard)


@pytest.fixture(scope="module")
def replayed(graphed: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A whole run, one of whose replays is not finite; races between streams are looked for."""
    folder = tmp_path_factory.mktemp("replayed")
    words = ("train", "--config", saved(graphed, folder), "--out", folder / "run")
    return folder / "run", verb(folder, *words, options=("--order", *PLANTED))


def test_replayed_steps_are_those_that_are_launched_bit_for_bit(
    graphed: TrainConfig, replayed: tuple[Path, Done], tmp_path: Path
) -> None:
    run, done = replayed
    assert (done.codes, done.races) == ([0], [])
    words = ("train", "--config", saved(graphed, tmp_path), "--out", tmp_path / "run")
    launched = verb(tmp_path, *words, options=("--no-replay", *PLANTED))
    assert not [record for record in launched.trace if record["kind"] == "replay"]
    assert_same_run(run, tmp_path / "run")
    assert (run / "skipped.jsonl").read_text() == (tmp_path / "run" / "skipped.jsonl").read_text()


def test_the_run_learns_as_one_without_the_flag(
    graphed: TrainConfig, replayed: tuple[Path, Done], tmp_path: Path
) -> None:
    """Schedules are rounded to fp32 on their way to the device, and weights decay apart."""
    path = saved(graphed, tmp_path, cuda_graphs="none")
    verb(tmp_path, "train", "--config", path, "--out", tmp_path / "run", options=PLANTED)
    assert losses(replayed[0]) == pytest.approx(losses(tmp_path / "run"), rel=1e-3)


def test_a_replay_that_is_not_finite_is_skipped_and_the_run_goes_on(
    replayed: tuple[Path, Done],
) -> None:
    run, _ = replayed
    (row,) = map(json.loads, (run / "skipped.jsonl").read_text().splitlines())
    assert (row["step"], row["reason"]) == (SPOILT, "not finite")
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["guard/skipped"] for row in rows] == [0, 1, 0]
    assert rows[1]["time/replay_ms"] > 0


def test_a_replayed_step_is_one_launch_of_a_graph_and_one_of_the_schedules(
    replayed: tuple[Path, Done],
) -> None:
    steps = {s.name: s for s in split_at_marks(replayed[1].trace) if s.name != "between"}
    # Of 12 steps the first warms up, the second captures, and every fourth has monitors.
    with_graph = [i for i in range(NUM_STEPS) if steps[f"step {i}"].of("replay")]
    assert with_graph == [i for i in range(1, NUM_STEPS) if (i + 1) % EVERY]
    captures = [r for r in replayed[1].trace if r["kind"] == "capture" and r["state"] == "end"]
    assert len(captures) == 1
    for index in with_graph[1:]:
        if index == SPOILT:
            continue
        step = steps[f"step {index}"]
        assert step.host_launches == 2 and not step.of("library")
        (launch,) = step.of("launch")
        assert "direct_copy_kernel" in launch["name"]
        (replay,) = step.of("replay")
        assert replay["launches"] == captures[0]["launches"] > 500
        assert not any(map(step.of, ("wait", "fill", "error", "fault", "unsupported")))
        assert step.streams == {0}
        assert not [c for c in step.of("copy") if "pageable" in (c["from"], c["to"])]


def test_a_capture_reads_no_memory_of_the_host_but_what_torch_keeps_for_it(
    replayed: tuple[Path, Done],
) -> None:
    captured = [r for r in replayed[1].trace if r["kind"] == "copy" and "capture" in r]
    with_host = [(r["from"], r["to"]) for r in captured if {r["from"], r["to"]} != {"device"}]
    # torch's foreach norm uploads the addresses of its results (torch 2.10 passes them otherwise).
    assert with_host in ([], [("pinned", "device")])


PINNED = """
import torch

def pin():
    return torch.ones(512, dtype=torch.int64).pin_memory()

target = torch.zeros(512, dtype=torch.int64, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph, capture_error_mode="thread_local"):
    source = pin()
    address = source.data_ptr()
    target.copy_(source, non_blocking=True)
    del source
later = [pin() for _ in range(50)]
graph.replay()
torch.cuda.synchronize()
later += [pin() for _ in range(50)]
assert address not in {tensor.data_ptr() for tensor in later}
"""


REFUSED = """
import torch
from m3i_fast.engine.step_graph import GpuRecorder

x = torch.ones(4, device="cuda")
recorder = GpuRecorder(x.device)

def reads():
    return x.sum().item(), x

def grows():
    return torch.empty(2**33, device="cuda"), x

for work, error, told in (
    (reads, RuntimeError, "cuda_graphs step: the step cannot be captured: "),
    (grows, torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate"),
    (reads, RuntimeError, "Set --cuda-graphs modules, or none"),
):
    try:
        recorder.capture(work)
    except error as raised:
        assert told in str(raised), raised
        assert type(raised) is error, raised
    else:
        raise SystemExit(f"{work} was captured")
graph, value, _ = recorder.capture(lambda: (x + 1, x))
graph.replay()
"""


@pytest.mark.parametrize("code", [PINNED, REFUSED], ids=["pinned", "refused"])
def test_on_the_runtime(code: str) -> None:
    """Torch keeps pinned memory that a graph copies from, which its foreach norm relies on.

    And a step that no graph can hold, or that memory does not suffice for, is told with its flag.
    """
    command = program("-c", code)
    done = subprocess.run(
        command, env=environment(LIBRARIES, root=ROOT, memory=2**30), capture_output=True,
        text=True, timeout=300, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_stopped_run_captures_anew_and_goes_on_as_if_it_had_not_stopped(
    graphed: TrainConfig, replayed: tuple[Path, Done], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ("train", "--config", saved(graphed, tmp_path), "--out", run)
    planted = (*PLANTED, "--plant", f"sigterm:{STOPPED - 1}")
    done = verb(tmp_path, *words, "--then", *words, "--resume", options=planted)
    assert done.codes == [75, 0]
    assert_same_run(run, replayed[0])
    assert {r["capture"] for r in done.trace if r["kind"] == "replay"} == {1, 2}


@pytest.mark.nightly
@pytest.mark.parametrize("precision", ["bf16"])
def test_in_bf16_replayed_steps_are_those_that_are_launched(
    graphed: TrainConfig, tmp_path: Path, precision: str
) -> None:
    runs = []
    for options in ((), ("--no-replay",)):
        folder = tmp_path / ("launched" if options else "replayed")
        path = saved(graphed, folder, precision=precision, num_steps=2 * EVERY)
        words = ("train", "--config", path, "--out", folder / "run")
        assert verb(folder, *words, options=options).codes == [0]
        runs.append(folder / "run")
    assert_same_run(*runs)
