"""Tensor copies under the emulator against torch, and a warp-specialised product against fp64."""

from __future__ import annotations

import ctypes
import re
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cuda.hopper.test_barriers import hopper, report_of
from tests.cuda.hopper.test_wgmma import CODES, swizzle_address
from tests.cuda.hopper.tma_faults import FAULTS
from tests.shared.cuda import emulator
from tests.shared.cuda.emulator import INVALID_VALUE, KERNELS
from tests.shared.cuda.fault import Fault
from tests.shared.cuda.nvcc import compile_options, instructions, run_nvcc

__all__ = ["hopper"]  # a fixture

DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # by their numbers in DType


@pytest.fixture(params=["at once", "delayed"])
def landing(request: pytest.FixtureRequest) -> Iterator[None]:
    with emulator.delayed_copies() if request.param == "delayed" else nullcontext():
        yield


class TiledMatrix(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int),
        ("base", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("box_rows", ctypes.c_int),
        ("box_columns", ctypes.c_int),
        ("swizzle", ctypes.c_int),
    ]


def tiled(matrix: Tensor, box: tuple[int, int], swizzle: int) -> TiledMatrix:
    row_bytes = matrix.stride(0) * matrix.element_size()
    return TiledMatrix(
        DTYPES.index(matrix.dtype),
        matrix.data_ptr(),
        *matrix.shape,
        row_bytes,
        *box,
        CODES[swizzle],
    )


def ragged(rows: int, columns: int, dtype: torch.dtype) -> Tensor:  # [rows, columns]
    """Random numbers in rows whose bytes are a multiple of 16; memory ends after the last one."""
    step = 16 // dtype.itemsize
    padded = torch.randn(rows, -(-columns // step) * step).to(dtype)
    return emulator.guarded(padded[:, :columns])


def cut(matrix: Tensor, row: int, column: int, box: tuple[int, int]) -> Tensor:  # [*box]
    """The box at (row, column), zeros outside."""
    out = torch.zeros(box, dtype=matrix.dtype)
    for i in range(box[0]):
        for j in range(box[1]):
            if 0 <= row + i < matrix.shape[0] and 0 <= column + j < matrix.shape[1]:
                out[i, j] = matrix[row + i, column + j]
    return out


def image_of(box: Tensor, swizzle: int) -> Tensor:  # [bytes] uint8
    flat = box.contiguous().flatten().view(torch.uint8)
    image = torch.empty_like(flat)
    image[[swizzle_address(i, swizzle) for i in range(len(flat))]] = flat
    return image


# Box [rows, columns] of floats by the width of the swizzle.
BOXES = {0: (9, 12), 32: (24, 8), 64: (16, 16), 128: (17, 32)}
PLACES = [(0, 0), (8, 16), (30, 33), (-3, -5), (-100, 0), (40, 37)]


@pytest.mark.usefixtures("landing")
@pytest.mark.parametrize("swizzle", BOXES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_load(dtype: torch.dtype, swizzle: int) -> None:
    matrix = ragged(40, 37, dtype)
    rows, columns = BOXES[swizzle]
    box = (rows, columns * 4 // dtype.itemsize)
    for row, column in PLACES:
        image = emulator.guarded(torch.zeros(box[0] * box[1], dtype=dtype))
        arguments = (ctypes.byref(tiled(matrix, box, swizzle)), image, row, column)
        assert report_of(KERNELS / "tma.cu", "load", *arguments) == ""
        expected = image_of(cut(matrix, row, column, box), swizzle)
        assert torch.equal(image.view(torch.uint8), expected)


@pytest.mark.usefixtures("landing")
@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_blocks_of_a_cluster_share_boxes(cluster: int) -> None:
    matrix, box = ragged(40, 37, torch.float32), (8, 32)
    images = emulator.guarded(torch.zeros(cluster, cluster, box[0] * box[1]))
    arguments = (ctypes.byref(tiled(matrix, box, 128)), images, 16, 8, cluster)
    assert report_of(KERNELS / "tma.cu", "share", *arguments) == ""
    for r in range(cluster):
        expected = image_of(cut(matrix, 16 + 8 * r, 8, box), 128)
        for image in images[:, r]:
            assert torch.equal(image.view(torch.uint8), expected)


@pytest.mark.usefixtures("landing")
@pytest.mark.parametrize("add", [False, True], ids=["store", "add"])
@pytest.mark.parametrize("swizzle", BOXES)
def test_store(swizzle: int, add: bool) -> None:
    box = BOXES[swizzle]
    for row, column in PLACES:
        matrix = ragged(40, 37, torch.float32)
        before, values = matrix.clone(), torch.randn(box)
        image = emulator.guarded(image_of(values, swizzle))
        arguments = (ctypes.byref(tiled(matrix, box, swizzle)), image, row, column, add)
        assert report_of(KERNELS / "tma.cu", "store", *arguments) == ""
        for i in range(box[0]):
            for j in range(box[1]):
                if 0 <= row + i < 40 and 0 <= column + j < 37:
                    at = row + i, column + j
                    before[at] = before[at] + values[i, j] if add else values[i, j]
        assert torch.equal(matrix, before)


def test_a_block_does_not_end_before_its_copies(tmp_path: Path) -> None:
    text, wait = (KERNELS / "tma.cu").read_text(), "m3i::mbarrier_wait(landed, 0);"
    source = tmp_path / "tma.cu"
    source.write_text(text.replace(wait, "if (words > 0) return;"))
    with emulator.delayed_copies():
        report = report_of(source, "load", *CALLS["load"]())
    assert "the block ended while a tensor copy to its shared memory was under way" in report


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("base", 8, "base: not a multiple of 16"),
        ("rows", 0, "rows: not in 1 to 2^32"),
        ("columns", (1 << 32) + 1, "columns: not in 1 to 2^32"),
        ("row_bytes", 136, "row_bytes: not a multiple of 16"),
        ("row_bytes", 112, "row_bytes: less than a row has"),
        ("row_bytes", 1 << 40, "row_bytes: 2^40 or more"),
        ("box_rows", 257, "box_rows: not in 1 to 256"),
        ("box_columns", 0, "box_columns: not in 1 to 256"),
        ("box_columns", 30, "box_columns: their bytes are not a multiple of 16"),
        ("box_columns", 36, "box_columns: not as wide as the swizzle"),
        ("box_columns", 16, "box_columns: not as wide as the swizzle"),
    ],
)
def test_maps_that_the_driver_would_not_make(field: str, value: int, expected: str) -> None:
    matrix = ragged(40, 32, torch.float32)
    tiled_matrix = tiled(matrix, (8, 32), 128)
    library = ctypes.CDLL(
        str(emulator.build_kernels([KERNELS / "tma.cu"], include=[KERNELS], architecture=90))
    )
    library.fault_of.restype = ctypes.c_char_p
    assert library.fault_of(ctypes.byref(tiled_matrix)) is None
    setattr(tiled_matrix, field, matrix.data_ptr() + 8 if field == "base" else value)
    assert library.fault_of(ctypes.byref(tiled_matrix)).decode() == expected
    assert library.load(ctypes.byref(tiled_matrix), None, 0, 0) == INVALID_VALUE


# ---- A warp-specialised product -----------------------------------------------------------------


def gemm_arguments(m: int, n: int, k: int) -> tuple[Tensor | int, ...]:
    torch.manual_seed(m)
    a, b = ragged(m, k, torch.bfloat16), ragged(n, k, torch.bfloat16)
    d = ragged(m, n, torch.float32)
    return a, b, d, m, n, k, d.stride(0)


@pytest.mark.usefixtures("landing")
@pytest.mark.parametrize(
    ("m", "n", "k"), [(128, 128, 64), (200, 130, 456), (1, 1, 8), (65, 257, 320)]
)
def test_gemm(m: int, n: int, k: int) -> None:
    arguments = gemm_arguments(m, n, k)
    assert report_of(KERNELS / "hopper_gemm.cu", "hopper_gemm", *arguments) == ""
    a, b, d = arguments[:3]
    truth = a.double() @ b.double().t()
    scale = a.double().abs() @ b.double().abs().t()
    assert ((d.double() - truth).abs() <= k * torch.finfo(torch.float32).eps * scale).all()


def test_a_gemm_is_tensor_copies_and_products(tmp_path: Path) -> None:
    (code,) = instructions(KERNELS / "hopper_gemm.cu", "90a", tmp_path).values()
    for opcode, count in (("UTMALDG.2D", 2), ("UTMASTG.2D", 4), ("HGMMA.64x128x16.F32.BF16", 4)):
        assert sum(op == opcode for op in code) == count, opcode
    options = [*compile_options("90a"), "-Xptxas=-v", "-cubin", "-o", tmp_path / "gemm.cubin"]
    assert "serialized" not in run_nvcc(*options, KERNELS / "hopper_gemm.cu")


def test_copies_are_single_instructions(tmp_path: Path) -> None:
    kernels = instructions(KERNELS / "tma.cu", "90a", tmp_path)
    found = {op for code in kernels.values() for op in code}
    assert {"UTMALDG.2D", "UTMASTG.2D", "UTMAREDG.2D.ADD", "UTMACCTL.PF"} <= found


# ---- Faults -------------------------------------------------------------------------------------

CALLS = {
    "load": lambda: _box_arguments(),
    "store": lambda: (*_box_arguments(), False),
    "share": lambda: (*_box_arguments(), 2),
    "hopper_gemm": lambda: gemm_arguments(128, 128, 328),
}


def _box_arguments() -> tuple[object, ...]:
    matrix = ragged(40, 37, torch.float32)
    tiled_matrix = tiled(matrix, (16, 32), 128)
    tiled_matrix.kept = matrix
    return ctypes.byref(tiled_matrix), ragged(16, 32, torch.float32), 8, 0


@pytest.mark.usefixtures("landing")
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_planted_fault_is_reported(fault: Fault, tmp_path: Path) -> None:
    source = tmp_path / f"{fault.source}.cu"
    shutil.copy(KERNELS / source.name, source)
    fault.plant(source)
    report = report_of(source, fault.launcher, *CALLS[fault.launcher]())
    assert re.search(fault.report, report), report
    assert f"{source.name}:" in report, report
