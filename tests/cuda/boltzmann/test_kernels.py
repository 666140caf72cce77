"""boltzmann's CUDA kernels by a compiler and a disassembler, and in calls of many blocks."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cuda.boltzmann.source import shrink
from tests.shared.cuda import emulator
from tests.shared.cuda.nvcc import compile_options, instructions, run_nvcc
from tests.shared.ops import boltzmann_kernel_cases as kernels


def test_policy(tmp_path: Path) -> None:
    source = Path(__file__).with_name("policy.cu")
    run_nvcc(*compile_options("80"), "-c", source, "-o", tmp_path / "policy.o")


# ---- Instructions --------------------------------------------------------------------------------


@cache
def opcodes(folder: Path) -> dict[str, Counter[str]]:
    """How often a kernel has each; `stem<type>` by its short name, without modifiers of loads."""
    source = Path(__file__).with_name("sass.cu")
    sass = instructions(source, "80", folder)
    return {name: Counter(code) for name, code in sass.items()}


@pytest.fixture
def sass(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counter[str]]:
    return opcodes(tmp_path_factory.getbasetemp())


def count(code: Counter[str], pattern: str) -> int:
    return sum(number for opcode, number in code.items() if re.match(pattern, opcode))


def kernel_of(sass: dict[str, Counter[str]], stem: str, kind: str = "BFloat16") -> Counter[str]:
    (code,) = (code for name, code in sass.items() if f"boltzmann_{stem}_kernelI" in name
               and (kind in name if kind == "BFloat16" else "kernelIfE" in name))  # fmt: skip
    return code


PRODUCTS = {
    # products of a warp's tile a stage: 4 x 8 tiles of 16 x 8, of 32 terms; two layouts of G
    "maxima": (64, 16),
    "sums": (64, 16),
    "logit_grads": (64, 16),
    "feature_grads": (128, 32),
}


@pytest.mark.parametrize("stem", PRODUCTS)
def test_bfloat16_goes_through_the_tensor_cores(sass: dict[str, Counter[str]], stem: str) -> None:
    """Each product once; their operands by ldmatrix, transposed where G or the features lie so."""
    code, (products, loads) = kernel_of(sass, stem), PRODUCTS[stem]
    assert count(code, r"HMMA\.16816\.F32\.BF16") == products
    assert count(code, r"LDSM\.") == loads
    assert count(code, r"LDSM\.16\.MT88") == (24 if stem == "feature_grads" else 0)


def test_float32_takes_three_products_in_tf32(sass: dict[str, Counter[str]]) -> None:
    code = kernel_of(sass, "feature_grads", "float")
    # 4 x 8 tiles of 16 x 8, of 16 terms, 8 a product; two layouts of G
    assert count(code, r"HMMA\.1688\.F32\.TF32") == 3 * 4 * 8 * 2 * 2


def test_operands_are_copied_16_bytes_at_a_time(sass: dict[str, Counter[str]]) -> None:
    """Past the first-level cache, in the prologue and in the loop, and in no other way."""
    assert len(sass) == 5
    for name, code in sass.items():
        layouts = 2 if "feature_grads" in name else 1
        assert count(code, r"LDGSTS\.E\.BYPASS\.128") >= 2 * 8 * layouts, name
        assert count(code, r"LDGSTS") == count(code, r"LDGSTS\.E\.BYPASS\.128"), name


def test_one_exponential_an_element(sass: dict[str, Counter[str]]) -> None:
    """With one shift: of a tile without positives, and of one with; 128 elements a thread."""
    assert count(kernel_of(sass, "sums"), r"MUFU\.EX2") == 2 * 128


def test_nothing_goes_through_local_memory(sass: dict[str, Counter[str]]) -> None:
    for name, code in sass.items():
        assert count(code, "STL|LDL") == 0, name


# ---- Blocks --------------------------------------------------------------------------------------


def everything(call: kernels.Call, dtype: torch.dtype) -> list[Tensor]:
    """All that the ops return, in `dtype` arithmetic; 0 where it is -inf."""
    results = [*kernels.true_maxima(call, dtype), *kernels.true_sums(call, dtype)]
    results += kernels.true_grads(call, dtype, rounded=dtype == torch.float32)
    return [result.masked_fill(result == -torch.inf, 0) for result in results]


def test_blocks_add_up(tmp_path: Path) -> None:
    """Blocks of two tiles in place of thousands: 2 x 3 of them."""
    folder = tmp_path / "boltzmann"
    shutil.copytree(emulator.CUDA / "boltzmann", folder)
    shrink(folder, blocks=True)
    names = "row_max col_max rows cols grad_z_hat grad_z grad_scale grad_bias values"
    with emulator.emulated("boltzmann", folder=tmp_path):
        for mode in kernels.MODES:
            call = kernels.make((300, 290, 40), torch.bfloat16, mode, labels=True)
            ours = [*call.maxima(), *call.sums(), *call.grads()]
            ours = [our.masked_fill(our == -torch.inf, 0) for our in ours]
            torchs, truth = (everything(call, dtype) for dtype in (torch.float32, torch.float64))
            kernels.assert_all_as_accurate(ours, torchs, truth, call, names)
