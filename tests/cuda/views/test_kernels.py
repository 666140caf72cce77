"""views' CUDA kernel, as far as a compiler can test it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from m3i_fast.config.data import ViewConfig
from m3i_fast.costs.gpus import CARDS
from m3i_fast.costs.view_cost import view_times, view_work
from tests.shared.cuda.nvcc import CUDA, compile_options, run_nvcc


def test_policy() -> None:
    """Every assertion about the tiling, which is plain C++."""
    source = Path(__file__).with_name("policy.cu")
    options = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-x", "c++"]
    subprocess.run(["g++", *options, f"-I{CUDA}", f"-I{CUDA / 'include'}", source], check=True)


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tmp_path_factory.mktemp("views") / "views.ptx"
    options = [o for o in compile_options() if o != "-O3"]
    run_nvcc(*options, "-arch=compute_80", "-ptx", CUDA / "views/sm80/launch.cu", "-o", made)
    return made.read_text()


def test_no_product_is_fused_with_a_sum_that_the_source_did_not_fuse(ptx: str) -> None:
    """A product that ptxas may fuse is one without a rounding; none of these is added to anything.

    They are exact: by a power of two, or squares of whole numbers.
    """
    products = set(re.findall(r"\bmul\.f(?:32|64)\s+(%fd?\d+),", ptx))
    added = re.findall(r"\b(?:add|sub)\.f(?:32|64)\s+%fd?\d+, (%fd?\d+|0\w+), (%fd?\d+|0\w+);", ptx)
    rounded = re.findall(r"\b(?:mul|add|sub|fma|div)\.rn\.f(?:32|64)\s", ptx)
    assert len(rounded) > 300
    assert added and not products & {operand for pair in added for operand in pair}
    assert not re.search(r"\b(?:mad|fma)\.f(?:32|64)\s", ptx)
    assert "approx" not in ptx and ".ftz" not in ptx


def test_shared_memory_is_known_as_such(ptx: str) -> None:
    """The loops over taps load by instructions of shared memory, and rows by 16 bytes.

    A pointer that is kept in memory is one to anywhere; the few loads of that kind are of the view,
    which may stand in scratch memory.
    """
    num_kernels = len(re.findall(r"\.visible \.entry ", ptx))
    assert num_kernels == 2
    assert len(re.findall(r"\bld\.shared\.(?:u8|s16|u16)\s", ptx)) >= 10 * num_kernels
    assert not re.findall(r"\bld\.(?:s16|u16|f32|f64)\s", ptx)
    assert len(re.findall(r"\bld\.global\.nc\.v4\.u32\s", ptx)) == num_kernels


def test_two_views_of_224_are_bound_by_loads_from_shared_memory() -> None:
    """Under a megabyte from memory: a picture of 0.56 MB read, and two views of 0.15 written."""
    work = view_work((ViewConfig(count=2, blur_probability=0.5),), 375, 500)
    assert work.memory == 3 * (375 * 500 + 2 * 224**2)
    times = view_times(work, CARDS["h100"])
    assert times.index(max(times)) == 2
