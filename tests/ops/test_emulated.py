"""Each op's CUDA kernels on the emulator: the gate's cases, of which `make test-cuda` has more."""

from __future__ import annotations

import pytest

from m3i_fast.op_registry import OPS, OpSpec
from tests.shared.cuda.emulator import CUDA, emulated

WITH_KERNELS = [op for op in OPS if (CUDA / op.name / "op_cuda.cpp").is_file()]


@pytest.mark.parametrize("op", WITH_KERNELS, ids=lambda op: op.name)
def test_results_and_gradients_are_those_of_float64(op: OpSpec) -> None:
    calls = list(op.calls(False))
    # The first call of each op is in bf16, the last one in float32.
    with emulated(op.name):
        for call in (calls[0], calls[-1]):
            assert call.error("cpu") <= 1
