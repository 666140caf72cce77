"""Faults planted in views' kernel, a line each, are reported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from m3i_fast.ops.views import make_views
from tests.shared.cuda import emulator
from tests.shared.cuda.fault import Fault
from tests.shared.ops.views_cases import Case, group, make

FAULTS = {
    "a piece too far": Fault(
        "sm80/resize.cuh",
        "if (at >= before && at + kAccessBytes <= before + size) {",
        "if (at >= before) {",
        "views",
        r"out-of-bounds read of 16 bytes at 0x\w+, of which only \d+ lie in it",
    ),
    "another sample's parameters": Fault(
        "sm80/kernels.cuh",
        "params.params[sample * params.num_views + view]",
        "params.params[(sample + 1) * params.num_views + view]",
        "views",
        r"out-of-bounds read of \d+ bytes .* past the end of an allocation",
    ),
    "rows are written over before they are summed down": Fault(
        "sm80/resize.cuh",
        "  __syncthreads();  // also: what the ring loses now has been summed down\n",
        "  __syncwarp();\n",
        "views",
        r"data race: read of 1 bytes .* of dynamic shared memory",
    ),
    "a column without weights": Fault(
        "sm80/resize.cuh",
        "to.count()[i] = taps.count;\n",
        "if (i > 0) to.count()[i] = taps.count;\n",
        "views",
        r"read before written: read of 4 bytes .* of dynamic shared memory",
    ),
    "views that overlap": Fault(
        "sm80/kernels.cuh",
        "const int64_t begin = sample * kViewChannels * to.area;",
        "const int64_t begin = sample / 2 * kViewChannels * to.area;",
        "views",
        r"data race: write .* which a thread of another block of this launch wrote",
    ),
    "blurred down before it is blurred across": Fault(
        "sm80/blur.cuh",
        "        blur_across(of, done);\n        __syncthreads();\n",
        "        blur_across(of, done);\n",
        "views",
        r"(read before written|data race): read of 4 bytes .* of dynamic shared memory",
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_planted_fault_is_reported(fault: Fault, tmp_path: Path) -> None:
    folder = tmp_path / "views"
    shutil.copytree(emulator.CUDA / "views", folder)
    fault.plant(folder / fault.source)
    case = Case(
        pictures=[[(40, 31)], [(25, 30)]],
        groups=[group(40, scale=(1.0, 1.0), ratio=(0.5, 2.0), blur_probability=1.0)],
    )
    with (
        emulator.emulated("views", folder=tmp_path),
        pytest.raises(RuntimeError, match=f"(?s){fault.report}.*{fault.launcher}_kernel"),
    ):
        make_views(*make(case), views=case.specs)
