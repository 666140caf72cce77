"""Planted faults, each of which a watcher of the null runtime finds with its Python line.

`contract_runtime.py` has those of copies that wait, of pinned memory that is written too early, of
captures and of collectives; `contract_recipes.py` a wait in a training step, `contract_runs.py` a
race in one.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from m3i_fast.benchmarks.launches.trace import StepTrace, split_at_marks
from tests.null_cuda.contract_runtime import line_of, of_kind, on_null
from tests.shared.cuda.nvcc import find_nvcc

PLANTED = """
    import ctypes
    x = torch.zeros(64, 64, device="cuda")
    side = torch.cuda.Stream()
    mark(b"expanded")
    try:
        torch.ones(1, 64).expand(64, 64).pin_memory()
    except RuntimeError as error:
        refused = str(error).split(":")[0]
    torch.ones(1, 64).expand(64, 64).to("cuda", non_blocking=True)
    mark(b"strided")
    torch.ones(64, 128).pin_memory()[:, ::2].to("cuda", non_blocking=True)
    mark(b"side stream")
    with torch.cuda.stream(side):
        x * 2
    mark(b"own stream")
    x * 3
    mark(b"unregistered")
    cudart = torch.cuda.cudart()
    host = torch.ones(1 << 16)
    cudart.cudaHostRegister(host.data_ptr(), host.nbytes, 0)
    copied = host.to("cuda", non_blocking=True)
    cudart.cudaHostUnregister(host.data_ptr())
    mark(b"unregistered when done")
    cudart.cudaHostRegister(host.data_ptr(), host.nbytes, 0)
    copied = host.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    cudart.cudaHostUnregister(host.data_ptr())
    mark(b"captured")
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.sum().item()
    except Exception:
        pass
    mark(b"end")
    print(json.dumps(refused))
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, StepTrace]]:
    """The program with its faults, and what the trace has of each."""
    folder = tmp_path_factory.mktemp("planted")
    refused, records = on_null(folder, PLANTED)
    assert refused == "unsupported operation"  # torch pins nothing that is expanded
    return folder, {step.name: step for step in split_at_marks(records)}


def test_copies_that_torch_makes_of_pageable_memory_in_silence(
    planted: tuple[Path, dict[str, StepTrace]],
) -> None:
    """Of memory that is expanded or has gaps it makes a contiguous copy first, unpinned."""
    folder, steps = planted
    for name, statement in (("expanded", ").to("), ("strided", "[:, ::2].to(")):
        (copy,) = steps[name].of("copy")
        assert (copy["from"], copy["to"], copy["bytes"]) == ("pageable", "device", 4 * 64 * 64)
        assert copy["line"] == line_of(folder, statement)


def test_work_on_another_stream(planted: tuple[Path, dict[str, StepTrace]]) -> None:
    folder, steps = planted
    (launch,) = steps["side stream"].of("launch")
    assert launch["stream"] > 0 and launch["line"] == line_of(folder, "x * 2")
    (launch,) = steps["own stream"].of("launch")
    assert launch["stream"] == 0 and "line" not in launch


def test_pinned_memory_that_goes_before_its_copy_is_done(
    planted: tuple[Path, dict[str, StepTrace]],
) -> None:
    folder, steps = planted
    (fault,) = steps["unregistered"].of("fault")
    assert "freed before" in fault["what"]
    assert fault["line"] == line_of(folder, "cudart.cudaHostUnregister")
    assert not steps["unregistered when done"].of("fault")


def test_a_capture_that_waits(planted: tuple[Path, dict[str, StepTrace]]) -> None:
    folder, steps = planted
    first = steps["captured"].of("error")[0]
    assert first["code"] == 900  # cudaErrorStreamCaptureUnsupported
    assert first["line"] == line_of(folder, ".item()")


LAUNCHES = """
#include <cuda_runtime.h>
__global__ void nothing() {}
extern "C" void launch(int blocks, int shared) { nothing<<<blocks, 32, shared>>>(); }
"""


def test_launches_that_no_card_takes(tmp_path: Path) -> None:
    source = tmp_path / "launches.cu"
    source.write_text(LAUNCHES)
    toolkit = find_nvcc().parent.parent
    subprocess.run(
        [
            *(find_nvcc(), source, "-shared", "-o", tmp_path / "launches.so", "-cudart", "shared"),
            *("-Xcompiler=-fPIC", f"-L{toolkit / 'lib'}", "-gencode=arch=compute_90,code=sm_90"),
        ],
        check=True,
    )
    program = f"""
        library = ctypes.CDLL({str(tmp_path / "launches.so")!r})
        library.launch(1, 0)
        library.launch(0, 0)  # an empty grid
        library.launch(1, 64 << 10)  # more shared memory than was asked for
        print(json.dumps(0))
    """
    _, records = on_null(tmp_path, program)
    errors = [(error["code"], error["line"]) for error in of_kind(records, "error")]
    wanted = ((9, "an empty grid"), (1, "more shared"))
    assert errors == [(code, line_of(tmp_path, words)) for code, words in wanted]


STREAMS = """
    from pathlib import Path
    from m3i_fast.benchmarks.launches.stream_order import StreamOrder

    order = StreamOrder(Path(__file__).parent)
    found = {}
    def case(name, body):
        before = len(order.races)
        body()
        torch.cuda.synchronize()
        found[name] = [str(race) for race in order.races[before:]]
    def fork(tensor):
        side.wait_stream(main)
        with torch.cuda.stream(side):
            return tensor * 2
    def joined():
        x = torch.ones(8, device="cuda")
        y = fork(x)
        main.wait_stream(side)
        y + 1
        y.record_stream(main)
        x.add_(1)
    def not_joined():
        x = torch.ones(8, device="cuda")
        y = fork(x)
        y + 3  # reads too early
        torch.cuda.synchronize()
    def written_view():
        x = torch.ones(8, device="cuda")
        y = fork(x)
        x[4:].add_(1)  # writes what is still read
        main.wait_stream(side)
    def freed():
        x = torch.ones(8, device="cuda")
        y = fork(x)
        del x
        main.wait_stream(side)
    def recorded():
        x = torch.ones(8, device="cuda")
        y = fork(x)
        x.record_stream(side)
        del x
        main.wait_stream(side)
    def by_event():
        x = torch.ones(8, device="cuda", requires_grad=True)
        with torch.cuda.stream(side):
            side.wait_stream(main)
            loss = (x * 2).sum()
            event = side.record_event()
        event.synchronize()
        loss.backward()
        x.grad + 1
        main.synchronize()
    with order:
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()
        for body in (joined, not_joined, written_view, freed, recorded, by_event):
            case(body.__name__, body)
    print(json.dumps(found))
"""


def test_uses_of_memory_that_no_wait_orders(tmp_path: Path) -> None:
    found, _ = on_null(tmp_path, STREAMS)
    assert {name for name, races in found.items() if not races} == {
        *("joined", "recorded", "by_event")
    }
    multiplied = line_of(tmp_path, "tensor * 2")
    for name, statement in (("not_joined", "# reads too early"), ("written_view", "# writes what")):
        (race,) = found[name]
        assert race.startswith("aten.mul.Tensor") and "then without a wait aten.add" in race
        assert multiplied in race and line_of(tmp_path, statement) in race
    (race,) = found["freed"]
    assert multiplied in race and "without record_stream" in race
