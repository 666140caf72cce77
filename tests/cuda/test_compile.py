"""Every CUDA source compiles without a warning and within its budget."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from m3i_fast.benchmarks.core.cuda_toolkit import ARCHITECTURES, Resources
from m3i_fast.op_registry import OPS, OpSpec
from tests.shared.cuda.nvcc import (
    CUDA,
    ROOT,
    compile_options,
    name_of,
    run_nvcc,
    short_ptxas,
)

KERNELS = sorted(CUDA.glob("*/sm*/*.cu"))
HOST_CODE = sorted([*CUDA.glob("*_cuda.cpp"), *CUDA.glob("*/op_cuda.cpp")])
VIEWS_OF_DALI = [CUDA / "views" / "cpu" / f"{isa}.cpp" for isa in ("avx2", "avx512", "baseline")]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_kernels_keep_their_budget(op: OpSpec, architecture: str, tmp_path: Path) -> None:
    """budget.json beside the kernels holds, for each, the most that ptxas may give it.

    Registers are given out in eights, so a budget is a multiple of eight; it is raised only by
    a commit that says why.
    """
    options = [*compile_options(architecture), "-Xptxas=-v", "-o", tmp_path / "kernel.o", "-c"]
    used: dict[str, Resources] = {}
    for source in (CUDA / op.name).glob("sm*/*.cu"):
        printed = run_nvcc(*options, source)
        assert "serialized" not in printed, f"wgmma that waits for itself: {printed}"
        used |= short_ptxas(printed)
    budget = json.loads((ROOT / op.budget).read_text())[f"sm_{architecture}"]
    assert used and used.keys() == budget.keys(), f"used: {used}"
    over = {
        kernel: asdict(resources)
        for kernel, resources in used.items()
        if any(value > budget[kernel][name] for name, value in asdict(resources).items())
    }
    assert not over, f"over budget: {over}"


def test_dynamic_shared_memory_has_little_of_static_beside_it() -> None:
    """Launchers know the dynamic part alone, and count so much for the static one."""
    header = (CUDA / "include/m3i/host/launch.h").read_text()
    [kib] = re.findall(r"kMostStaticShared = (\d+) \* 1024;", header)
    with_dynamic = {
        CUDA / source.relative_to(CUDA).parts[0]
        for source in CUDA.glob("*/sm*/*.cuh")
        if "dynamic_shared" in source.read_text()
    }
    assert len(with_dynamic) >= 3
    for room in with_dynamic:
        for kernels in json.loads((room / "budget.json").read_text()).values():
            over = [k for k, most in kernels.items() if most["shared_bytes"] > int(kib) * 1024]
            assert not over, f"{room.name}: {over}"


@pytest.mark.parametrize("source", HOST_CODE, ids=name_of)
def test_host_code_compiles_without_warning(source: Path, tmp_path: Path) -> None:
    run_nvcc(*compile_options(), "-c", source, "-o", tmp_path / "host.o")


@pytest.mark.parametrize("name", ["patches_op_cuda", "views_op_cuda"])
def test_dalis_operators_on_a_gpu_compile_without_warning(name: str, tmp_path: Path) -> None:
    """A build with CUDA has it in _dali."""
    dali = importlib.util.find_spec("nvidia.dali")
    if dali is None or not dali.submodule_search_locations:
        pytest.skip("DALI is not installed")
    headers = f"{dali.submodule_search_locations[0]}/include"
    options = [option for option in compile_options() if option != "-std=c++17"]
    source = CUDA / "dali" / f"{name}.cpp"
    # g++ 12 takes DALI's vectors of a few elements for freed ones.
    options += ["-isystem", headers, "-Xcompiler=-Wno-free-nonheap-object"]
    run_nvcc("-std=c++20", *options, "-c", source, "-o", tmp_path / "host.o")


@pytest.mark.parametrize("source", KERNELS, ids=name_of)
def test_launchers_know_no_torch_and_no_triple_chevron(source: Path, tmp_path: Path) -> None:
    dependencies = run_nvcc(*compile_options("80"), "-M", source)
    assert "cuda_runtime" in dependencies
    assert "/torch/" not in dependencies
    assert "<<<" not in source.read_text()


def test_cmake_lists_every_source_once_and_sorted() -> None:
    text = (ROOT / "CMakeLists.txt").read_text()
    listed = {
        name: re.findall(r"cuda/(\S+)", body)
        for name, body in re.findall(r"set\((M3I_\w+_SOURCES)\n(.*?)\n\)", text, re.DOTALL)
    }
    on_disk = {
        "M3I_CPU_SOURCES": [CUDA / "bindings.cpp", *CUDA.glob("*/cpu/*.cpp")],
        "M3I_CUDA_SOURCES": [*HOST_CODE, *KERNELS],
        "M3I_DALI_SOURCES": [*CUDA.glob("dali/*_op.cpp"), *VIEWS_OF_DALI],
    }
    assert listed == {name: sorted(map(name_of, paths)) for name, paths in on_disk.items()}


def test_rooms_are_small_and_their_files_do_not_repeat_the_ops_name() -> None:
    """Fifteen files at one level are what a reader takes in at a glance."""
    files = [path for path in CUDA.rglob("*") if path.is_file()]
    crowded = {room: n for room, n in Counter(path.parent for path in files).items() if n > 15}
    assert not crowded
    ops = {path.parents[1].name for path in KERNELS}
    named = [path for path in files if path.relative_to(CUDA).parts[0] in ops]
    assert named and not [path for path in named if path.name.startswith(tuple(ops))]
