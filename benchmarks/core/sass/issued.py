"""How many instructions a warp issues on its way through a kernel, from its machine code.

A block's instructions are issued once for each time that control comes to it: the product of the
trip counts of the loops around it. What no loop tells is said by the caller: which source lines are
never reached, or how often they are where it is a share. A warp issues both sides of a branch at
which its lanes part, so both sides count unless one is said to be left out.

    flow = analyse(kernel)
    issued(flow, trips={"add.cu:12": 9}, shares={"add.cu:20-24": 0}).total
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from m3i_fast.benchmarks.core.sass.disassembly import Instruction
from m3i_fast.benchmarks.core.sass.flow import (
    Block,
    Flow,
    Loop,
    dominators,
    is_subroutine_call,
    reverse_postorder,
    reversed_graph,
)
from m3i_fast.benchmarks.core.sass.pipes import CLASSES, PIPES, class_of, pipe_of

Place = str
"""Lines of a source, "fwd.cuh:27" or "fwd.cuh:27-31", by the file's name; an address, "0x1a0"; or
calls of a subroutine, "$rcp_rn_f32_slowpath", by a part of its label."""


@dataclass(frozen=True, slots=True)
class Issued:
    """The instructions that a warp issues."""

    total: float
    by_class: dict[str, float]
    """By class of instructions, those that there are, in the order of CLASSES."""
    by_pipe: dict[str, float]
    by_loop: dict[int | None, float]
    """By the innermost loop's number; None: outside of all loops."""
    times: dict[int, float]
    """How often a warp comes to each block."""


def issued(
    flow: Flow,
    trips: Mapping[int | Place, float],
    *,
    shares: Mapping[Place, float] | None = None,
    other_trips: float | None = None,
    region: Place | None = None,
) -> Issued:
    """Count the instructions that a warp issues.

    trips: how often the body of each loop runs each time that control comes to it, by the loop's
    number or by a line of the branch back to its begin. other_trips: that of loops which `trips`
    leaves out; None: they are an error. shares: how often the blocks of these places are reached
    where control comes by; 0 leaves them out, and what only they lead to. A block is of the lines
    of which more than half of its instructions are, calls that were inlined there included.
    region: count one trip of the loop of this line, or the blocks of these lines, instead of all.

    Raises ValueError for a loop without trips, and for a place that the kernel does not have.
    """
    shares = shares or {}
    trips_of = _trips_of(flow, trips, other_trips)
    share_of = _share_of(flow, shares)
    times = _times(flow, trips_of, share_of)
    if region is not None:
        times = _within(flow, times, trips_of, region)
    by_class: Counter[str] = Counter()
    by_pipe: Counter[str] = Counter()
    by_loop: Counter[int | None] = Counter()
    for number, count in times.items():
        around = flow.loops_around(number)
        for each in flow.blocks[number].instructions:
            by_class[class_of(each)] += count  # type: ignore[assignment]
            by_pipe[pipe_of(each)] += count  # type: ignore[assignment]
            by_loop[around[-1].number if around else None] += count  # type: ignore[assignment]
    return Issued(
        total=sum(by_class.values()),
        by_class={name: by_class[name] for name in CLASSES if by_class[name]},
        by_pipe={name: by_pipe[name] for name in dict.fromkeys(PIPES.values()) if by_pipe[name]},
        by_loop=dict(by_loop),
        times=times,
    )


# ---- Places --------------------------------------------------------------------------------------


def is_at(instruction: Instruction, place: Place) -> bool:
    """Whether an instruction is of these lines, by itself or in a call that was inlined there.

    Raises ValueError for a place that is none.
    """
    if place.startswith("$"):
        return is_subroutine_call(instruction) and place[1:] in instruction.operands
    if found := re.fullmatch(r"0x([0-9a-f]+)", place):
        return instruction.address == int(found[1], 16)
    found = re.fullmatch(r"([^:]+):(\d+)(?:-(\d+))?", place)
    if not found:
        raise ValueError(
            f"place: expected FILE:LINE, FILE:FIRST-LAST, 0xADDRESS or $NAME, got {place!r}"
        )
    first, last = int(found[2]), int(found[3] or found[2])
    return any(
        first <= line <= last and (Path(file).name == found[1] or file.endswith("/" + found[1]))
        for file, line in instruction.frames
    )


def _blocks_at(flow: Flow, place: Place) -> list[int]:
    """Return the blocks that are for the most part of these lines."""
    if place.startswith(("0x", "$")):
        found = [b.number for b in flow.blocks if any(is_at(i, place) for i in b.instructions)]
    else:
        found = [
            block.number
            for block in flow.blocks
            if 2 * sum(is_at(each, place) for each in block.instructions) > len(block.instructions)
        ]
    if not found:
        raise ValueError(f"{flow.kernel.name}: expected code of {place}, got none there")
    return found


def _loops_at(flow: Flow, place: Place) -> list[Loop]:
    """Return the loops with a branch back of these lines; else those inlined into them."""
    of_branches = {
        loop.number: [flow.blocks[tail].last for tail in loop.back] for loop in flow.loops
    }
    own = {
        number: [replace(branch, frames=branch.frames[:1]) for branch in branches]
        for number, branches in of_branches.items()
    }
    for candidates in (own, of_branches):
        found = [n for n, branches in candidates.items() if any(is_at(b, place) for b in branches)]
        if found:
            return [flow.loops[number] for number in found]
    return []


# ---- Counts --------------------------------------------------------------------------------------


def _trips_of(
    flow: Flow, trips: Mapping[int | Place, float], other_trips: float | None
) -> dict[int, float]:
    found: dict[int, float] = {}
    for key, count in trips.items():
        if isinstance(key, int):
            if key not in range(len(flow.loops)):
                raise ValueError(f"trips: expected a loop of 0 to {len(flow.loops) - 1}, got {key}")
            found[key] = count
            continue
        loops = _loops_at(flow, key)
        if not loops:
            raise ValueError(f"trips: expected the line of a loop, got {key}; {_told(flow)}")
        found |= {loop.number: count for loop in loops if loop.number not in trips}
    missing = [loop for loop in flow.loops if loop.number not in found]
    if missing and other_trips is None:
        numbers = ", ".join(str(loop.number) for loop in missing)
        raise ValueError(f"trips: expected a count for loops {numbers}, got none; {_told(flow)}")
    return found | {loop.number: other_trips or 0 for loop in missing}


def _told(flow: Flow) -> str:
    """Return the loops as an error names them."""
    lines = [
        f"{loop.number} of {loop.length} instructions at "
        + (f"{Path(loop.line[0]).name}:{loop.line[1]}" if loop.line else f"block {loop.header}")
        for loop in flow.loops
    ]
    return f"{flow.kernel.name} has loops " + "; ".join(lines)


def _share_of(flow: Flow, shares: Mapping[Place, float]) -> dict[int, float]:
    found: dict[int, float] = {}
    for place, share in shares.items():
        for number in _blocks_at(flow, place):
            found[number] = min(share, found.get(number, share))
    return found


def _reached(flow: Flow, entry: int, left_out: set[int]) -> set[int]:
    """Return the blocks that an entry leads to where the others are avoided.

    Not avoided is a block that all ways from one that is reached lead to, as where two sides of a
    branch join again; and of two sides that are both left out, neither.
    """
    graph = {block.number: _followers(block) for block in flow.blocks}
    joins = _postdominators(graph, entry)
    seen: set[int] = set()
    waiting = [entry]
    while waiting:
        number = waiting.pop()
        if number not in seen:
            seen.add(number)
            after = graph[number]
            taken = [each for each in after if each not in left_out or each in joins[number]]
            waiting += taken or after
    return seen


def _postdominators(graph: Mapping[int, tuple[int, ...]], entry: int) -> dict[int, set[int]]:
    """Return, by block, the blocks that every way to the end leads to."""
    order = reverse_postorder(graph, entry)
    end = -1
    backwards: dict[int, list[int]] = {end: [n for n in order if not graph[n]]}
    backwards |= reversed_graph(graph, order)
    above = dominators(backwards, end)
    found: dict[int, set[int]] = {}
    for number in order:
        found[number], at = set(), number
        while above.get(at, end) != end:
            at = above[at]
            found[number].add(at)
    return found


def _followers(block: Block) -> tuple[int, ...]:
    """Return where a warp that keeps together goes on: BRA.DIV is not taken, BRA.CONV is."""
    last = block.last
    if last.stem == "BRA" and len(block.successors) == 2:
        if "DIV" in last.modifiers:
            return block.successors[1:]
        if "CONV" in last.modifiers:
            return block.successors[:1]
    return block.successors


def _times(
    flow: Flow, trips_of: Mapping[int, float], share_of: Mapping[int, float]
) -> dict[int, float]:
    """Return how often a warp comes to each block that it comes to."""
    times: dict[int, float] = {}
    entered = dict.fromkeys(flow.entries, 0.0) | {flow.entries[0]: 1.0}
    left_out = {number for number, share in share_of.items() if share == 0}
    for entry in flow.entries:  # a subroutine calls none that stands before it
        if not entered[entry]:
            continue
        for number in _reached(flow, entry, left_out):
            count = entered[entry] * (share_of.get(number, 1.0) or 1.0)
            for loop in flow.loops_around(number):
                count *= trips_of[loop.number]
            if not count:
                continue
            times[number] = times.get(number, 0.0) + count
            called = flow.blocks[number].calls
            if called is not None:
                entered[called] += count
    return times


def _within(
    flow: Flow, times: Mapping[int, float], trips_of: Mapping[int, float], region: Place
) -> dict[int, float]:
    """Return the times of the blocks of a loop, a trip, or of lines, each time they are reached."""
    loops = _loops_at(flow, region)
    if not loops:
        blocks = _blocks_at(flow, region)
        return {number: times[number] for number in blocks if number in times}
    loop = max(loops, key=lambda each: each.length)
    a_trip = times.get(loop.header, 0.0)
    return {n: times[n] / a_trip for n in loop.blocks if n in times} if a_trip else {}
