"""boltzmann on a GPU, held to what it is held to on the CPU; the emulator runs elsewhere."""

from __future__ import annotations

import itertools

import pytest
import torch

from m3i_fast.ops import boltzmann, boltzmann_rows
from tests.ops.boltzmann.cases import FP32, FP64, HALVES, HARD, KINDS, Case, assert_right, grid
from tests.ops.boltzmann.soft_cases import assert_soft_right

pytestmark = pytest.mark.gpu
DTYPES = (FP32, FP64, *HALVES)


@pytest.mark.parametrize("kind", KINDS)
def test_small_calls(kind: str) -> None:
    cases = [case for case in grid() if case.kind == kind and case.rows * case.width < 1500]
    for case, dtype in zip(cases, itertools.cycle(DTYPES)):  # noqa: B905
        assert_right(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_all_calls(kind: str, dtype: torch.dtype) -> None:
    for case in grid():
        if case.kind == kind:
            assert_right(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", HARD.values(), ids=HARD)
def test_hard_calls(case: Case, dtype: torch.dtype) -> None:
    assert_right(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", [FP32, *HALVES])
@pytest.mark.parametrize("kind", ["diagonal", "ids", "sigmoid"])
def test_calls_of_many_tiles(kind: str, dtype: torch.dtype) -> None:
    """Wide and long enough for the tiles of whichever card."""
    for width in (512, 520):
        assert_right(Case(kind, 3000, 3000, width), dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_targets(dtype: torch.dtype) -> None:
    """Also in several blocks of rows, with products of half types that add to the earlier ones."""
    for shape in ((1, 1), (33, 17), (129, 1000)):
        assert_soft_right(shape, 20.0, dtype, "cuda")
    with pytest.MonkeyPatch.context() as small:
        small.setitem(boltzmann_rows._BLOCK_BYTES, "cuda", 64 * 1008 * 4)
        assert_soft_right((300, 1000), 20.0, dtype, "cuda")
        assert_right(Case("classes with bias", 300, 1000, 72), dtype, "cuda")


def test_a_call_of_several_blocks_has_the_same_right_bits_again() -> None:
    """The clusters of compute capability 9.0 share four blocks of C out, in an order of their own.

    Blocks of 4,096 x 4,096 or less, so that 4,608 rows and columns take two of them each.
    """
    assert_right(Case("diagonal", 4608, 4608, 512), torch.bfloat16, "cuda")
    a, b = (torch.randn(4608, 512, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a, b = (torch.nn.functional.normalize(x, dim=1).requires_grad_() for x in (a, b))
    scale = torch.tensor(20.0, device="cuda", requires_grad=True)
    runs = []
    for _ in range(3):
        value = boltzmann(a, b, scale)
        runs.append([value.detach(), *torch.autograd.grad(value, [a, b, scale])])
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(run, runs[0], strict=True))
