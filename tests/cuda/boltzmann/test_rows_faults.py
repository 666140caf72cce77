"""Faults planted in the kernel of a block of rows, a line each, are reported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from m3i_fast.ops import library  # noqa: F401  the operators
from tests.shared.cuda import emulator
from tests.shared.cuda.fault import Fault

# Alone, which compiles in seconds.
REGISTRATION = """
#include "boltzmann/rows/op_cuda.h"

#include <torch/csrc/stable/library.h>

namespace m3i {
namespace {

STABLE_TORCH_LIBRARY_IMPL(m3i, CUDA, library) {
  library.impl("boltzmann_rows_pass", TORCH_BOX(&boltzmann_rows_pass_cuda));
}

}  // namespace
}  // namespace m3i
"""

FAULTS = {
    "the sums of warps are not awaited": Fault(
        "sm80/rows.cuh",
        "  __syncthreads();\n",
        "",
        "boltzmann_rows",
        r"(read before written|data race): .* of shared variable .*of_warps",
    ),
    "a bias too many": Fault(
        "sm80/rows.cuh",
        "const int64_t whole = columns / kVector * kVector;",
        "const int64_t whole = (columns + kVector - 1) / kVector * kVector;",
        "boltzmann_rows",
        r"out-of-bounds read of 4 bytes",
    ),
    "rows overlap": Fault(
        "sm80/rows.cuh",
        "int64_t{blockIdx.x} * params.stride),\n",
        "int64_t{blockIdx.x} * (params.stride - 16)),\n",
        "boltzmann_rows",
        r"data race: .* a thread of another block of this launch wrote",
    ),
}


def launch() -> None:
    rng = torch.Generator().manual_seed(0)
    products, bias = torch.randn(4, 80, generator=rng), torch.randn(70, generator=rng)
    ids = torch.tensor([3, -1, 69, 0], dtype=torch.int32)
    scale, sums = torch.tensor(2.0), [torch.empty(4), torch.empty(4)]
    unused = None, None, ids, None
    torch.ops.m3i.boltzmann_rows_pass(products, None, 70, scale, bias, *unused, *sums, None, True)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_planted_fault_is_reported(fault: Fault, tmp_path: Path) -> None:
    folder = tmp_path / "boltzmann"
    shutil.copytree(emulator.CUDA / "boltzmann", folder)
    for launchers in ("sm80/launch.cu", "sm90/launch.cu"):
        (folder / launchers).unlink()
    (folder / "op_cuda.cpp").write_text(REGISTRATION)
    fault.plant(folder / fault.source)
    with (
        emulator.emulated("boltzmann", folder=tmp_path),
        pytest.raises(RuntimeError, match=f"(?s){fault.report}.*boltzmann_rows"),
    ):
        launch()
