"""The emulator's 16-bit numbers, bit for bit against torch; and threads that never end well."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda.emulator.test_emulator import call, empty, run, zeros
from tests.shared.cuda import emulator

DTYPES = (torch.float16, torch.bfloat16)


def every_value(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)


def assert_same_bits(value: Tensor, expected: Tensor) -> None:
    """NaN may be any NaN."""
    nan = expected.isnan()
    assert torch.equal(value.isnan(), nan)
    bits = torch.int16 if value.element_size() == 2 else torch.int32
    assert torch.equal(value.view(bits)[~nan], expected.view(bits)[~nan])


@pytest.mark.parametrize("dtype", DTYPES)
def test_widening_is_exact(dtype: torch.dtype) -> None:
    values, out = every_value(dtype), empty(1 << 16)
    run("numbers", "widen", emulator.guarded(values), out, 1 << 16, dtype == torch.float16)
    assert_same_bits(out, values.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_narrowing_rounds_to_nearest_even(dtype: torch.dtype) -> None:
    values = every_value(dtype).float()
    values = values[values.isfinite()]
    up = torch.nextafter(values, torch.tensor(torch.inf))
    between = (values[1:].double() + values[:-1].double()).div(2).float()  # ties
    around = [torch.nextafter(between, torch.tensor(limit)) for limit in (-torch.inf, torch.inf)]
    scattered = torch.randn(10000) * 10.0 ** torch.randint(-40, 39, (10000,))
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65519.9, 65520.0, 3.4e38])
    values = torch.cat([values, up, between, *around, scattered, special])
    out = empty(len(values), dtype=dtype)
    run("numbers", "narrow", emulator.guarded(values), out, len(values), dtype == torch.float16)
    assert_same_bits(out, values.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_arithmetic_rounds_once(dtype: torch.dtype) -> None:
    a, b = (torch.randn(5000).mul(8).to(dtype) for _ in range(2))
    out = empty(5, 5000, dtype=dtype)
    run("numbers", "arithmetic", *map(emulator.guarded, (a, b)), out, 5000, dtype == torch.float16)
    x, y = a.double(), b.double()
    expected = torch.stack([x + y, x - y, x * y, x / y, x * y + x])
    finite = expected.abs() < torch.finfo(dtype).max
    assert_same_bits(out[finite], expected.to(dtype)[finite])


# ---- Threads that end otherwise -----------------------------------------------------------------


def test_a_full_stack_is_reported() -> None:
    out = zeros(64, dtype=torch.int32)
    run("numbers", "descend", out, 64, 10)
    assert call("numbers", "descend", out, 64, 1000) != 0
    assert "local variables of more than 64 KiB" in emulator.last_report()
    run("numbers", "descend", out, 64, 10)  # the next launch is not disturbed


def test_a_division_by_zero_is_reported() -> None:
    out = zeros(64, dtype=torch.int32)
    run("numbers", "divide", out, 64, 3)
    assert out.tolist() == [i // 3 for i in range(64)]
    assert call("numbers", "divide", out, 64, 0) != 0
    assert "division by zero" in emulator.last_report()
    assert "numbers.cu:" in emulator.last_report()


def test_a_waiting_loop_lets_the_others_run() -> None:
    run("numbers", "spin", zeros(1, dtype=torch.int32), 96, True)


def test_a_waiting_loop_without_end_is_reported() -> None:
    assert call("numbers", "spin", zeros(1, dtype=torch.int32), 33, False) != 0
    assert "standstill" in emulator.last_report()
    assert "32 threads wait for their turn" in emulator.last_report()
