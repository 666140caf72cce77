"""Forms of control flow in listings that were written by hand, as nvdisasm prints them."""

from __future__ import annotations

from m3i_fast.benchmarks.core.sass.disassembly import parse
from m3i_fast.benchmarks.core.sass.flow import Flow, analyse
from m3i_fast.benchmarks.core.sass.issued import issued


def flow_of(listing: str) -> Flow:
    """A line is a label, or the source line of an instruction and what it is."""
    lines = [".text.written_kernel:"]
    address = 0
    for line in listing.strip().splitlines():
        words = line.split()
        if words[0].endswith(":"):
            lines.append(words[0])
            continue
        lines.append(f'\t//## File "a.cu", line {words[0]}')
        lines.append(f"        /*{address:04x}*/                   {' '.join(words[1:])} ;")
        address += 16
    (kernel,) = parse("\n".join(lines))
    return analyse(kernel)


SIDES = flow_of("""
    10 ISETP.GE.AND P0, PT, R0, 0x1, PT
    10 BSSY B0, `(.L_x_1)
    10 @P0 BRA `(.L_x_2)
    20 FADD R1, R1, R1
    20 FADD R1, R1, R1
    20 BSYNC B0
    .L_x_2:
    21 FMUL R1, R1, R1
    20 FMUL R1, R1, R1
    21 BRA `(.L_x_3)
    .L_x_3:
    21 BSYNC B0
    .L_x_1:
    20 MOV R2, R1
    20 BRA.DIV ~URZ, `(.L_x_5)
    30 SHFL.BFLY PT, R2, R2, 0x1, 0x1f
    .L_x_6:
    31 BRA.CONV ~URZ, `(.L_x_7)
    31 WARPSYNC R3
    31 MOV R4, R4
    .L_x_7:
    32 EXIT
    .L_x_5:
    30 WARPSYNC R3
    30 BRA `(.L_x_6)
    33 NOP
""")


def test_successors() -> None:
    """BSYNC goes on where BSSY said; nothing falls through an unconditional branch."""
    blocks = [[each.opcode for each in block.instructions] for block in SIDES.blocks]
    assert [len(block) for block in blocks] == [3, 3, 3, 1, 2, 1, 1, 2, 1, 2, 1]
    assert [block.successors for block in SIDES.blocks] == [
        (2, 1),
        (4,),
        (3,),
        (4,),
        (9, 5),
        (6,),
        (8, 7),
        (8,),
        (),
        (6,),
        (),
    ]
    assert SIDES.unreachable == 1 and SIDES.entries == (0,) and not SIDES.loops


def test_a_warp_that_keeps_together_and_takes_both_sides() -> None:
    """All but what BRA.DIV leads to, and what BRA.CONV branches over."""
    assert issued(SIDES, {}).total == 3 + 3 + 3 + 1 + 2 + 1 + 1 + 1


def test_a_side_is_left_out_but_not_where_both_join_again() -> None:
    """The join has lines of the side, as ptxas leaves it; a third of a block is not the block."""
    assert issued(SIDES, {}, shares={"a.cu:20": 0}).total == 3 + 3 + 1 + 2 + 1 + 1 + 1
    assert issued(SIDES, {}, shares={"a.cu:21": 0}).total == 3 + 3 + 2 + 1 + 1 + 1
    assert issued(SIDES, {}, shares={"a.cu:20-21": 0}).total == issued(SIDES, {}).total


def test_three_loops_in_one_another() -> None:
    loops = flow_of("""
        1 MOV R0, RZ
        .L_x_0:
        2 IADD3 R0, R0, 0x1, RZ
        .L_x_1:
        3 IADD3 R1, R1, 0x1, RZ
        .L_x_2:
        4 FADD R2, R2, R2
        4 @P0 BRA `(.L_x_2)
        3 @P1 BRA `(.L_x_1)
        2 @P2 BRA `(.L_x_0)
        5 EXIT
    """)
    assert [(each.parent, each.depth, each.length) for each in loops.loops] == [
        (None, 1, 6),
        (0, 2, 4),
        (1, 3, 2),
    ]
    assert (
        issued(loops, {"a.cu:2": 2, "a.cu:3": 5, 2: 7}).total == 1 + 2 * (2 + 5 * (2 + 7 * 2)) + 1
    )


def test_a_call_to_a_label_leaves_a_loop_and_does_not_come_back() -> None:
    loop = flow_of("""
        .L_x_8:
        7 FADD R0, R0, R0
        7 @P0 CALL.REL.NOINC `(.L_x_9)
        6 BRA `(.L_x_8)
        .L_x_9:
        8 EXIT
    """)
    assert loop.entries == (0,) and [each.length for each in loop.loops] == [3]
    assert loop.loops[0].line == ("a.cu", 6) and loop.unreachable == 0


def test_a_loop_with_two_entries_is_none() -> None:
    odd = flow_of("""
        1 @P0 BRA `(.L_x_1)
        .L_x_0:
        2 FADD R0, R0, R0
        .L_x_1:
        3 FADD R0, R0, R0
        3 @P1 BRA `(.L_x_0)
        4 EXIT
    """)
    assert odd.irreducible == 1 and not odd.loops


def test_what_follows_an_if_is_not_avoided() -> None:
    """Its block has lines of the side that is left out, and is what the branch goes to."""
    listing = flow_of("""
        10 @P0 BRA `(.L_x_1)
        20 FADD R0, R0, R0
        20 FADD R0, R0, R0
        .L_x_1:
        20 MOV R1, R0
        20 MOV R2, R0
        30 EXIT
    """)
    assert issued(listing, {}, shares={"a.cu:20": 0}).total == 1 + 3
