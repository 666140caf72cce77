"""The op's tests run twice: on its CPU kernel, and on its CUDA kernel under the emulator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shared.cuda import emulator


def _op_of(test: Path) -> str:
    """The op of tests/ops/<op>/test_<what of it>.py."""
    name = test.parent.name
    assert (emulator.CUDA / name).is_dir(), f"{test}: expected a folder named as one of cuda/"
    return name


@pytest.fixture(params=["cpu", pytest.param("cuda, emulated", marks=pytest.mark.cuda)])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Whose kernel m3i's op runs on CPU tensors."""
    if request.param == "cpu":
        yield request.param
        return
    with emulator.emulated(_op_of(request.path)):
        yield request.param
