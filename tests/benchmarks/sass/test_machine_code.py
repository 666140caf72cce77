"""Kernels of `kernels.cu` whose machine code was counted by hand.

`kernels.sass` is what nvcc 13.0 made of them for sm_80, as nvdisasm 13.5 printed it (-c -hex -gi),
with runs of blanks as one and paths from the checkout: what is counted here needs neither.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from m3i_fast.benchmarks.core.sass.disassembly import Instruction, Kernel, parse
from m3i_fast.benchmarks.core.sass.figures import Figures, figures_of
from m3i_fast.benchmarks.core.sass.flow import Flow, analyse
from m3i_fast.benchmarks.core.sass.issued import issued
from m3i_fast.benchmarks.core.sass.pipes import access_of, atomic_of, class_of, pipe_of

RECORDED = Path(__file__).with_name("kernels.sass")


@cache
def kernels() -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in parse(RECORDED.read_text())}


def flow(name: str) -> Flow:
    return analyse(kernels()[name])


def figures(name: str) -> Figures:
    return figures_of(kernels()[name], "80")


def test_names_lines_and_scoreboards_are_read() -> None:
    names = "loops_kernel vectors_kernel atomics_kernel shuffles_kernel<32> divisions_kernel"
    assert set(kernels()) == set(names.split())
    load, following = (kernels()["shuffles_kernel<32>"].instructions[number] for number in (5, 6))
    assert (load.address, load.opcode, load.operands) == (0x50, "LDG.E", "R0, [R2.64]")
    assert load.signals == 2 and following.waits == 1 << 2  # as the encoding says, by hand
    assert [(Path(file).name, line) for file, line in load.frames] == [("kernels.cu", 38)]
    inlined = [(Path(file).name, line) for file, line in following.frames]
    assert inlined == [("sm_30_intrinsics.hpp", 449), ("kernels.cu", 40)]


# ---- Counts --------------------------------------------------------------------------------------


def test_vectors() -> None:
    """Five loads are issued, by descending waits: for the byte, then for what is added to what."""
    found = figures("vectors_kernel")
    assert (found.instructions, found.longest_block) == (20, 20)
    assert found.accesses == {
        "global load 8-bit": 1,
        "global load 32-bit": 1,
        "global load 64-bit": 2,
        "global load 128-bit": 1,
        "global store 128-bit": 1,
    }
    assert found.loads_in_flight == {"5": 1, "4": 1, "2": 1, "1": 1}
    assert found.by_class == {
        "fp32": 4,
        "half": 1,  # a constant is made by HFMA2
        "integer": 3,
        "imad": 2,
        "convert": 1,
        "global": 6,
        "control": 1,
        "uniform": 1,
        "other": 1,
    }


def first_use_of_a_load(kernel: Kernel) -> int:
    """Loads before the first instruction that reads a register of one of them: no scoreboards."""
    loaded: set[int] = set()
    loads = 0
    for each in kernel.instructions:
        registers = [part.strip() for part in each.operands.replace("[", ",").split(",")]
        read = registers[1:] if not each.opcode.startswith("ST") else registers
        if loaded & {int(r[1:]) for r in read if r[0:1] == "R" and r[1:].isdigit()}:
            return loads
        if each.opcode.startswith("LDG"):
            loads += 1
            first = int(registers[0][1:])
            loaded |= {*range(first, first + {"128": 4, "64": 2}.get(each.modifiers[-1], 1))}
    return loads


def test_loads_in_flight_are_those_before_the_first_register_that_is_read() -> None:
    for name in ("vectors_kernel", "shuffles_kernel<32>"):
        assert figures(name).most_in_flight == first_use_of_a_load(kernels()[name])


def test_atomics() -> None:
    """Of one address a warp adds up by REDUX before, and one lane alone goes to memory."""
    assert figures("atomics_kernel").atomics == {
        "ATOMG CAS 32": 1,
        "ATOMS ADD 32": 1,
        "RED ADD 64": 1,
        "RED ADD F32": 1,
        "RED MAX 32": 1,
        "REDUX MAX 32": 1,
        "REDUX SUM 32": 1,
    }


def test_shuffles() -> None:
    found = figures("shuffles_kernel<32>")
    assert (found.by_class["shuffle"], found.by_class["fp32"]) == (5, 5)
    assert not found.loops and found.filling == 14 and found.spills == 0


def test_loops() -> None:
    """The third is that of a cosine of a large number, which goes through local memory."""
    found = figures("loops_kernel")
    told = [(loop.depth, loop.parent, loop.instructions, loop.own) for loop in found.loops]
    assert told == [(1, None, 114, 91), (2, 0, 9, 9), (2, 0, 14, 14)]
    assert [loop.line for loop in found.loops] == [f"kernels.cu:{line}" for line in (6, 8, 10)]
    assert found.spills == 5
    branches = 17  # 10 BRA in the kernel and 4 in the subroutine, CALL, EXIT and RET
    assert found.branch_share == branches / found.instructions


@pytest.mark.parametrize(
    ("opcode", "kind", "pipe"),
    [
        ("FFMA.FTZ", "fp32", "fma"),
        ("IMAD.MOV.U32", "imad", "fma"),
        ("HFMA2.BF16_V2", "half", "half"),
        ("FMNMX", "integer", "alu"),
        ("MUFU.EX2", "mufu", "xu"),
        ("I2F.U16", "convert", "xu"),
        ("F2FP.BF16.F32.PACK_AB", "convert", "alu"),
        ("HMMA.16816.F32.BF16", "tensor", "tensor"),
        ("HGMMA.64x256x16.F32.BF16", "tensor", "tensor"),
        ("UTMAREDG.2D.ADD", "tma", "tma"),
        ("UIADD3.X", "uniform", "uniform"),
        ("ULDC.64", "uniform", "uniform"),
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT", "barrier", "control"),
        ("UCGABAR_ARV", "barrier", "control"),
        ("NEWNAME.64", "other", "other"),
    ],
)
def test_classes(opcode: str, kind: str, pipe: str) -> None:
    instruction = Instruction(0, "", opcode, "")
    assert (class_of(instruction), pipe_of(instruction)) == (kind, pipe)


def test_widths_and_types() -> None:
    accesses = {
        "LDG.E.U16.CONSTANT": "global load 16-bit",
        "LDGSTS.E.BYPASS.128": "global copy 128-bit",
        "LDSM.16.MT88.4": "shared load 128-bit",
        "STS.U8": "shared store 8-bit",
        "STL.64": "local store 64-bit",
    }
    for opcode, told in accesses.items():
        assert str(access_of(Instruction(0, "", opcode, ""))) == told
    for opcode, told in {
        "RED.E.ADD.F32x4.RN.STRONG.GPU": "RED ADD F32x4",
        "REDG.E.ADD.F16x2.RN.STRONG.GPU": "REDG ADD F16x2",
        "ATOMS.POPC.INC.32": "ATOMS POPC 32",
    }.items():
        assert atomic_of(Instruction(0, "", opcode, "")) == told


# ---- What a warp issues --------------------------------------------------------------------------

ROWS, COLUMNS = 3, 7
# Addresses: begin to 0x80, once before the loops, a row, an element, behind the inner loop and at
# the end of a row, and what follows the loops.
PLAIN = 8 + 1 + ROWS * (4 + 9 * COLUMNS + 2 + 1) + 5
LOOPS = {"kernels.cu:6": ROWS, "kernels.cu:8": COLUMNS, "kernels.cu:10": 6}


def test_issued_of_nested_loops_without_cold_code() -> None:
    found = issued(flow("loops_kernel"), LOOPS, shares={"kernels.cu:10": 0})
    assert found.total == PLAIN
    assert sum(found.by_class.values()) == sum(found.by_pipe.values()) == PLAIN
    assert found.by_loop == {None: 14, 0: ROWS * 7, 1: ROWS * COLUMNS * 9}
    assert found.by_class["global"] == ROWS * COLUMNS + 1


def test_issued_with_a_branch_that_is_taken() -> None:
    """The root by MUFU instead of the subroutine, the cosine of a small number: 34 a row."""
    fast = {"0x200": 0, "$sqrt": 0}
    found = issued(flow("loops_kernel"), LOOPS, shares=fast)
    assert found.total == PLAIN + ROWS * (8 + 21 + 4 + 1)
    half = issued(flow("loops_kernel"), LOOPS, shares={"kernels.cu:10": 0.5, **fast})
    assert half.total == PLAIN + ROWS * (8 + 21 + 4 + 1) / 2


def test_issued_of_a_subroutine() -> None:
    """20 instructions in line for numbers of 32 bits, or a call of 83."""
    divisions = flow("divisions_kernel")
    trips = {0: 10.0}
    in_line = issued(divisions, trips, shares={"$div_s64": 0})
    assert in_line.total == 4 + 5 + 10 * (11 + 20 + 6) + 1
    both = issued(divisions, trips)
    assert both.total == in_line.total + 10 * (2 + 1 + 83)


def test_issued_of_one_trip() -> None:
    found = issued(flow("loops_kernel"), LOOPS, region="kernels.cu:8")
    assert found.total == 9
    row = issued(flow("loops_kernel"), LOOPS, shares={"kernels.cu:10": 0}, region="kernels.cu:6")
    assert row.total == 7 + 9 * COLUMNS


def test_a_loop_without_trips_and_a_place_that_is_not_there_are_errors() -> None:
    loops = flow("loops_kernel")
    with pytest.raises(ValueError, match="a count for loops 1, 2, got none; .* kernels.cu:8"):
        issued(loops, {"kernels.cu:6": 3})
    with pytest.raises(ValueError, match="the line of a loop, got kernels.cu:7; .* has loops 0 of"):
        issued(loops, {"kernels.cu:7": 3}, other_trips=1)
    with pytest.raises(ValueError, match="a loop of 0 to 2, got 3"):
        issued(loops, {3: 1}, other_trips=1)
    with pytest.raises(ValueError, match="expected code of kernels.cu:99, got none"):
        issued(loops, LOOPS, shares={"kernels.cu:99": 0})
    with pytest.raises(ValueError, match="expected FILE:LINE, .* got 'line 9'"):
        issued(loops, LOOPS, shares={"line 9": 0})
