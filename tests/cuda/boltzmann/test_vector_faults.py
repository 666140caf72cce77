"""Faults planted in boltzmann's kernels on vectors, a line each, are reported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from m3i_fast.ops.library import m3i
from tests.cuda.boltzmann.source import shrink
from tests.shared.cuda import emulator
from tests.shared.cuda.fault import Fault, a_third_by_day

FAULTS = {
    "a row too many": Fault(
        "sm80/vectors.cuh",
        "threadIdx.x / 32; row < count;",
        "threadIdx.x / 32; row <= count;",
        "boltzmann_prepare",
        r"out-of-bounds read of 8 bytes .* 0 bytes past the end of an allocation",
    ),
    "a vector too many": Fault(
        "sm80/vectors.cuh",
        "for_elements(length / kVector, [&]",
        "for_elements(length / kVector + 1, [&]",
        "boltzmann_scale",
        r"out-of-bounds read of 16 bytes .* 0 bytes past the end of an allocation",
    ),
    "ids are inserted without atomics": Fault(
        "sm80/vectors.cuh",
        "const unsigned long long before = atomicCAS(table.keys + slot, kNoKey, key);",
        "const unsigned long long before = table.keys[slot];\n"
        "      if (before == kNoKey) table.keys[slot] = key;",
        "boltzmann_prepare",
        r"data race: (read|write) of 8 bytes",
    ),
    "a warp's sum is not awaited": Fault(
        "sm80/vectors.cuh",
        "folds[threadIdx.x / 32] = value;\n  __syncthreads();",
        "folds[threadIdx.x / 32] = value;",
        "boltzmann_totals",
        r"(read before written|data race): read of 4 bytes .* of shared variable .*::folds",
    ),
    "neighbouring blocks share an element": Fault(
        "sm80/vectors.cuh",
        "int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < length;",
        "int64_t{blockIdx.x} * (blockDim.x - 1) + threadIdx.x; i < length;",
        "boltzmann_prepare",
        r"data race: write of 4 bytes .* a thread of another block of this launch wrote",
    ),
}


def run(launcher: str) -> None:
    """Call an op on bfloat16 features of 136 numbers, or sums of 70 rows and 41 columns."""
    if launcher == "boltzmann_prepare":
        z_hat, z = torch.ones(700, 136).bfloat16(), torch.ones(650, 136).bfloat16()
        ids = torch.arange(700) % 5, torch.arange(650) % 7
        m3i.boltzmann_prepare.default(z_hat, z, None, *ids, 0, 650)
    elif launcher == "boltzmann_totals":
        rows, cols = torch.ones(4, 70), torch.ones(4, 41)
        sums = rows, cols, None, None, rows[0].clone(), cols[0].clone(), torch.tensor(False)
        m3i.boltzmann_totals.default(*sums)
    else:
        one, grads = torch.tensor(1.0), (torch.ones(4096), torch.ones(8))
        m3i.boltzmann_scale.default(one, None, None, *grads, one, one, torch.bfloat16)


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
    with (
        emulator.emulated("boltzmann", folder=tmp_path),
        pytest.raises(RuntimeError, match=f"(?s){fault.report}.*boltzmann"),
    ):
        run(fault.launcher)
