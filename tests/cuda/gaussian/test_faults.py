"""Faults planted in gaussian's kernels, a line each, are reported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from m3i_fast.ops import gaussian
from tests.shared.cuda import emulator
from tests.shared.cuda.fault import Fault
from tests.shared.ops.gaussian_cases import Case, make, results

FAULTS = {
    "a vector too many": Fault(
        "sm80/kernels.cuh",
        "if (at < width) widen(load",
        "if (at <= width) widen(load",
        "gaussian",
        r"out-of-bounds read of 16 bytes .* 0 bytes past the end of an allocation",
    ),
    "a row shifted": Fault(
        "sm80/kernels.cuh",
        "const T* z = static_cast<const T*>(params.of.z) + r * width;",
        "const T* z = static_cast<const T*>(params.of.z) + (r + 1) * width;",
        "gaussian_bwd",
        r"out-of-bounds read of 16 bytes .* 0 bytes past the end of an allocation",
    ),
    "sums are not awaited": Fault(
        "sm80/kernels.cuh",
        "sums[threadIdx.x / 32] = value;\n  __syncthreads();",
        "sums[threadIdx.x / 32] = value;",
        "gaussian",
        r"(read before written|data race): read of 4 bytes .* of shared variable .*::sums",
    ),
    "every lane writes the mean": Fault(
        "sm80/kernels.cuh",
        "if (threadIdx.x % 32 == 0) {\n        static_cast<A*>(params.mean)",
        "if (threadIdx.x % 32 <= 1) {\n        static_cast<A*>(params.mean)",
        "gaussian",
        r"data race: write of 4 bytes .* which thread \(\d+, 0, 0\) wrote",
    ),
    "blocks leave their sums in one place": Fault(
        "sm80/kernels.cuh",
        "distances[blockIdx.x] = sum;",
        "distances[blockIdx.x / 2] = sum;",
        "gaussian",
        r"data race: write .* which a thread of another block of this launch wrote",
    ),
}


def in_float32_alone(folder: Path) -> None:
    """Compiles in a tenth of the time."""
    source = folder / "dispatch.h"
    text = source.read_text()
    assert text.count("<float, BFloat16, Float16>") == 2
    source.write_text(text.replace("<float, BFloat16, Float16>", "<float>"))


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_planted_fault_is_reported(fault: Fault, tmp_path: Path) -> None:
    folder = tmp_path / "gaussian"
    shutil.copytree(emulator.CUDA / "gaussian", folder)
    in_float32_alone(folder)
    fault.plant(folder / fault.source)
    with (
        emulator.emulated("gaussian", folder=tmp_path),
        pytest.raises(RuntimeError, match=f"(?s){fault.report}.*{fault.launcher}_kernel"),
    ):
        results(gaussian, *make(Case(shape=(19,), width=192)), normalise=True)
