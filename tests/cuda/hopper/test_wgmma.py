"""wgmma under the emulator against fp64, with operands laid out here from the PTX ISA's tables.

A shape or stride is written as CuTe writes it, in elements: `((8, 8), (8, 2))` has two nested
modes, of which the leftmost runs fastest.
"""

from __future__ import annotations

import ctypes
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cuda.hopper.test_barriers import hopper, report_of
from tests.cuda.hopper.wgmma_faults import FAULTS
from tests.shared.cuda import emulator
from tests.shared.cuda.emulator import KERNELS
from tests.shared.cuda.fault import Fault
from tests.shared.cuda.nvcc import instructions

__all__ = ["hopper"]  # a fixture

Nested = int | tuple["Nested", ...]

T = 8  # elements of 16 bits in 128
SWIZZLES = {0: 16, 128: 128, 64: 64, 32: 32}  # bytes: of a row of the pattern
CODES = {0: 0, 128: 1, 64: 2, 32: 3}  # in a descriptor


def size(shape: Nested) -> int:
    return shape if isinstance(shape, int) else int(np.prod([size(part) for part in shape]))


def offset(index: int, shape: Nested, stride: Nested) -> int:
    """Where element `index` of a mode lies, colexicographically."""
    if isinstance(shape, int):
        assert isinstance(stride, int)
        return index * stride
    assert isinstance(stride, tuple)
    total = 0
    for part, step in zip(shape, stride, strict=True):
        total += offset(index % size(part), part, step)
        index //= size(part)
    return total


def swizzle_address(address: int, swizzle: int) -> int:
    """Swizzle<B, 4, 3> of a byte address: B bits from bit 4 on, by those from bit 7 on."""
    bits = {0: 0, 32: 1, 64: 2, 128: 3}[swizzle]
    for bit in range(4, 4 + bits):
        address ^= (address >> (bit + 3) & 1) << bit
    return address


@dataclass(frozen=True, slots=True)
class Layout:
    """Of rows x 16 elements, in the canonical form; strides in bytes."""

    rows: Nested
    rows_stride: Nested
    depth: Nested
    depth_stride: Nested
    leading: int
    stride: int


def canonical(rows: int, swizzle: int, mn_major: bool, leading: int, stride: int) -> Layout:
    """The PTX ISA's table of canonical layouts, for m and k repetitions of the pattern."""
    lbo, sbo = leading // 2, stride // 2
    width = SWIZZLES[swizzle] // 16
    if not mn_major:
        depth_stride = (1, T if swizzle else lbo)
        return Layout((8, rows // 8), (width * T, sbo), (T, 2), depth_stride, leading, stride)
    across, m = (T, width, rows // (T * width)), (1, T, lbo if swizzle else sbo)
    return Layout(across, m, (8, 2), (width * T, sbo if swizzle else lbo), leading, stride)


@dataclass(frozen=True, slots=True)
class Image:
    """An operand's bytes in shared memory, and the first byte of each 16 of k."""

    data: Tensor  # [bytes] uint8
    layout: Layout
    starts: list[int]


def lay_out(matrix: Tensor, swizzle: int, mn_major: bool) -> Image:  # [rows, k] of 16 bits
    """As a kernel would: tiles as wide as the swizzle, one after another."""
    rows, depth = matrix.shape
    row_bytes = SWIZZLES[swizzle]
    if mn_major:  # a pattern: row_bytes / 2 rows by 8 of k
        pattern = 8 * row_bytes
        patterns = rows // (row_bytes // 2)
        to_next_rows, to_next_depth = pattern, patterns * pattern
        leading, stride = (
            (to_next_rows, to_next_depth) if swizzle else (to_next_depth, to_next_rows)
        )
        starts = [2 * to_next_depth * step for step in range(depth // 16)]
    else:  # panels of all rows, as wide as the swizzle
        panel, stride = rows * row_bytes, 8 * row_bytes
        leading = 16 if swizzle else panel
        starts = [
            32 * step // row_bytes * panel + 32 * step % row_bytes for step in range(depth // 16)
        ]
    layout = canonical(rows, swizzle, mn_major, leading, stride)
    size = -(-matrix.numel() * 2 // 1024) * 1024
    image = np.full(size // 2, 0x7FFF, dtype=np.uint16)
    values = matrix.view(torch.int16).numpy().view(np.uint16)
    for step, start in enumerate(starts):
        for row in range(rows):
            at_row = start + 2 * offset(row, layout.rows, layout.rows_stride)
            for k in range(16):
                at = at_row + 2 * offset(k, layout.depth, layout.depth_stride)
                image[swizzle_address(at, swizzle) // 2] = values[row, 16 * step + k]
    return Image(torch.from_numpy(image.view(np.uint8)), layout, starts)


class Operand(ctypes.Structure):
    _fields_ = [
        ("image", ctypes.c_void_p),
        ("bytes", ctypes.c_int),
        ("leading", ctypes.c_uint32),
        ("stride", ctypes.c_uint32),
        ("starts", ctypes.c_int * 8),
    ]


class Problem(ctypes.Structure):
    _fields_ = [
        ("a", Operand),
        ("b", Operand),
        ("swizzle", ctypes.c_int),
        ("steps", ctypes.c_int),
        ("accumulate", ctypes.c_bool),
        ("a_rows", ctypes.c_void_p),
        ("d", ctypes.c_void_p),
    ]


def to_operand(image: Image, data: Tensor) -> Operand:
    layout = image.layout
    starts = (ctypes.c_int * 8)(*image.starts)
    return Operand(data.data_ptr(), data.numel(), layout.leading, layout.stride, starts)


def arguments(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    swizzle: int = 128,
    a_mn: bool = False,
    b_mn: bool = False,
    in_registers: bool = False,
    accumulate: bool = True,
) -> tuple[object, ...]:  # a [64, k], b [columns, k], d [64, columns] fp32, in place
    """Of the launcher."""
    images = [lay_out(a, swizzle, a_mn), lay_out(b, swizzle, b_mn)]
    data = [emulator.guarded(image.data) for image in images]
    rows = emulator.guarded(a)
    problem = Problem(
        *(to_operand(image, copy) for image, copy in zip(images, data, strict=True)),
        CODES[swizzle],
        a.shape[1] // 16,
        accumulate,
        rows.data_ptr() if in_registers else None,
        d.data_ptr(),
    )
    problem.kept = [*data, rows]
    return ctypes.byref(problem), b.shape[0], a.dtype == torch.float16, a_mn, b_mn


def check(columns: int, depth: int, dtype: torch.dtype, **options: bool | int) -> None:
    torch.manual_seed(columns)
    a, b = torch.randn(64, depth, dtype=dtype), torch.randn(columns, depth, dtype=dtype)
    start = torch.randn(64, columns)
    if not options.get("accumulate", True):
        start.fill_(math.nan)
    d = emulator.guarded(start)
    assert report_of(KERNELS / "wgmma.cu", "wgmma", *arguments(a, b, d, **options)) == ""
    start = start.nan_to_num(0)
    truth = start.double() + a.double() @ b.double().t()
    scale = start.double().abs() + a.double().abs() @ b.double().abs().t()
    bound = depth * torch.finfo(torch.float32).eps * scale
    assert ((d.double() - truth).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize("b_mn", [False, True], ids=["B by k", "B by n"])
@pytest.mark.parametrize("a", ["A by k", "A by m", "A in registers"])
def test_layouts(a: str, b_mn: bool, swizzle: int, dtype: torch.dtype) -> None:
    check(
        64,
        64,
        dtype,
        swizzle=swizzle,
        a_mn=a == "A by m",
        b_mn=b_mn,
        in_registers=a == "A in registers",
    )


@pytest.mark.parametrize("columns", [32, 128, 192, 256])
def test_widths(columns: int) -> None:
    check(columns, 128, torch.bfloat16)


@pytest.mark.parametrize("in_registers", [False, True])
def test_the_first_product_may_set_the_accumulator(in_registers: bool) -> None:
    check(64, 48, torch.float16, swizzle=0, in_registers=in_registers, accumulate=False)


def test_the_layout_model_is_the_isa_s_example() -> None:
    """MN-major, 64-byte swizzle, bf16: ((8,4,2),(8,2)):((1,8,256),(32,512)), LBO 256, SBO 512."""
    layout = canonical(64, 64, True, 2 * 256, 2 * 512)
    assert (layout.rows, layout.depth) == ((8, 4, 2), (8, 2))
    assert (layout.rows_stride, layout.depth_stride) == ((1, 8, 256), (32, 512))


def test_every_product_is_one_instruction(tmp_path: Path) -> None:
    kernels = instructions(KERNELS / "wgmma.cu", "90a", tmp_path)
    for columns, count in ((32, 1), (64, 12), (128, 1), (192, 1), (256, 1)):
        names = [name for name in kernels if f"wgmma_kernelILi{columns}E" in name]
        assert len(names) == count
        for name in names:
            products = [op for op in kernels[name] if op.startswith(f"HGMMA.64x{columns}x16.F32")]
            half = "Float16" in name and "BFloat16" not in name
            assert len(products) == 8 and all(("BF16" in op) != half for op in products), name
            assert not any(op.startswith(("STL", "LDL")) for op in kernels[name]), name


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_planted_fault_is_reported(fault: Fault, tmp_path: Path) -> None:
    source = tmp_path / f"{fault.source}.cu"
    shutil.copy(KERNELS / source.name, source)
    fault.plant(source)
    a, b = torch.ones(64, 64, dtype=torch.bfloat16), torch.ones(64, 64, dtype=torch.bfloat16)
    d = emulator.guarded(torch.zeros(64, 64))
    report = report_of(source, fault.launcher, *arguments(a, b, d))
    assert re.search(fault.report, report), report
    assert f"{source.name}:" in report, report
