"""The emulator catches what it is there for, and reports nothing else."""

from __future__ import annotations

import ctypes
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m3i_fast import ops
from tests.cuda.emulator.faults import KERNEL_FAULTS, OP_FAULTS
from tests.shared.cuda import emulator
from tests.shared.cuda.emulator import KERNELS
from tests.shared.cuda.fault import Fault
from tests.shared.ops import mask_mix_cases

INT, HALF = torch.int32, torch.float16


def filled(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return emulator.guarded(torch.ones(shape).to(dtype))


# By launcher: its source, and arguments with which it runs without a report.
CALLS: dict[str, tuple[str, Callable[[], tuple[Tensor | int | float, ...]]]] = {
    "block_sum": ("block", lambda: (filled(3, 1000), filled(3), 3, 1000)),
    "transpose": ("block", lambda: (filled(64, 40), filled(40, 64), 64, 40)),
    "histogram": (
        "block",
        lambda: (filled(2000, dtype=INT), 2000, filled(37, dtype=INT), 37, 2),
    ),
    "warp_scan": ("block", lambda: (filled(512, dtype=INT), filled(512, dtype=INT), 2)),
    "hand_over": ("block", lambda: (filled(5, 32, dtype=INT), 5)),
    "red": ("block", lambda: (filled(1500), 1500, 1.0, 2)),
    "warp_operations": ("block", lambda: (filled(32, dtype=INT), filled(20, 32, dtype=INT), 32)),
    "vote": ("block", lambda: (filled(96, dtype=INT), filled(96, 3, dtype=INT), 96, 0)),
    "gemm": (
        "gemm",
        lambda: (
            (filled(64, 128, dtype=HALF), filled(32, 128, dtype=HALF), filled(64, 32))
            + (64, 32, 128, True)
        ),
    ),
    "gemm_tf32": ("gemm", lambda: (filled(16, 8), filled(8, 8), filled(16, 8))),
}


def report_of(library: Path, launcher: str) -> str:
    """What the launcher's kernel is reported for; empty if for nothing."""
    arguments = CALLS[launcher][1]()
    error = getattr(ctypes.CDLL(str(library)), launcher)(*map(emulator.to_c, arguments))
    return emulator.last_report() if error else ""


@pytest.mark.parametrize("launcher", CALLS)
def test_right_kernels_are_not_reported(launcher: str) -> None:
    source = KERNELS / f"{CALLS[launcher][0]}.cu"
    assert report_of(emulator.build_kernels([source], include=[KERNELS]), launcher) == ""


@pytest.mark.parametrize("fault", KERNEL_FAULTS.values(), ids=KERNEL_FAULTS.keys())
def test_fault_in_a_kernel_is_caught(fault: Fault, tmp_path: Path) -> None:
    source = tmp_path / f"{fault.source}.cu"
    shutil.copy(KERNELS / source.name, source)
    fault.plant(source)
    architecture = 90 if fault.launcher == "red" else 80  # which adds four floats at once
    library = emulator.build_kernels([source], include=[KERNELS], architecture=architecture)
    report = report_of(library, fault.launcher)
    assert re.search(fault.report, report), report
    assert re.search(r"\n  kernel \w+_kernel.*, block \(\d+, 0, 0\), thread \(\d+, ", report), (
        report
    )
    assert f"{source.name}:" in report, report


def call_mask_mix() -> object:
    return ops.mask_mix(*mask_mix_cases.make(mask_mix_cases.CASES["several tasks a thread"]))


OP_CALLS = {"mask_mix": call_mask_mix}


@pytest.mark.parametrize("fault", OP_FAULTS.values(), ids=OP_FAULTS.keys())
def test_fault_in_an_op_is_caught(fault: Fault, tmp_path: Path) -> None:
    shutil.copytree(emulator.CUDA / fault.launcher, tmp_path / fault.launcher)
    fault.plant(tmp_path / fault.launcher / fault.source)
    with (
        emulator.emulated(fault.launcher, folder=tmp_path),
        pytest.raises(RuntimeError, match=f"(?s){fault.report}.*{fault.source}"),
    ):
        OP_CALLS[fault.launcher]()


@pytest.mark.parametrize("op", OP_CALLS)
def test_right_op_is_not_reported(op: str) -> None:
    with emulator.emulated(op):
        OP_CALLS[op]()
