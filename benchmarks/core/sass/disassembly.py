"""Machine code as nvdisasm prints it, as instructions with their source lines and scoreboards.

An instruction of compute capability 7.0 and newer has 128 bits. The upper word also tells the warp
scheduler what to wait for, which nvdisasm does not print: bits 41 to 44 are the clocks until the
next instruction, 45 a hint to change warps, 46 to 48 the scoreboard that the result signals and 49
to 51 the one that read operands signal (7: none), 52 to 57 a mask of scoreboards to wait for
(CuAssembler's and Nervana's maxas' findings; NVIDIA documents none of it).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from m3i_fast.benchmarks.core.cuda_toolkit import find_tool, run_tool, short_names
from m3i_fast.benchmarks.core.sass.elf import registers

Frame = tuple[str, int]
"""A file and a line of it."""

_SECTION = re.compile(r"^\.text\.(\S+):$")
_LABEL = re.compile(r"^(\S+):$")
_FRAME = re.compile(r'^\s*//## File "(.*?)", line (\d+)')
_CODE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;"
    r"(?:\s*/\* 0x[0-9a-f]{16} \*/)?\s*$"
)
_UPPER_WORD = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/\s*$")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of a kernel."""

    address: int
    """Bytes from the kernel's begin."""
    predicate: str
    """As P0 or !UP1; empty where it is always executed."""
    opcode: str
    """With modifiers, as LDG.E.128.CONSTANT."""
    operands: str
    frames: tuple[Frame, ...] = ()
    """Its source line, then the lines of the calls that were inlined; empty without -lineinfo."""
    signals: int | None = None
    """The scoreboard, 0 to 5, that is set until its result is there."""
    waits: int = 0
    """A bit for each scoreboard that has to be clear before it is issued."""

    @property
    def stem(self) -> str:
        """Return the opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def modifiers(self) -> list[str]:
        return self.opcode.split(".")[1:]

    @property
    def targets(self) -> list[str]:
        """Return the labels that its operands name."""
        return re.findall(r"`\((\S+?)\)", self.operands) or re.findall(
            r"(?<=[\s,\"])\.L_x_\d+", self.operands
        )


@dataclass(frozen=True, slots=True)
class Kernel:
    """The machine code of a kernel, with the subroutines that stand behind it."""

    mangled: str
    name: str
    """Short, with template arguments."""
    registers: int
    """Of a thread, as the ELF file says; 0 where that is not known."""
    instructions: list[Instruction]
    labels: dict[str, int] = field(default_factory=dict)
    """Addresses by label."""


def disassemble(cubin: Path) -> list[Kernel]:
    """Return the kernels of a cubin in the order of the file; none where it has none.

    Raises MissingTool without nvdisasm, RuntimeError with its words where it fails.
    """
    text = run_tool([find_tool("nvdisasm"), "-c", "-hex", "-gi", cubin])
    return parse(text, registers(cubin.read_bytes()))


def parse(text: str, registers: Mapping[str, int] | None = None) -> list[Kernel]:
    """Return the kernels of what `nvdisasm -c -hex -gi` printed; -hex and -gi may be left out.

    registers: of a thread, by mangled name.
    """
    bodies = list(_sections(text.splitlines()))
    names = short_names([mangled for mangled, _ in bodies]) if bodies else {}
    return [
        Kernel(mangled, names[mangled], (registers or {}).get(mangled, 0), *_read_body(lines))
        for mangled, lines in bodies
    ]


def _sections(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the lines of each kernel."""
    begin, name = 0, ""
    for number, line in enumerate(lines):
        if found := _SECTION.match(line):
            name, begin = found[1], number + 1
        elif line.startswith("//---") and name:
            yield name, lines[begin:number]
            name = ""
    if name:
        yield name, lines[begin:]


def _read_body(lines: list[str]) -> tuple[list[Instruction], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []  # labels of the next instruction
    frames: list[Frame] = []
    was_frame = False
    for number, line in enumerate(lines):
        if found := _FRAME.match(line):
            frames = (
                [*frames, (found[1], int(found[2]))] if was_frame else [(found[1], int(found[2]))]
            )
            was_frame = True
            continue
        if found := _CODE.match(line):
            address, predicate, opcode, operands = found.groups()
            word = _UPPER_WORD.match(lines[number + 1]) if number + 1 < len(lines) else None
            signals, waits = _control(int(word[1], 16)) if word else (None, 0)
            instructions.append(
                Instruction(int(address, 16), predicate or "", opcode, operands, tuple(frames),
                            signals, waits)
            )  # fmt: skip
            labels |= dict.fromkeys(waiting, instructions[-1].address)
            waiting = []
        elif found := _LABEL.match(line):
            waiting.append(found[1])
        was_frame = False
    return instructions, labels


def _control(word: int) -> tuple[int | None, int]:
    signals = word >> 46 & 7
    return (None if signals == 7 else signals), word >> 52 & 63
