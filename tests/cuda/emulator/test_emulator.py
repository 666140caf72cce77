"""What the emulator computes, against torch and Python; nvcc compiles the same kernels."""

from __future__ import annotations

import ctypes
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m3i_fast.benchmarks.core.cuda_toolkit import ARCHITECTURES
from tests.shared.cuda import emulator
from tests.shared.cuda.emulator import (
    INVALID_CONFIGURATION,
    INVALID_VALUE,
    KERNELS,
    OUT_OF_RESOURCES,
    SUCCESS,
)
from tests.shared.cuda.nvcc import compile_options, run_nvcc

SOURCES = sorted(KERNELS.glob("*.cu"))


@cache
def library(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(emulator.build_kernels([KERNELS / f"{name}.cu"], include=[KERNELS])))


def call(kernels: str, launcher: str, *arguments: Tensor | int | float) -> int:
    """The launcher's error; tensors, which must lie in guarded memory, are passed as pointers."""
    return getattr(library(kernels), launcher)(*map(emulator.to_c, arguments))


def run(kernels: str, launcher: str, *arguments: Tensor | int | float) -> None:
    error = call(kernels, launcher, *arguments)
    assert error == SUCCESS, f"error {error}: {emulator.last_report()}"


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    with emulator.guarded_memory():
        return torch.empty(shape, dtype=dtype)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return empty(*shape, dtype=dtype).zero_()


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvcc_compiles_the_same_kernels(source: Path, architecture: str, tmp_path: Path) -> None:
    run_nvcc(*compile_options(architecture), "-c", source, "-o", tmp_path / "kernel.o")


# ---- What the threads of a block do together ----------------------------------------------------


@pytest.mark.parametrize("width", [1, 31, 256, 1000])
def test_block_sum(width: int) -> None:
    values, sums = emulator.guarded(torch.randn(3, width)), empty(3)
    run("block", "block_sum", values, sums, 3, width)
    torch.testing.assert_close(sums.double(), values.double().sum(1), rtol=1e-5, atol=1e-5)


def test_launches_are_logged(tmp_path: Path) -> None:
    """Those that a kernel was asked for, with what nvcc and g++ call it, also if it is refused."""
    log = tmp_path / "launches.jsonl"
    values = emulator.guarded(torch.zeros(33, 70))
    with emulator.logged_launches(log):
        run("block", "transpose", values, empty(70, 33), 33, 70)
        assert call("block", "block_sum", values, empty(3), 0, 70) == INVALID_CONFIGURATION
    run("block", "transpose", values, empty(70, 33), 33, 70)
    transpose, refused = map(json.loads, log.read_text().splitlines())
    assert (
        transpose.pop("name")
        == "(anonymous namespace)::transpose_kernel(float const*, float*, int, int)"
    )
    assert transpose == {"grid": [3, 2, 1], "block": [32, 8, 1], "shared": 0}
    assert refused["grid"] == [0, 1, 1] and "::block_sum_kernel(" in refused["name"]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (1, 1), (33, 70), (100, 40)])
def test_transpose_through_shared_memory(height: int, width: int) -> None:
    values, out = emulator.guarded(torch.randn(height, width)), empty(width, height)
    run("block", "transpose", values, out, height, width)
    assert torch.equal(out, values.t())


def test_histogram_by_atomics() -> None:
    values = emulator.guarded(torch.randint(37, (5000,), dtype=torch.int32))
    counts = zeros(37, dtype=torch.int32)
    run("block", "histogram", values, 5000, counts, 37, 3)
    assert torch.equal(counts.long(), torch.bincount(values, minlength=37))


def test_warp_scan() -> None:
    values = emulator.guarded(torch.randint(-99, 99, (512,), dtype=torch.int32))
    out = empty(512, dtype=torch.int32)
    run("block", "warp_scan", values, out, 2)
    assert torch.equal(out, values.view(-1, 32).cumsum(1).int().flatten())


def test_named_barriers_hand_a_buffer_over() -> None:
    out = empty(5, 32, dtype=torch.int32)
    run("block", "hand_over", out, 5)
    assert torch.equal(out, (torch.arange(5)[:, None] ** 2 + torch.arange(32)).int())


def test_vector_red() -> None:
    out = emulator.guarded(torch.ones(1500))
    run("block", "red", out, 1500, 0.5, 2)
    assert torch.equal(out, 1 + 0.5 * torch.arange(1500))


def signed(bits: int) -> int:
    return bits - (1 << 32) if bits >> 31 else bits


def expected_warp_operations(values: list[int], lanes: int) -> list[list[int]]:
    """What CUDA's documentation says of each row of warp_operations, lane by lane."""
    own = range(lanes)
    mask = (1 << lanes) - 1
    unsigned = [value & 0xFFFFFFFF for value in values]
    reduced_and, reduced_or, reduced_xor = mask32, zero, flipped = 0xFFFFFFFF, 0, 0
    for value in unsigned[:lanes]:
        mask32, zero, flipped = mask32 & value, zero | value, flipped ^ value
    reduced_and, reduced_or, reduced_xor = mask32, zero, flipped
    present = values[:lanes]
    all_equal = len(set(present)) == 1

    def remainder(value: int) -> int:  # as C++ has it
        return value % 3 if value >= 0 else -(-value % 3)

    def everywhere(value: int) -> list[int]:
        return [signed(value & 0xFFFFFFFF)] * lanes

    return [
        [values[3] for _ in own],
        [values[lane // 2] for lane in own],
        [values[lane // 8 * 8 + 1] for lane in own],
        [values[lane - 3] if lane >= 3 else values[lane] for lane in own],
        [values[lane - 1] if lane % 4 else values[lane] for lane in own],
        [values[lane ^ 2] for lane in own],
        [values[lane ^ 1] for lane in own],
        everywhere(sum((values[lane] > 0) << lane for lane in own)),
        everywhere(any(value > 1000 for value in present)),
        everywhere(all(value > -1000 for value in present)),
        [
            signed(sum((remainder(values[i]) == remainder(values[lane])) << i for i in own))
            for lane in own
        ],
        everywhere(mask if all_equal else 0),
        everywhere(all_equal),
        everywhere(sum(present)),
        everywhere(min(present)),
        everywhere(max(present)),
        everywhere(max(unsigned[:lanes])),
        everywhere(reduced_and),
        everywhere(reduced_or),
        everywhere(reduced_xor),
    ]


@pytest.mark.parametrize("lanes", [32, 20])
@pytest.mark.parametrize("same", [False, True])
def test_warp_operations(lanes: int, same: bool) -> None:
    values = torch.randint(-900, 900, (32,), dtype=torch.int32)
    if same:
        values[:] = 7
    expected = expected_warp_operations(values.tolist(), lanes)
    out = zeros(len(expected), 32, dtype=torch.int32)
    run("block", "warp_operations", emulator.guarded(values), out, lanes)
    assert out[:, :lanes].tolist() == expected


@pytest.mark.parametrize(("limit", "holds"), [(-1, 96), (49, 46), (95, 0)])
def test_votes_of_a_block(limit: int, holds: int) -> None:
    values, out = (
        emulator.guarded(torch.arange(96, dtype=torch.int32)),
        zeros(96, 3, dtype=torch.int32),
    )
    run("block", "vote", values, out, 96, limit)
    assert out.tolist() == [[holds, int(holds == 96), int(holds > 0)]] * 96


# ---- Tensor cores -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "k"), [(32, 16, 32), (40, 24, 72), (8, 8, 8), (64, 32, 128)])
def test_gemm(dtype: torch.dtype, m: int, n: int, k: int) -> None:
    a, b, d = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype), empty(m, n)
    run("gemm", "gemm", *map(emulator.guarded, (a, b)), d, m, n, k, dtype == torch.float16)
    truth = a.double() @ b.double().t()
    scale = a.double().abs() @ b.double().abs().t()
    assert ((d.double() - truth).abs() <= k * torch.finfo(torch.float32).eps * scale).all()


def test_gemm_tf32() -> None:
    a, b, d = torch.randn(16, 8), torch.randn(8, 8), empty(16, 8)
    run("gemm", "gemm_tf32", *map(emulator.guarded, (a, b)), d)
    truth = a.double() @ b.double().t()
    scale = a.double().abs() @ b.double().abs().t()
    error = (d.double() - truth).abs()
    assert (error <= 2.0**-10 * scale).all()
    assert error.max() > 1e-6  # else it was not rounded to tf32


def test_transposing_load() -> None:
    values = torch.randint(1 << 15, (2, 8, 8), dtype=torch.int16)
    out = empty(2, 8, 8, dtype=torch.int16)
    run("gemm", "transpose_8x8", emulator.guarded(values), out)
    assert torch.equal(out, values.transpose(1, 2))


# ---- Limits of a launch -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid_y", "threads", "shared_bytes", "error"),
    [
        (1, 64, 0, SUCCESS),
        (65535, 64, 0, SUCCESS),
        (65536, 64, 0, INVALID_CONFIGURATION),
        (0, 64, 0, INVALID_CONFIGURATION),
        (1, 0, 0, INVALID_CONFIGURATION),
        (1, 1025, 0, INVALID_CONFIGURATION),
        (1, 96, 0, OUT_OF_RESOURCES),  # __launch_bounds__(64)
        (1, 64, 160 * 1024, SUCCESS),
        (1, 64, 164 * 1024, INVALID_VALUE),
    ],
)
def test_limits_of_a_launch(grid_y: int, threads: int, shared_bytes: int, error: int) -> None:
    out = empty(1, dtype=torch.int32)
    assert call("block", "bounded", grid_y, threads, shared_bytes, out) == error


@pytest.mark.parametrize("asked_kib", [47, 50])
def test_a_launch_leaves_the_limit_at_what_any_size_may_need(asked_kib: int) -> None:
    """Also one that would fit under 48 KiB if its kernel had no static shared memory.

    The limit is a kernel's, and threads launch a kernel side by side: each asks for the same.
    """
    assert call("block", "after_another", asked_kib << 10, 160 << 10) == SUCCESS


def test_a_later_architecture_has_more_shared_memory() -> None:
    with emulator.emulated_gpu(90):
        assert call("block", "bounded", 1, 64, 220 * 1024, zeros(1)) == SUCCESS
