"""Faults planted in add_layer_norm's kernels, a line each, are reported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from m3i_fast.ops import add_layer_norm
from tests.shared.cuda import emulator
from tests.shared.cuda.fault import Fault

FAULTS = {
    "a vector too many": Fault(
        "sm80/kernels.cuh",
        "if (at < width) body(at, step);",
        "if (at <= width) body(at, step);",
        "add_layer_norm",
        r"out-of-bounds read of 16 bytes .* 0 bytes past the end of an allocation",
    ),
    "a row too many": Fault(
        "sm80/kernels.cuh",
        "if (first + i >= rows) continue;\n      const int64_t offset = (first + i) * width;\n"
        "      const A mean",
        "const int64_t offset = (first + i) * width;\n      const A mean",
        "add_layer_norm_bwd",
        r"out-of-bounds read of 4 bytes .* 0 bytes past the end of an allocation",
    ),
    "sums are not awaited": Fault(
        "sm80/kernels.cuh",
        "  __syncthreads();\n  const bool has_warp",
        "  const bool has_warp",
        "add_layer_norm",
        r"(read before written|data race): read of 4 bytes .* of shared variable .*::shared",
    ),
    "blocks leave their sums in one place": Fault(
        "sm80/kernels.cuh",
        "static_cast<int64_t>(blockIdx.x) * 2 * width;",
        "static_cast<int64_t>(blockIdx.x / 2) * 2 * width;",
        "add_layer_norm_bwd",
        r"data race: write .* which a thread of another block of this launch wrote",
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_planted_fault_is_reported(fault: Fault, tmp_path: Path) -> None:
    folder = tmp_path / "add_layer_norm"
    shutil.copytree(emulator.CUDA / "add_layer_norm", folder)
    dispatch = folder / "dispatch.h"  # in float32 alone it compiles in a fraction of the time
    text = dispatch.read_text()
    assert text.count("<float, BFloat16, Float16>") == text.count("BFloat16, Float16, double") == 1
    text = text.replace("<float, BFloat16, Float16>", "<float>")
    dispatch.write_text(text.replace("<BFloat16, Float16, double>", "<double>"))
    fault.plant(folder / fault.source)
    x, branch = (torch.ones(19, 192, requires_grad=True) for _ in range(2))
    weight, bias = (torch.ones(192, requires_grad=True) for _ in range(2))
    with (
        emulator.emulated("add_layer_norm", folder=tmp_path),
        pytest.raises(RuntimeError, match=f"(?s){fault.report}.*{fault.launcher}_kernel"),
    ):
        total, normed = add_layer_norm(x, branch, weight, bias)
        (total.sum() + normed.sum()).backward()
