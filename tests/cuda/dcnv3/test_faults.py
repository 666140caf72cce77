"""Four kinds of faults, a line each, planted in each of dcnv3's kernels that gather or scatter."""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path

import pytest
import torch

from m3i_fast.ops import dcnv3
from tests.shared.cuda.emulator import CUDA, emulated
from tests.shared.cuda.fault import Fault, a_third_by_day
from tests.shared.ops.dcnv3_cases import Config, assert_right, make

KINDS = ("out of bounds by one", "missing barrier", "unwritten shared memory", "racing write")

# By kernel and kind. Lines of points.cuh and walk.cuh are part of all kernels.
FAULTS = {
    ("dcnv3_kernel", "out of bounds by one"): Fault(
        "sm80/points.cuh",
        "(x < width - 1 ? ",
        "(x < width ? ",
        "dcnv3_kernel",
        r"out-of-bounds read of 16 bytes .* past the end of an allocation",
    ),
    ("dcnv3_kernel", "missing barrier"): Fault(
        "sm80/walk.cuh",
        "first, count, units, work, keep);\n    __syncwarp();",
        "first, count, units, work, keep);",
        "dcnv3_kernel",
        r"(read before written|data race): read .* of dynamic shared memory",
    ),
    ("dcnv3_kernel", "unwritten shared memory"): Fault(
        "sm80/walk.cuh",
        "if (units.exists && units.lane == 0) work.origins",
        "if (units.exists && units.lane == 0 && units.own != 2) work.origins",
        "dcnv3_kernel",
        r"read before written: read .* of dynamic shared memory",
    ),
    ("dcnv3_kernel", "racing write"): Fault(
        "sm80/fwd.cuh",
        "store(out + channel, round_to<T>(sum))",
        "store(out + pass, round_to<T>(sum))",
        "dcnv3_kernel",
        r"data race: write of 16 bytes .* of an allocation .* which thread \(\d+, 0, 0\) wrote",
    ),
    ("dcnv3_nine_kernel", "out of bounds by one"): Fault(
        "sm80/nine.cuh",
        "(has_right ? x + 1 : x)",
        "(has_right ? x + 1 : x + 1)",
        "dcnv3_nine_kernel",
        r"out-of-bounds read of 16 bytes .* past the end of an allocation",
    ),
    ("dcnv3_nine_kernel", "missing barrier"): Fault(
        "sm80/nine.cuh",
        "__all_sync(0xffffffffu, all);\n      __syncwarp();",
        "__all_sync(0xffffffffu, all);",
        "dcnv3_nine_kernel",
        r"(read before written|data race): read .* of dynamic shared memory",
    ),
    ("dcnv3_nine_kernel", "unwritten shared memory"): Fault(
        "sm80/nine.cuh",
        "at[k] = make_uint4(corner,",
        "if (t > 0) at[k] = make_uint4(corner,",
        "dcnv3_nine_kernel",
        r"read before written: read of \d+ bytes .* of dynamic shared memory",
    ),
    ("dcnv3_nine_kernel", "racing write"): Fault(
        "sm80/nine.cuh",
        "int64_t index = int64_t{blockIdx.y} * shape.units + unit;",
        "int64_t index = int64_t{blockIdx.y} * shape.units + unit / 2;",
        "dcnv3_nine_kernel",
        r"data race: write of 16 bytes .* of an allocation .* which thread \(\d+, 0, 0\) wrote",
    ),
    ("dcnv3_bwd_kernel", "out of bounds by one"): Fault(
        "sm80/bwd.cuh",
        "out_begin(shape, units.image, unit) + channel), grad)",
        "out_begin(shape, units.image, unit) + channel + kVector), grad)",
        "dcnv3_bwd_kernel",
        r"out-of-bounds read of 16 bytes .* 0 bytes past the end of an allocation",
    ),
    ("dcnv3_bwd_kernel", "missing barrier"): Fault(
        "sm80/bwd.cuh",
        "__syncwarp();\n        bwd.write_chunk",
        "bwd.write_chunk",
        "dcnv3_bwd_kernel",
        r"(read before written|data race): read .* of dynamic shared memory",
    ),
    ("dcnv3_bwd_kernel", "unwritten shared memory"): Fault(
        "sm80/bwd.cuh",
        "if (units.exists && bwd.has_weights()) work.totals",
        "if (units.exists && bwd.has_weights() && units.own != 1) work.totals",
        "dcnv3_bwd_kernel",
        r"read before written: read of 4 bytes .* of dynamic shared memory",
    ),
    ("dcnv3_bwd_kernel", "racing write"): Fault(
        "sm80/bwd.cuh",
        "if (lane >= 4) count = 0;",
        "",
        "dcnv3_bwd_kernel",
        r"data race: write of 4 bytes .* of dynamic shared memory",
    ),
    ("dcnv3_bwd_kernel", "racing write, global"): Fault(
        "sm80/scatter.cuh",
        "red_add(to, values);",
        "for (int j = 0; j < kFloats; ++j) to[j] += values[j];",
        "dcnv3_bwd_kernel",
        r"data race: read of 4 bytes .* which (thread|a thread of another block)",
    ),
    ("dcnv3_bwd_window_kernel", "out of bounds by one"): Fault(
        "sm80/window.cuh",
        "0 <= x && x < width",
        "0 <= x && x <= width",
        "dcnv3_bwd_window_kernel",
        r"out-of-bounds atomic operation of 4 bytes .* past the end of an allocation",
    ),
    ("dcnv3_bwd_window_kernel", "missing barrier"): Fault(
        "sm80/walk.cuh",
        "first, count, units, work, keep);\n    __syncwarp();",
        "first, count, units, work, keep);",
        "dcnv3_bwd_window_kernel",
        r"(read before written|data race): read .* of dynamic shared memory",
    ),
    ("dcnv3_bwd_window_kernel", "unwritten shared memory"): Fault(
        "sm80/window.cuh",
        "i += kWarpLanes) window[i] = 0",
        "i += 2 * kWarpLanes) window[i] = 0",
        "dcnv3_bwd_window_kernel",
        r"read before written: read of 4 bytes .* of dynamic shared memory",
    ),
    ("dcnv3_bwd_window_kernel", "racing write"): Fault(
        "sm80/window.cuh",
        "cells[slot] = at;",
        "cells[slot / 2] = at;",
        "dcnv3_bwd_window_kernel",
        r"data race: write of 4 bytes .* of dynamic shared memory",
    ),
    ("dcnv3_scatter_kernel", "out of bounds by one"): Fault(
        "sm80/fixed.cuh",
        "load_value(grad_out + c)",
        "load_value(grad_out + c + 1)",
        "dcnv3_scatter_kernel",
        r"out-of-bounds read of 4 bytes .* 0 bytes past the end of an allocation",
    ),
    ("dcnv3_scatter_kernel", "missing barrier"): Fault(
        "sm80/walk.cuh",
        "      __syncthreads();\n      filled = first;",
        "      filled = first;",
        "dcnv3_scatter_kernel",
        r"(read before written|data race): read .* of dynamic shared memory",
    ),
    ("dcnv3_scatter_kernel", "unwritten shared memory"): Fault(
        "sm80/walk.cuh",
        "if (threadIdx.x < static_cast<unsigned>(count)) {",
        "if (threadIdx.x + 1 < static_cast<unsigned>(count)) {",
        "dcnv3_scatter_kernel",
        r"read before written: read .* of dynamic shared memory",
    ),
    ("dcnv3_scatter_kernel", "racing write"): Fault(
        "sm80/fixed.cuh",
        "atomicAdd(fixed.sums + at, static_cast<unsigned long long>(units));",
        "fixed.sums[at] += static_cast<unsigned long long>(units);",
        "dcnv3_scatter_kernel",
        r"data race: (read|write) of 8 bytes .* which (thread|a thread of another block)",
    ),
}
KERNELS = (
    "dcnv3_kernel",
    "dcnv3_nine_kernel",
    "dcnv3_bwd_kernel",
    "dcnv3_bwd_window_kernel",
    "dcnv3_scatter_kernel",
)


def test_every_kind_is_planted_in_every_kernel() -> None:
    assert set(itertools.product(KERNELS, KINDS)) <= set(FAULTS)
    assert all(fault.launcher == kernel for (kernel, _), fault in FAULTS.items())


def call(kernel: str, needs_grad: list[bool] | None = None) -> None:
    """The one of the op's functions that launches the kernel, in float32."""
    config = Config(
        batch=2,
        image=(5, 6),
        group_size=32,
        stride=2 if kernel == "dcnv3_bwd_kernel" else 1,  # windows serve a stride of 1 alone
        remove_center=kernel == "dcnv3_kernel",  # nine points have a kernel of their own
        softmax=True,
    )
    inputs, grad_out = make(config)
    if kernel in ("dcnv3_kernel", "dcnv3_nine_kernel"):
        torch.ops.m3i.dcnv3(*inputs, *config.arguments)
        return
    by_x_alone = kernel == "dcnv3_scatter_kernel"  # the deterministic sum
    needs_grad = needs_grad or [True, not by_x_alone, not by_x_alone]
    torch.ops.m3i.dcnv3_bwd(grad_out, *inputs, *config.arguments, needs_grad, by_x_alone)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """dcnv3's sources for float32 and vectors alone, which compile in an eighth of the time."""
    folder = tmp_path / "dcnv3"
    shutil.copytree(CUDA / "dcnv3", folder)
    source = folder / "sm80/launch.cu"
    text = source.read_text()
    for before, after, count in (
        ("dispatch_dtype<float, BFloat16, Float16, double>", "dispatch_dtype<float>", 2),
        ("dispatch_int<kWidest, 1>", "dispatch_int<kWidest>", 1),
    ):
        assert text.count(before) == count
        text = text.replace(before, after)
    source.write_text(text)
    return folder


def test_every_fault_is_of_a_line_that_is_there_once() -> None:
    """Also one that is planted by night."""
    for fault in FAULTS.values():
        fault.planted((CUDA / "dcnv3" / fault.source).read_text())


@pytest.mark.parametrize(
    "fault", a_third_by_day({" ".join(key): fault for key, fault in FAULTS.items()})
)
def test_planted_fault_is_reported(fault: Fault, folder: Path) -> None:
    fault.plant(folder / fault.source)
    with (
        emulated("dcnv3", folder=folder.parent),
        pytest.raises(RuntimeError, match=fault.report) as report,
    ):
        call(fault.launcher)
    assert re.search(rf"\n  kernel .*\b{fault.launcher}<.*, block \(\d+, ", str(report.value))
    assert re.search(r"\n  (inlined )?at .*dcnv3/sm80/\w+\.cuh:\d+", str(report.value))


# ---- The same sources as they are, and where they differ from the ops' tests ---------------------


def test_without_a_fault_nothing_is_reported(folder: Path) -> None:
    with emulated("dcnv3", folder=folder.parent):
        for kernel in KERNELS:
            call(kernel)


def test_a_block_works_through_the_images_that_the_grid_has_no_row_for(folder: Path) -> None:
    """As from 65,536 images on, with a grid of three rows; tests/ops has the real limit."""
    source = folder / "sm80/launch.cu"
    text, limit = source.read_text(), "(shape.batch, kMaxGridY)"
    assert text.count(limit) == 1
    source.write_text(text.replace(limit, "(shape.batch, 3)"))
    with emulated("dcnv3", folder=folder.parent):
        for batch in (3, 4, 8):
            assert_right(dcnv3, Config(batch=batch, image=(5, 3), softmax=True), torch.float32)


def test_compute_capability_9_0(folder: Path) -> None:
    with emulated("dcnv3", folder=folder.parent, architecture=90):
        for config in (Config(), Config(group_size=64, image=(9, 5), stride=2, softmax=True)):
            assert_right(dcnv3, config, torch.float32)


@pytest.mark.parametrize(
    ("kernel", "source", "added"),
    [
        ("dcnv3_bwd_kernel", "scatter.cuh", "red_add(to"),
        ("dcnv3_bwd_window_kernel", "window.cuh", "red_add(to + x * step"),
    ],
)
def test_gradients_by_x_are_added_by_16_bytes_on_9_0(
    folder: Path, kernel: str, source: str, added: str
) -> None:
    """One instruction, which no other address takes."""
    path = folder / "sm80" / source
    text = path.read_text()
    assert text.count(added) == 1
    path.write_text(text.replace(added, f"{added} + 1"))
    with (
        emulated("dcnv3", folder=folder.parent, architecture=90),
        pytest.raises(RuntimeError, match="misaligned atomic operation of 16 bytes"),
    ):
        call(kernel)


def test_lanes_that_add_a_windows_row_wait_for_those_that_summed_it(folder: Path) -> None:
    """On compute capability 9.0 a lane adds what four others have summed."""
    fault = Fault(
        "sm80/bwd.cuh",
        "    });\n  }\n  __syncwarp();\n}",
        "    });\n  }\n}",
        "dcnv3_bwd_window_kernel",
        r"data race: read of \d+ bytes .* of dynamic shared memory",
    )
    fault.plant(folder / fault.source)
    with (
        emulated("dcnv3", folder=folder.parent, architecture=90),
        pytest.raises(RuntimeError, match=fault.report),
    ):
        call(fault.launcher, [True, False, False])  # with the others there is one more barrier
