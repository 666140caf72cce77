"""The op's tests run twice: on its CPU kernel, and on its CUDA kernel under the emulator."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cuda import emulator


@pytest.fixture(params=["cpu", "cuda, emulated"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Whose kernel m3i's op runs on CPU tensors; the op is the <op> of the file test_<op>.py."""
    if request.param == "cpu":
        yield request.param
        return
    with emulator.emulated(request.path.stem.removeprefix("test_")):
        yield request.param
