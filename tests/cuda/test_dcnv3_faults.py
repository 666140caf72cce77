"""Faults planted in dcnv3's kernels, a line each, are reported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from m3i_fast.ops import dcnv3
from tests.cuda import emulator
from tests.cuda.faults import Fault
from tests.ops.dcnv3_cases import Config, make, results

FAULTS = {
    "a column too many": Fault(
        "dcnv3_points.cuh",
        "(x < width - 1 ? ",
        "(x < width ? ",
        "dcnv3",
        r"out-of-bounds read of 16 bytes .* past the end of an allocation",
    ),
    "points are not awaited": Fault(
        "dcnv3_walk.cuh",
        "first, count, units.count, work);\n    __syncwarp();",
        "first, count, units.count, work);",
        "dcnv3",
        r"(read before written|data race): read .* of dynamic shared memory",
    ),
    "a unit without its base": Fault(
        "dcnv3_walk.cuh",
        "if (units.exists && units.lane == 0) work.origins",
        "if (units.exists && units.lane == 0 && units.own != 2) work.origins",
        "dcnv3",
        r"read before written: read .* of dynamic shared memory",
    ),
    "lanes write each other's sums": Fault(
        "dcnv3_bwd.cuh",
        "if (lane >= 4) count = 0;",
        "",
        "dcnv3",
        r"data race: write of 4 bytes .* of dynamic shared memory",
    ),
    "a plain addition": Fault(
        "dcnv3_bwd.cuh",
        "red_add(to + i, values);",
        "for (int j = 0; j < kWidth; ++j) to[i + j] += values[j];",
        "dcnv3",
        r"data race: read of 4 bytes .* which (thread|a thread of another block)",
    ),
}


def call() -> None:
    """In float32, all that the others have too."""
    config = Config(batch=2, image=(5, 6), group_size=32)
    results(dcnv3, *make(config, torch.float32), **config.options)


def in_float32_alone(folder: Path) -> None:
    """And with vectors alone: compiles in an eighth of the time."""
    source = folder / "dcnv3.cu"
    text = source.read_text()
    for before, after, count in (
        ("dispatch_dtype<float, BFloat16, Float16, double>", "dispatch_dtype<float>", 2),
        ("dispatch_int<kWidest, 1>", "dispatch_int<kWidest>", 1),
    ):
        assert text.count(before) == count
        text = text.replace(before, after)
    source.write_text(text)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_planted_fault_is_reported(fault: Fault, tmp_path: Path) -> None:
    folder = tmp_path / "dcnv3"
    shutil.copytree(emulator.CUDA / "dcnv3", folder)
    in_float32_alone(folder)
    fault.plant(folder / fault.source)
    with (
        emulator.emulated("dcnv3", folder=tmp_path),
        pytest.raises(RuntimeError, match=f"(?s){fault.report}.*dcnv3"),
    ):
        call()
