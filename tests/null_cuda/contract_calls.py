"""The calls of the registry of ops: the streams and kernels that they launch, and their numbers.

`make gpu` compares the results of these calls on a card. Here the emulator computes them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from m3i_fast.benchmarks.launches.trace import StepTrace, read_trace, split_at_marks
from m3i_fast.op_registry import OPS
from scripts.null_cuda import environment

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ROOT / "build" / "null"
NAMES = [op.name for op in OPS]
WORK = ("launch", "library", "copy", "fill")


def on_null(folder: Path, program: str, *words: str, card: str = "h100") -> list[dict[str, Any]]:
    """Run a program on the null runtime; return its lines of JSON. The trace is in the folder."""
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        env=environment(LIBRARIES, trace=folder / "trace.jsonl", root=ROOT, card=card),
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


# ---- Streams -------------------------------------------------------------------------------------

CAPTURED = """
import ctypes, sys
from dataclasses import replace
import torch
from m3i_fast.op_registry import OPS
from m3i_fast.ops.library import m3i  # registered

mark = ctypes.CDLL(None).null_cuda_mark
if "--plant" in sys.argv:
    launch = torch.library.get_kernel("m3i::mask_mix", "CUDA")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

    def on_stream_0(*args):
        with torch.cuda.stream(torch.cuda.default_stream()):
            return launch.call_boxed(keys, *args)

    library = torch.library.Library("m3i", "IMPL")
    library.impl("mask_mix", on_stream_0, "CUDA", allow_override=True)
    held = torch.empty(1, device="cuda")  # keeps its segment, for results during a capture
(op,) = (op for op in OPS if op.name == sys.argv[1])
for call in op.calls("--plant" not in sys.argv):
    inputs = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in call.inputs.items()}
    call = replace(call, inputs=inputs)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call.results("cuda")  # what is prepared once
        mark(f"eager {call.what}".encode())
        call.results("cuda")
    graph = torch.cuda.CUDAGraph()
    mark(f"captured {call.what}".encode())
    with torch.cuda.graph(graph, stream=side):
        call.results("cuda")
    mark(f"replayed {call.what}".encode())
    graph.replay()
    mark(b"end")
"""


def work(step: StepTrace) -> list[tuple[str, str, int, bool]]:
    """What a step asked for, in order: kind, name, stream, and whether a capture has it."""
    return [
        (r["kind"], r["name"] if r["kind"] == "launch" else str(r.get("call", r.get("bytes"))),
         r["stream"], "capture" in r)
        for r in step.records if r["kind"] in WORK
    ]  # fmt: skip


def calls_of(folder: Path, op: str, *words: str) -> Iterator[tuple[StepTrace, ...]]:
    """Yield the eager, the captured and the replayed step of each call of an op."""
    on_null(folder, CAPTURED, op, *words)
    steps = split_at_marks(read_trace(folder / "trace.jsonl"))
    by_kind = [
        [step for step in steps if step.name.startswith(f"{kind} ")]
        for kind in ("eager", "captured", "replayed")
    ]
    assert by_kind[0]
    yield from zip(*by_kind, strict=True)


def complaints(eager: StepTrace, captured: StepTrace, replayed: StepTrace) -> list[str]:
    """Return how a captured call differs from an eager one on the same stream."""
    expected, got = work(eager), work(captured)
    (stream,) = {r["stream"] for r in captured.of("capture") if r["state"] == "begin"}
    found = [f"{each[1]}: eager on stream {each[2]}" for each in expected if each[2] != stream]
    found += [f"{each[1]}: captured on stream {each[2]}" for each in got if each[2] != stream]
    found += [f"{each[1]}: in no capture" for each in got if not each[3]]
    if [each[:2] for each in expected] != [each[:2] for each in got]:
        found.append(f"expected the eager call's {expected}, got {got}")
    launches = sum(each[0] in ("launch", "library") for each in expected)
    (replay,) = replayed.of("replay")
    if replay["launches"] != launches or not launches:
        found.append(f"expected {launches} launches of a replay, got {replay['launches']}")
    return found


@pytest.mark.parametrize("op", NAMES)
def test_a_captured_call_has_all_kernels_of_the_eager_one(tmp_path: Path, op: str) -> None:
    for eager, captured, replayed in calls_of(tmp_path, op):
        assert complaints(eager, captured, replayed) == [], eager.name


def test_a_kernel_on_another_stream_is_found(tmp_path: Path) -> None:
    for steps in calls_of(tmp_path, "mask_mix", "--plant"):
        found = complaints(*steps)
        for fault in ("captured on stream 0", "in no capture", "1 launches of a replay, got 0"):
            assert any(fault in each for each in found), found


# ---- Numbers -------------------------------------------------------------------------------------

COMPUTED = """
import json, sys
import torch
from m3i_fast.benchmarks.launches.on_host import ComputeOnHost
from m3i_fast.benchmarks.launches.trace import launched, our_kernel
from m3i_fast.op_registry import OPS
from tests.null_cuda.emulated_run import held_operators
from tests.shared.cuda import emulator

(op,) = (op for op in OPS if op.name == sys.argv[1])
major, minor = torch.cuda.get_device_capability()
# Margin 2: the CPU's kernels, too, may differ from float64 by as much as is right.
held = held_operators([op.name], emulator.CUDA, 10 * major + minor, margin=2.0)
for call in op.calls(False):
    kernels = {our_kernel(name) for name in launched(lambda: call.results("cuda"))} - {None}
    with ComputeOnHost(held):
        error = call.error("cuda")
    print(json.dumps({"what": call.what, "error": error, "kernels": sorted(kernels)}))
assert any(each.calls for each in held.values())
"""
CAPABILITIES = {"h100": "9.0", "a100": "8.0"}


@pytest.mark.parametrize("card", CAPABILITIES)
def test_results_of_cuda_kernels_are_right_and_no_kernel_of_a_step_is_left_out(
    tmp_path: Path, card: str
) -> None:
    """The emulator computes them from the sources; those of GPU sizes are computed on a GPU."""
    rows = [row for op in NAMES for row in on_null(tmp_path, COMPUTED, op, card=card)]
    assert {row["what"]: row["error"] for row in rows if not row["error"] <= 1} == {}
    expected = json.loads((ROOT / "scripts" / "gpu" / "expected.json").read_text())
    compared = {kernel for row in rows for kernel in row["kernels"]}
    assert expected[CAPABILITIES[card]]["kernels"].keys() - compared == set()
