"""The op's tests run twice: on its CPU kernel, and on its CUDA kernel under the emulator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shared.cuda import emulator


def _op_of(test: Path) -> str:
    """The op of test_<op>.py or test_<op>_<what of it>.py."""
    name = test.stem.removeprefix("test_")
    while not (emulator.CUDA / name).is_dir():
        name, _, rest = name.rpartition("_")
        assert rest, f"{test}: expected a test of an op in {emulator.CUDA}"
    return name


@pytest.fixture(params=["cpu", "cuda, emulated"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Whose kernel m3i's op runs on CPU tensors."""
    if request.param == "cpu":
        yield request.param
        return
    with emulator.emulated(_op_of(request.path)):
        yield request.param
