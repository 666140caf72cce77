"""Faults planted in boltzmann's kernels, a line each, are reported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.cuda.boltzmann.source import shrink
from tests.shared.cuda import emulator
from tests.shared.cuda.fault import Fault, a_third_by_day
from tests.shared.ops.boltzmann_kernel_cases import make

FAULTS = {
    "a row too many": Fault(
        "sm80/product.cuh",
        "const bool inside = y < rows && x < columns;\n      copy_async",
        "const bool inside = y <= rows && x < columns;\n      copy_async",
        "boltzmann_sums",
        r"out-of-bounds read of 16 bytes .* 0 bytes past the end of an allocation",
    ),
    "a column's bias too many": Fault(
        "sm80/tile.cuh",
        "body(i, begin + i < end, begin + i);",
        "body(i, begin + i <= end, begin + i);",
        "boltzmann_sums",
        r"out-of-bounds read of 4 bytes .* 0 bytes past the end of an allocation",
    ),
    "operands are not awaited": Fault(
        "sm80/product.cuh",
        "copy_async_wait<kStages - 2>();",
        "copy_async_wait<kStages - 1>();",
        "boltzmann_sums",
        r"a copy of .* is under way",
    ),
    "no barrier before the products": Fault(
        "sm80/product.cuh",
        "    __syncthreads();  // the step's operands are there",
        "    // the step's operands are there",
        "boltzmann_sums",
        r"(read before written|data race|under way)",
    ),
    "no barrier between two kinds of sums": Fault(
        "sm80/tile.cuh",
        "  __syncthreads();  // the folds may be written again\n",
        "",
        "boltzmann_sums",
        r"data race: write of 4 bytes .* of dynamic shared memory",
    ),
    "a lane's folds are missing": Fault(
        "sm80/tile.cuh",
        "for (int i = 0; i < kLaneRows / 4; ++i) {",
        "for (int i = 1; i < kLaneRows / 4; ++i) {",
        "boltzmann_maxima",
        r"read before written: read of 4 bytes .* of dynamic shared memory",
    ),
    "tiles of one row share a place": Fault(
        "sm80/sums.cuh",
        "int64_t{blockIdx.x} * kinds + kind, height",
        "int64_t{blockIdx.x / 2} * kinds + kind, height",
        "boltzmann_maxima",
        r"data race: write of 4 bytes .* a thread of another block of this launch wrote",
    ),
    "tiles of the gradient overlap": Fault(
        "sm80/grads.cuh",
        "blockIdx.y * pitch * Shape<T>::kRows +",
        "blockIdx.y * pitch * (Shape<T>::kRows - 1) +",
        "boltzmann_grads",
        r"data race: write of 4 bytes .* a thread of another block of this launch wrote",
    ),
    "a total that is not awaited": Fault(
        "sm80/partials.cuh",
        "    __syncthreads();\n    if (thread < part)",
        "    if (thread < part)",
        "boltzmann_grads",
        r"(read before written|data race): read of 8 bytes .* of shared variable .*::sums",
    ),
}


def test_every_fault_is_of_a_line_that_is_there_once() -> None:
    """Also one that is planted by night."""
    for fault in FAULTS.values():
        fault.planted((emulator.CUDA / "boltzmann" / fault.source).read_text())


@pytest.mark.parametrize("fault", a_third_by_day(FAULTS))
def test_planted_fault_is_reported(fault: Fault, tmp_path: Path) -> None:
    folder = tmp_path / "boltzmann"
    shutil.copytree(emulator.CUDA / "boltzmann", folder)
    shrink(folder)
    fault.plant(folder / fault.source)
    call = make((130, 150, 136), torch.bfloat16, "shared", labels=True)
    run = {
        "boltzmann_maxima": call.maxima,
        "boltzmann_sums": call.sums,
        "boltzmann_grads": call.grads,
    }[fault.launcher]
    with (
        emulator.emulated("boltzmann", folder=tmp_path),
        pytest.raises(RuntimeError, match=f"(?s){fault.report}.*boltzmann"),
    ):
        run()
