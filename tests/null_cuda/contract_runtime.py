"""The null runtime under the real CUDA torch: what it does, and that each of its watchers sees."""

from __future__ import annotations

import json
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest

from m3i_fast.benchmarks.launches.trace import read_trace, split_at_marks
from scripts.null_cuda import environment, program

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ROOT / "build" / "null"
PRELUDE = "import ctypes, json, torch\nmark = ctypes.CDLL(None).null_cuda_mark\n"

Records = list[dict[str, Any]]


def on_null(tmp_path: Path, code: str, **settings: object) -> tuple[Any, Records]:
    """Run a program on the null runtime; return the JSON that it printed last, and its trace."""
    script, trace = tmp_path / "program.py", tmp_path / "trace.jsonl"
    trace.unlink(missing_ok=True)
    script.write_text(PRELUDE + textwrap.dedent(code))
    variables = environment(LIBRARIES, trace=trace, root=tmp_path, **settings)
    done = subprocess.run(
        program(script), env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), list(read_trace(trace))


def line_of(tmp_path: Path, statement: str) -> str:
    """Return FILE:LINE of the program's line with this statement."""
    script = tmp_path / "program.py"
    numbers = [n for n, line in enumerate(script.read_text().splitlines(), 1) if statement in line]
    return f"{script}:{numbers[0]}"


def of_kind(records: Records, kind: str) -> Records:
    return [record for record in records if record["kind"] == kind]


@pytest.mark.parametrize(
    ("card", "capability", "memory_gib"),
    [("a100", [8, 0], 80), ("h100", [9, 0], 80), ("b200", [10, 0], 180)],
)
def test_torch_sees_the_card(
    tmp_path: Path, card: str, capability: list[int], memory_gib: int
) -> None:
    program = """
        p = torch.cuda.get_device_properties(0)
        x = torch.ones(4, device="cuda") + 1
        print(json.dumps([torch.cuda.get_device_capability(), p.total_memory >> 30]))
    """
    seen, records = on_null(tmp_path, program, card=card)
    assert seen == [capability, memory_gib]
    (launch,) = of_kind(records, "launch")[-1:]
    assert "CUDAFunctorOnSelf_add" in launch["name"]
    assert launch["architecture"] == 10 * capability[0] + capability[1]


@pytest.mark.parametrize("call", ["(x * 2).sum().backward()", "torch.autograd.grad(x.exp(), x)"])
def test_programs_end_right_after_a_backward_pass(tmp_path: Path, call: str) -> None:
    """A third of them abort if autograd's thread still holds the pass (`release_last_backward`)."""
    script = tmp_path / "program.py"
    script.write_text(
        "import torch\nx = torch.ones((), device='cuda', requires_grad=True)\n"
        f"for _ in range(3):\n    {call}\n"
    )
    for _ in range(4):
        started = [
            subprocess.Popen(program(script), env=environment(LIBRARIES), stderr=subprocess.PIPE)
            for _ in range(3)
        ]
        ends = [(each.communicate(timeout=300)[1], each.returncode) for each in started]
        assert ends == [(b"", 0)] * 3


def test_copies_and_waits_are_told_apart_with_their_line(tmp_path: Path) -> None:
    program = """
        x = torch.zeros(1000, device="cuda")
        pinned = torch.ones(1000).pin_memory()
        mark(b"pageable")
        x.copy_(torch.ones(1000))
        mark(b"pinned")
        x.copy_(pinned, non_blocking=True)
        mark(b"item")
        value = x.sum().item()
        mark(b"end")
        print(json.dumps(x[:2].cpu().tolist()))
    """
    seen, records = on_null(tmp_path, program)
    assert seen == [1.0, 1.0]
    steps = {step.name: step for step in split_at_marks(records)}
    assert steps["pageable"].copied_bytes == {("pageable", "device"): 4000}
    assert [wait["line"] for wait in steps["pageable"].of("wait")] == [
        line_of(tmp_path, "x.copy_(torch.ones")
    ]
    assert steps["pinned"].copied_bytes == {("pinned", "device"): 4000}
    assert not steps["pinned"].of("wait")
    assert [wait["line"] for wait in steps["item"].of("wait")] == [
        line_of(tmp_path, "x.sum().item()")
    ]
    assert steps["item"].num_launches == 1


def test_pinned_memory_written_before_the_copy_is_done_is_a_fault(tmp_path: Path) -> None:
    program = """
        pinned = torch.ones(1000).pin_memory()
        x = pinned.to("cuda", non_blocking=True)
        {wait}
        pinned.fill_(2)
        torch.cuda.synchronize()
        print(json.dumps(0))
    """
    _, records = on_null(tmp_path, program.format(wait=""))
    (fault,) = of_kind(records, "fault")
    assert "written before" in fault["what"]
    assert fault["line"] == line_of(tmp_path, "pinned.to(")
    _, records = on_null(tmp_path, program.format(wait="torch.cuda.synchronize()"))
    assert not of_kind(records, "fault")


def test_a_delayed_copy_is_there_once_the_host_has_waited(tmp_path: Path) -> None:
    program = """
        x = torch.full((4,), 3.0).to("cuda")
        host = torch.zeros(4).pin_memory()
        host.copy_(x, non_blocking=True)
        early = host[0].item()
        torch.cuda.synchronize()
        print(json.dumps([early == 3.0, host[0].item()]))
    """
    assert on_null(tmp_path, program, delay=1)[0] == [False, 3.0]
    assert on_null(tmp_path, program)[0] == [True, 3.0]


def test_a_capture_refuses_what_cuda_refuses(tmp_path: Path) -> None:
    program = """
        def captured(body):
            try:
                with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
                    body()
            except Exception as error:
                return str(error).split("(")[0]
            graph.replay()
            return "replayed"
        x = torch.ones(8, device="cuda")
        side = torch.cuda.Stream()
        def unjoined():
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                x * 2
        def joined():
            unjoined()
            torch.cuda.current_stream().wait_stream(side)
        bodies = lambda: x * 2, lambda: x.sum().item(), lambda: torch.ones(4).to("cuda")
        print(json.dumps([captured(body) for body in (*bodies, unjoined, joined)]))
    """
    seen, records = on_null(tmp_path, program)
    assert seen == [
        "replayed",
        "CUDA error: cudaErrorStreamCaptureInvalidated ",
        "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor "
        "is pinned. Please use tensor.pin_memory",
        "CUDA error: cudaErrorStreamCaptureUnjoined ",
        "replayed",
    ]
    replays = of_kind(records, "replay")
    assert [replay["launches"] for replay in replays] == [1, 1]


def test_memory_ends_where_it_is_said_to(tmp_path: Path) -> None:
    program = """
        held = torch.empty(48 << 20, dtype=torch.uint8, device="cuda")
        try:
            torch.empty(32 << 20, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError as error:
            print(json.dumps(str(error)))
    """
    seen, records = on_null(tmp_path, program, memory=64 << 20)
    assert "total capacity of 64.00 MiB of which 16.00 MiB is free" in seen
    assert {record["code"] for record in of_kind(records, "error")} == {2}


@pytest.mark.parametrize(
    ("code", "messages"),
    [(9, ["InvalidConfiguration"]), (719, ["LaunchFailure", "LaunchFailure"])],
)
def test_the_nth_call_fails_as_asked(tmp_path: Path, code: int, messages: list[str]) -> None:
    """After an error that spoils a process's state, as 719, every later call returns it too."""
    program = """
        messages = []
        for _ in range(3):
            try:
                torch.empty(32 << 20, dtype=torch.uint8, device="cuda") + 1
            except Exception as error:
                messages.append(str(error).split(" (")[0])
        print(json.dumps(messages))
    """
    seen, _ = on_null(tmp_path, program, fail=f"cudaLaunchKernel:2:{code}")
    assert seen == [f"CUDA error: cudaError{message}" for message in messages]
