"""views' CUDA kernel, as far as a compiler can test it."""

from __future__ import annotations

import re
from pathlib import Path

from tests.shared.cuda.nvcc import CUDA, compile_options, instructions, run_nvcc


def test_policy(tmp_path: Path) -> None:
    source = Path(__file__).with_name("policy.cu")
    run_nvcc(*compile_options("80"), "-c", source, "-o", tmp_path / "policy.o")
