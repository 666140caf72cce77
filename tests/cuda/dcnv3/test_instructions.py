"""What a warp issues in dcnv3's forward of nine points, counted in the machine code.

A block goes through images; what one takes is its loop, less the loops inside, which make points
beside the image's edge and skip those outside of it, and less the softmax, which has its own bound.
"""

from __future__ import annotations

import re

import pytest

from m3i_fast.benchmarks.core.cuda_toolkit import ARCHITECTURES
from m3i_fast.benchmarks.core.sass.disassembly import Instruction, Kernel, disassemble
from m3i_fast.benchmarks.core.sass.flow import Flow, Loop, analyse
from tests.shared.cuda.nvcc import compile_options, find_nvdisasm, run_nvcc

# A warp's units are 16 at 16 channels in half types, and 8 in float32.
MOST = {"8BFloat16": 900, "7Float16": 900, "f": 500}
MOST_IN_SOFTMAX = {"8BFloat16": 32, "7Float16": 32, "f": 48}
POINTS, CORNERS = 9, 4


def gathers(code: list[Instruction]) -> int:
    return sum(each.opcode.startswith("LDG.E.128") for each in code)


def code_of(flow: Flow, loop: Loop) -> list[Instruction]:
    return [each for number in sorted(loop.blocks) for each in flow.blocks[number].instructions]


def path_of(kernel: Kernel) -> tuple[int, int]:
    """Instructions of an image outside of the softmax and in it."""
    flow = analyse(kernel)
    code = {loop.number: code_of(flow, loop) for loop in flow.loops}
    all_gathers = max(map(gathers, code.values()))
    around = [loop for loop in flow.loops if gathers(code[loop.number]) == all_gathers]
    image = max(around, key=lambda loop: loop.depth)
    inner = [loop for loop in flow.loops if loop.blocks < image.blocks]
    inside = {number for loop in inner for number in loop.blocks}
    outside = [each for n in sorted(image.blocks - inside) for each in flow.blocks[n].instructions]
    # A loop over some points at once goes on until there are nine; the one over each is left out.
    fast = [code[loop.number] for loop in inner if gathers(code[loop.number]) > CORNERS]
    unrolled = gathers(outside)
    trips = (POINTS * CORNERS - unrolled) // gathers(fast[0]) if fast else 0
    assert unrolled + sum(trips * gathers(each) for each in fast) == POINTS * CORNERS
    looped = sum(trips * len(each) for each in fast)
    # The last branch before the shuffles, to behind them.
    shuffled = [each.address for each in outside if each.stem == "SHFL"]
    end = code[image.number][-1].address
    ((begin, behind),) = [
        (each.address, kernel.labels[label]) for each in outside for label in each.targets
        if each.opcode == "BRA" and each.address < shuffled[0]
        and shuffled[-1] < kernel.labels[label] <= end
    ]  # fmt: skip
    softmax = sum(begin < each.address < behind for each in outside)
    return len(outside) + looped - softmax, softmax


@pytest.fixture(scope="module", params=ARCHITECTURES)
def paths(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[int, int]]:
    """By element type, at 16 channels."""
    find_nvdisasm()
    folder = tmp_path_factory.mktemp("nine")
    source, cubin = folder / "nine.cu", folder / "nine.cubin"
    kernel = "template __global__ void dcnv3_nine_kernel<{}, 16, 128, 6>(Dcnv3Params, NineShape);\n"
    text = '#include "dcnv3/sm80/nine.cuh"\nnamespace m3i::dcnv3 {\n'
    text += "".join(kernel.format(t) for t in ("float", "BFloat16", "Float16")) + "}\n"
    source.write_text(text.replace("(Dcnv3Params, ", "(const Dcnv3Params, const "))
    run_nvcc(*compile_options(request.param), "-cubin", source, "-o", cubin)
    return {
        element: path_of(kernel)
        for element in MOST
        for kernel in disassemble(cubin)
        if re.search(rf"nine_kernelI(NS_)?{element}E?Li16E", kernel.mangled)
    }


def test_a_warp_issues_few_instructions(paths: dict[str, tuple[int, int]]) -> None:
    assert paths.keys() == MOST.keys()
    for element, (count, in_softmax) in paths.items():
        # Products and sums of all corners, by channels of a lane, or the path was missed.
        assert count > POINTS * CORNERS * (4 if element == "f" else 8)
        assert count <= MOST[element], f"{element}: {count}"
        assert in_softmax <= MOST_IN_SOFTMAX[element], f"{element}: {in_softmax} in the softmax"
