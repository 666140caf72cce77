"""The figures of a kernel's machine code: what a report tells and a change is seen by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from m3i_fast.benchmarks.core.sass.disassembly import Instruction, Kernel
from m3i_fast.benchmarks.core.sass.flow import Block, Flow, Loop, analyse
from m3i_fast.benchmarks.core.sass.pipes import (
    BRANCHES,
    CLASSES,
    PIPES,
    Access,
    access_of,
    atomic_of,
    class_of,
    pipe_of,
)


@dataclass(frozen=True, slots=True)
class LoopFigures:
    """A loop of a kernel."""

    number: int
    depth: int
    """1 where it stands in none."""
    parent: int | None
    instructions: int
    """Of its body, loops inside included."""
    own: int
    """Without those of loops inside."""
    line: str
    """Source line of its branch back; empty where it was compiled without -lineinfo."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What is counted of a kernel, each instruction once, in whatever loop it stands."""

    kernel: str
    """Short name with template arguments."""
    architecture: str
    registers: int
    """Of a thread."""
    instructions: int
    """Without those that nothing leads to, which fill up the end."""
    filling: int
    """Those that nothing leads to."""
    by_class: dict[str, int]
    by_pipe: dict[str, int]
    accesses: dict[str, int]
    """Loads, stores and copies by memory and bits a lane, as "global load 128-bit"."""
    atomics: dict[str, int]
    """By opcode, operation and type."""
    loads_in_flight: dict[str, int]
    """How often a warp waits for a load from global memory, by the loads that are then on their
    way, the most first."""
    longest_block: int
    """Instructions in a row without a branch or one that is branched to."""
    loops: list[LoopFigures]
    tensor_between_waits: list[int]
    """Products by warpgroups before each wait for them, in the order of addresses."""
    branch_share: float
    """Of instructions that go elsewhere, calls and ends included."""
    predicated_share: float
    """Of instructions that a predicate may turn off, branches left out."""
    spills: int
    """Loads from and stores to local memory."""

    @property
    def most_in_flight(self) -> int:
        """Return the most loads from global memory that are on their way when a warp waits."""
        return max(map(int, self.loads_in_flight), default=0)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def figures_of(kernel: Kernel, architecture: str) -> Figures:
    """Return a kernel's figures; architecture: as 80 or 90a."""
    flow = analyse(kernel)
    blocks = [block for block in flow.blocks if block.number in flow.owner]
    code = [each for block in blocks for each in block.instructions]
    classes, pipes = Counter(map(class_of, code)), Counter(map(pipe_of, code))
    accesses = Counter(access for each in code if (access := access_of(each)))
    atomics = Counter(atomic for each in code if (atomic := atomic_of(each)))
    branches = sum(each.stem in BRANCHES for each in code)
    predicated = sum(bool(each.predicate) and each.stem not in BRANCHES for each in code)
    return Figures(
        kernel=kernel.name,
        architecture=architecture,
        registers=kernel.registers,
        instructions=len(code),
        filling=flow.unreachable,
        by_class={name: classes[name] for name in CLASSES if classes[name]},
        by_pipe={name: pipes[name] for name in dict.fromkeys(PIPES.values()) if pipes[name]},
        accesses={str(access): accesses[access] for access in sorted(accesses)},
        atomics=dict(sorted(atomics.items())),
        loads_in_flight={
            str(number): count
            for number, count in sorted(Counter(_loads_in_flight(blocks)).items(), reverse=True)
        },
        longest_block=max(len(block.instructions) for block in blocks),
        loops=[_loop_figures(flow, loop) for loop in flow.loops],
        tensor_between_waits=list(_products_between_waits(code)),
        branch_share=branches / len(code),
        predicated_share=predicated / len(code),
        spills=classes["local"],
    )


def _loop_figures(flow: Flow, loop: Loop) -> LoopFigures:
    inside = {number for each in flow.loops if each.parent == loop.number for number in each.blocks}
    own = sum(len(flow.blocks[number].instructions) for number in loop.blocks - inside)
    line = f"{Path(loop.line[0]).name}:{loop.line[1]}" if loop.line else ""
    return LoopFigures(loop.number, loop.depth, loop.parent, loop.length, own, line)


def _loads_in_flight(blocks: list[Block]) -> Iterator[int]:
    """Yield how many loads from global memory are on their way each time that one is waited for.

    A warp waits where an instruction waits for the scoreboard that a load signals; what then is
    there is in flight no more. Loads are carried on to the block that follows by address where
    control falls through to it, and are counted at the end where it does not.
    """
    waiting: list[int] = []  # scoreboards
    for block in blocks:
        for each in block.instructions:
            if any(each.waits >> scoreboard & 1 for scoreboard in waiting):
                yield len(waiting)
                waiting = [s for s in waiting if not each.waits >> s & 1]
            if _is_global_load(each) and each.signals is not None:
                waiting.append(each.signals)
        if block.number + 1 not in block.successors and waiting:
            yield len(waiting)
            waiting = []
    if waiting:
        yield len(waiting)


def _is_global_load(instruction: Instruction) -> bool:
    access = access_of(instruction)
    return isinstance(access, Access) and (access.memory, access.access) == ("global", "load")


def _products_between_waits(code: list[Instruction]) -> Iterator[int]:
    products = 0
    for each in code:
        if each.stem in ("HGMMA", "IGMMA", "QGMMA", "BGMMA"):
            products += 1
        elif each.opcode.startswith("WARPGROUP.DEPBAR"):
            yield products
            products = 0
