"""What only compute capability 9.0 has, in the emulator, and the faults that it reports there."""

from __future__ import annotations

import ctypes
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cuda.hopper.barrier_faults import FAULTS
from tests.shared.cuda import emulator
from tests.shared.cuda.emulator import KERNELS
from tests.shared.cuda.fault import Fault
from tests.shared.cuda.nvcc import instructions

INT = torch.int32


@pytest.fixture(autouse=True)
def hopper() -> Iterator[None]:
    with emulator.emulated_gpu(90):
        yield


def report_of(source: Path, launcher: str, *arguments: Tensor | int) -> str:
    """What the launcher's kernel is reported for; empty if for nothing."""
    library = emulator.build_kernels([source], include=[KERNELS], architecture=90)
    error = getattr(ctypes.CDLL(str(library)), launcher)(*map(emulator.to_c, arguments))
    return emulator.last_report() if error else ""


def run(kernels: str, launcher: str, *arguments: Tensor | int) -> None:
    assert report_of(KERNELS / f"{kernels}.cu", launcher, *arguments) == ""


def integers(*shape: int) -> Tensor:
    return emulator.guarded(torch.randint(-999, 999, shape, dtype=INT))


# ---- mbarriers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [0, 1, 3, 20])
def test_ring_hands_slots_over(num_steps: int) -> None:
    values, out = integers(max(num_steps, 1), 32), integers(max(num_steps, 1), 2, 32)
    run("mbarrier", "ring", values, out, num_steps)
    expected = values.flip(1)[:, None] * torch.tensor([1, 2], dtype=INT)[:, None]
    assert torch.equal(out[:num_steps], expected[:num_steps])


def test_polling_lets_the_others_run() -> None:
    values, out = integers(7, 32), integers(7, 32)
    run("mbarrier", "poll", values, out, 7)
    assert torch.equal(out, values.flip(1))


ARRIVE, ARRIVE_EXPECT_TX, EXPECT_TX, COMPLETE_TX, TRY_WAIT = range(5)


class Model:
    """An mbarrier as the PTX ISA describes it: counts of a phase, and the phase's parity."""

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = self.parity = 0

    def do(self, operation: int, argument: int) -> bool:
        if operation == TRY_WAIT:
            return self.parity != argument
        self.pending -= operation in (ARRIVE, ARRIVE_EXPECT_TX)
        self.bytes += argument if operation in (ARRIVE_EXPECT_TX, EXPECT_TX) else 0
        self.bytes -= argument if operation == COMPLETE_TX else 0
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.parity = self.count, 1 - self.parity
        return False


def random_script(model: Model, length: int) -> list[tuple[int, int, bool]]:
    """Operations, arguments, what a try_wait finds. None arrives where only bytes are awaited."""
    script = []
    for _ in range(length):
        operation = random.choice(
            [COMPLETE_TX if model.bytes > 0 else EXPECT_TX]
            if model.pending == 0
            else [ARRIVE, ARRIVE_EXPECT_TX, EXPECT_TX, COMPLETE_TX]
        )
        awaited = abs(model.bytes)
        argument = 0 if operation == ARRIVE else random.choice([awaited or 16, 16, 1024])
        for step in ((operation, argument), (TRY_WAIT, 0), (TRY_WAIT, 1)):
            script.append((*step, model.do(*step)))
    return script


@pytest.mark.parametrize("count", [1, 2, 5])
def test_phases_complete_as_in_the_ptx_isa(count: int) -> None:
    random.seed(count)
    model = Model(count)
    script = random_script(model, 400)
    found = [complete for *_, complete in script]
    assert 100 < sum(found) < len(found)
    operations = emulator.guarded(torch.tensor([step[:2] for step in script], dtype=INT))
    out = emulator.guarded(torch.zeros(len(script), dtype=INT))
    run("mbarrier", "script", operations, out, len(script), count)
    assert out.tolist() == found


def test_an_earlier_gpu_has_no_mbarrier() -> None:
    with emulator.emulated_gpu(80):
        report = report_of(KERNELS / "mbarrier.cu", "ring", integers(1, 32), integers(2, 32), 1)
    assert "mbarrier_init on compute capability 8.0" in report


def test_mbarriers_are_single_instructions(tmp_path: Path) -> None:
    kernels = instructions(KERNELS / "mbarrier.cu", "90a", tmp_path)
    (script,) = (code for name, code in kernels.items() if "script_kernel" in name)
    used = {op for op in script if op.startswith("SYNCS")}
    for expected in ("EXCH", "ARRIVE", "PHASECHK"):  # init, arrive, try_wait
        assert any(expected in op for op in used), used


# ---- Clusters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", ["exchange", "put"])
@pytest.mark.parametrize(("blocks", "cluster"), [(1, 1), (2, 2), (6, 2), (6, 3), (8, 8)])
def test_blocks_of_a_cluster_exchange_shared_memory(
    launcher: str, blocks: int, cluster: int
) -> None:
    values, out = integers(blocks, 64), integers(blocks, 64)
    run("cluster", launcher, values, out, blocks, cluster)
    rank = torch.arange(blocks) % cluster
    first = torch.arange(blocks) - rank
    if launcher == "exchange":
        taken = (rank + 1) % cluster
        expected = values[first + taken].flip(1) + taken[:, None]
    else:
        expected = values[first + (rank - 1) % cluster].flip(1)
    assert torch.equal(out, expected.int())


@pytest.mark.parametrize(("blocks", "cluster"), [(2, 2), (6, 3)])
def test_remote_arrivals_hand_slots_over(blocks: int, cluster: int) -> None:
    values, out = integers(9, 64), integers(9, blocks, 64)
    run("cluster", "broadcast", values, out, blocks, cluster, 9)
    takes = torch.arange(blocks) % cluster != 0
    assert torch.equal(out[:, takes], values.flip(1)[:, None].expand(-1, int(takes.sum()), -1))


@pytest.mark.parametrize(("at_once", "takers"), [(1, [0] * 9), (3, [0, 1, 2] * 3)])
def test_clusters_take_turns_at_each_ticket(at_once: int, takers: list[int]) -> None:
    tickets, drawn = emulator.guarded(torch.zeros(1, dtype=INT)), integers(9)
    with emulator.clusters_at_once(at_once):
        run("cluster", "tickets", tickets, drawn, 6, 2, 9)
    assert drawn.tolist() == takers


@pytest.mark.parametrize(
    ("blocks", "cluster", "architecture", "error"),
    [(4, 3, 90, 9), (9, 9, 90, 912), (4, 0, 90, 912), (4, 2, 80, 801)],
)
def test_limits_of_a_cluster(blocks: int, cluster: int, architecture: int, error: int) -> None:
    library = emulator.build_kernels([KERNELS / "cluster.cu"], include=[KERNELS], architecture=90)
    pointers = map(emulator.to_c, (integers(blocks, 64), integers(blocks, 64)))
    with emulator.emulated_gpu(architecture):
        assert ctypes.CDLL(str(library)).exchange(*pointers, blocks, cluster) == error


def test_a_logged_launch_has_its_cluster(tmp_path: Path) -> None:
    log = tmp_path / "launches.jsonl"
    with emulator.logged_launches(log):
        run("cluster", "exchange", integers(6, 64), integers(6, 64), 6, 2)
    launch = json.loads(log.read_text())
    assert (launch["grid"], launch["cluster"], launch["shared"]) == ([6, 1, 1], 2, 64 * 4)


def test_cluster_barriers_are_single_instructions(tmp_path: Path) -> None:
    kernels = instructions(KERNELS / "cluster.cu", "90a", tmp_path)
    (exchange,) = (code for name, code in kernels.items() if "exchange_kernel" in name)
    for opcode in ("UCGABAR_ARV", "UCGABAR_WAIT"):
        assert sum(op == opcode for op in exchange) == 2, opcode


# ---- Registers ----------------------------------------------------------------------------------


def test_registers_pass_from_one_warpgroup_to_others() -> None:
    out = integers(384)
    run("registers", "give_and_take", out)
    assert out.tolist() == [group for group in range(3) for _ in range(128)]


def test_ptxas_does_not_ignore_setmaxnreg(tmp_path: Path) -> None:
    (code,) = instructions(KERNELS / "registers.cu", "90a", tmp_path).values()
    assert sum(op.startswith("USETMAXREG") for op in code) == 2


# ---- Faults -------------------------------------------------------------------------------------

CALLS = {
    "ring": lambda: (integers(20, 32), integers(20, 2, 32), 20),
    "poll": lambda: (integers(7, 32), integers(7, 32), 7),
    "give_and_take": lambda: (integers(384),),
    "exchange": lambda: (integers(4, 64), integers(4, 64), 4, 2),
    "put": lambda: (integers(4, 64), integers(4, 64), 4, 2),
    "broadcast": lambda: (integers(9, 64), integers(9, 6, 64), 6, 3, 9),
}


@pytest.mark.parametrize(
    ("script", "count", "expected"),
    [
        (
            [(ARRIVE_EXPECT_TX, 16), (ARRIVE, 0)],
            1,
            "all 1 arrivals of phase 0 .* 16 bytes have not",
        ),
        ([(ARRIVE_EXPECT_TX, 1 << 19)] * 2, 3, r"more than 2\^20 - 1 bytes are expected"),
        ([(TRY_WAIT, 2)], 1, "for parity 2: expected 0 or 1"),
        ([], 0, "for 0 arrivals: expected 1 to"),
        ([], 1 << 20, "for 1048576 arrivals: expected 1 to"),
    ],
)
def test_operations_that_an_mbarrier_cannot_do(
    script: list[tuple[int, int]], count: int, expected: str
) -> None:
    operations = emulator.guarded(torch.tensor([*script, (TRY_WAIT, 0)], dtype=INT))
    out = integers(len(script) + 1)
    report = report_of(KERNELS / "mbarrier.cu", "script", operations, out, len(out), count)
    assert re.search(
        f"on the mbarrier of 8 bytes .* of shared variable .*::barrier.*{expected}", report
    )


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_planted_fault_is_reported(fault: Fault, tmp_path: Path) -> None:
    source = tmp_path / f"{fault.source}.cu"
    shutil.copy(KERNELS / source.name, source)
    fault.plant(source)
    report = report_of(source, fault.launcher, *CALLS[fault.launcher]())
    assert re.search(fault.report, report), report
    assert f"{source.name}:" in report, report
