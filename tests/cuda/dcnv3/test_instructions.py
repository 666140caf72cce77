"""What a warp issues in dcnv3's forward of nine points, counted in the machine code.

A block goes through images; what one takes is its loop, less the loops inside, which make points
beside the image's edge and skip those outside of it, and less the softmax, which has its own bound.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

import pytest

from m3i_fast.benchmarks.core.cuda_toolkit import ARCHITECTURES
from tests.shared.cuda.nvcc import compile_options, find_nvdisasm, run_nvcc

# A warp's units are 16 at 16 channels in half types, and 8 in float32.
MOST = {"8BFloat16": 900, "7Float16": 900, "f": 500}
MOST_IN_SOFTMAX = {"8BFloat16": 32, "7Float16": 32, "f": 48}
POINTS, CORNERS = 9, 4


@dataclass(frozen=True, slots=True)
class Instruction:
    address: int
    opcode: str
    target: int | None
    """Where a branch goes."""


def code_of(text: str) -> list[Instruction]:
    """The instructions of a kernel's disassembly, by address."""
    labels: dict[str, int] = {}
    found: list[tuple[int, str, str | None]] = []
    waiting: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            waiting.append(label[1])
        elif code := re.match(r"\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)(.*?);", line):
            address = int(code[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting.clear()
            target = re.search(r"`\((\.L_x_\d+)\)", code[3])
            found.append((address, code[2], target[1] if target else None))
    return [Instruction(a, op, labels.get(to) if to else None) for a, op, to in found]


def loops_of(code: list[Instruction]) -> list[range]:
    """Addresses of all loops, each from where a branch goes back to up to that branch."""
    ends: dict[int, int] = {}
    for one in code:
        if one.opcode.startswith("BRA") and one.target is not None and one.target < one.address:
            ends[one.target] = max(ends.get(one.target, 0), one.address)
    return [range(first, last + 1) for first, last in sorted(ends.items())]


def gathers(code: list[Instruction], place: range) -> int:
    return sum(i.opcode.startswith("LDG.E.128") for i in code if i.address in place)


def path_of(code: list[Instruction]) -> tuple[int, int]:
    """Instructions of an image outside of the softmax and in it."""
    loops = loops_of(code)
    all_gathers = max(gathers(code, loop) for loop in loops)
    image = min((o for o in loops if gathers(code, o) == all_gathers), key=len)
    inner = [o for o in loops if o.start > image.start and o.stop < image.stop]
    outside = [
        i for i in code if i.address in image and not any(i.address in loop for loop in inner)
    ]
    # A loop over some points at once goes on until there are nine; the one over each is left out.
    fast = [o for o in inner if gathers(code, o) > CORNERS]
    unrolled = sum(i.opcode.startswith("LDG.E.128") for i in outside)
    trips = (POINTS * CORNERS - unrolled) // gathers(code, fast[0]) if fast else 0
    assert unrolled + sum(trips * gathers(code, o) for o in fast) == POINTS * CORNERS
    looped = sum(trips * sum(i.address in o for i in code) for o in fast)
    # The last branch before the shuffles, to behind them.
    shuffled = [i.address for i in outside if i.opcode.startswith("SHFL")]
    (skip,) = [
        i for i in outside
        if i.opcode == "BRA" and i.target and i.address < shuffled[0]
        and shuffled[-1] < i.target < image.stop
    ]  # fmt: skip
    softmax = sum(skip.address < i.address < (skip.target or 0) for i in outside)
    return len(outside) + looped - softmax, softmax


@pytest.fixture(scope="module", params=ARCHITECTURES)
def paths(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[int, int]]:
    """By element type, at 16 channels."""
    folder = tmp_path_factory.mktemp("nine")
    source, cubin = folder / "nine.cu", folder / "nine.cubin"
    kernel = "template __global__ void dcnv3_nine_kernel<{}, 16, 128, 6>(Dcnv3Params, NineShape);\n"
    text = '#include "dcnv3/sm80/nine.cuh"\nnamespace m3i::dcnv3 {\n'
    text += "".join(kernel.format(t) for t in ("float", "BFloat16", "Float16")) + "}\n"
    source.write_text(text.replace("(Dcnv3Params, ", "(const Dcnv3Params, const "))
    run_nvcc(*compile_options(request.param), "-cubin", source, "-o", cubin)
    printed = subprocess.run(
        [find_nvdisasm(), "-c", cubin], check=True, capture_output=True, text=True
    ).stdout
    parts = re.split(r"\n\.text\.(\S+):\n", printed)[1:]
    kernels = dict(zip(parts[::2], parts[1::2], strict=True))
    return {
        element: path_of(code_of(body))
        for element in MOST
        for name, body in kernels.items()
        if re.search(rf"nine_kernelI(NS_)?{element}E?Li16E", name)
    }


def test_a_warp_issues_few_instructions(paths: dict[str, tuple[int, int]]) -> None:
    assert paths.keys() == MOST.keys()
    for element, (count, in_softmax) in paths.items():
        # Products and sums of all corners, by channels of a lane, or the path was missed.
        assert count > POINTS * CORNERS * (4 if element == "f" else 8)
        assert count <= MOST[element], f"{element}: {count}"
        assert in_softmax <= MOST_IN_SOFTMAX[element], f"{element}: {in_softmax} in the softmax"


def test_loops_are_found() -> None:
    text = """
.L_x_1:
        /*0000*/                   LDG.E.128 R0, [R2.64] ;
.L_x_2:
        /*0010*/                   FADD R0, R0, R1 ;
        /*0020*/              @P0  BRA `(.L_x_2) ;
        /*0030*/                   EXIT ;
        /*0040*/                   BRA `(.L_x_1) ;
"""
    code = code_of(text)
    assert [i.opcode for i in code] == ["LDG.E.128", "FADD", "BRA", "EXIT", "BRA"]
    assert loops_of(code) == [range(0, 0x41), range(0x10, 0x21)]
    assert gathers(code, range(0, 0x41)) == 1
