"""dcnv3's CUDA kernels, as far as a compiler and a disassembler can test them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.shared.cuda.nvcc import CUDA, compile_options, instructions, run_nvcc


@pytest.mark.parametrize("name", ["policy.cu", "windows.cu"])
def test_policy(name: str, tmp_path: Path) -> None:
    source = Path(__file__).with_name(name)
    run_nvcc(*compile_options("80"), "-c", source, "-o", tmp_path / "policy.o")


@pytest.fixture(params=["80", "90a"])
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def sass(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    source = CUDA / "dcnv3" / "sm80" / "launch.cu"
    return instructions(source, architecture, tmp_path_factory.getbasetemp())


STEMS = {
    "dcnv3_kernel": 8,
    "dcnv3_nine_kernel": 6,
    "dcnv3_bwd_kernel": 16,
    "dcnv3_bwd_window_kernel": 3,
}

# Forward and backward with vectors of 16 bytes, by their mangled names' types.
VECTORS = {"f": "Li4", "NS_8BFloat16E": "Li8", "NS_7Float16E": "Li8", "d": "Li2"}


def kernels_of(sass: dict[str, list[str]], stem: str) -> dict[str, list[str]]:
    return {name: code for name, code in sass.items() if re.search(rf"\d{stem}I", name)}


def has_wide_vectors(name: str) -> bool:
    return "nine" in name or any(
        re.search(rf"_kernelI{re.escape(t + v)}E", name) for t, v in VECTORS.items()
    )


def test_corners_are_loaded_by_16_bytes(sass: dict[str, list[str]]) -> None:
    """Of a point with all corners inside, and of one with some."""
    for stem, count in STEMS.items():
        kernels = kernels_of(sass, stem)
        assert len(kernels) == count
        for name, code in kernels.items():
            wide = sum(op.startswith("LDG.E.128") for op in code)
            assert wide >= 8 if has_wide_vectors(name) else wide == 0, f"{name}: {wide}"


def test_points_are_passed_on_by_16_bytes(sass: dict[str, list[str]]) -> None:
    for name, code in kernels_of(sass, "dcnv3_(nine_)?kernel").items():
        assert any(op.startswith("LDS.128") for op in code), name


def test_gradients_by_x_are_added_without_waiting(
    sass: dict[str, list[str]], architecture: str
) -> None:
    """RED, which returns nothing; four floats at once on compute capability 9.0."""
    for stem in ("dcnv3_bwd_kernel", "dcnv3_bwd_window_kernel"):
        for name, code in kernels_of(sass, stem).items():
            reds = [op for op in code if op.startswith("RED")]
            assert bool(reds) == ("Lb0E" not in name), name
            assert not any(op.startswith("ATOM") for op in code), name
            if has_wide_vectors(name) and "Id" not in name and architecture == "90a":
                wide = [op for op in reds if "F32x4" in op]
                # A window's row by four floats; a point outside of it by one a lane.
                assert wide if "window" in stem else wide == reds, f"{name}: {set(reds)}"


def test_nothing_goes_through_local_memory(sass: dict[str, list[str]]) -> None:
    for name, code in sass.items():
        assert not any(op.startswith(("STL", "LDL")) for op in code), name
