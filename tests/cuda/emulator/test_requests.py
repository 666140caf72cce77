"""Requests of memory of small kernels, counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cuda.emulator.test_emulator import empty, run, zeros
from tests.shared.cuda import emulator
from tests.shared.cuda.requests import LineRequests, counted_requests, read_requests

Counts = dict[tuple[str, str], tuple[int, int, int]]


def counted(file: Path, launcher: str, *arguments: Tensor | int) -> list[LineRequests]:
    with counted_requests(file):
        run("requests", launcher, *arguments)
    return read_requests(file)


def by_kind(rows: list[LineRequests]) -> Counts:
    """(requests, lanes, sectors or wavefronts) by (memory, access), where each is of one line."""
    return {(row.memory, row.access): (row.requests, row.lanes, row.units) for row in rows}


def ramp(count: int) -> Tensor:
    return emulator.guarded(torch.arange(count, dtype=torch.float32))


@pytest.mark.parametrize(
    ("stride", "offset", "sectors"),
    [
        (1, 0, 4),  # 32 floats are 128 bytes
        (1, 1, 5),  # which begin and end within a sector
        (2, 0, 8),
        (8, 0, 32),  # each float in a sector of its own
        (9, 0, 32),
        (0, 3, 1),  # all lanes the same one
    ],
)
def test_sectors_of_a_strided_copy(tmp_path: Path, stride: int, offset: int, sectors: int) -> None:
    to = empty(128)
    rows = counted(tmp_path / "a", "copy", ramp(128 * 9 + 8), to, 2, stride, offset)
    assert torch.equal(to, torch.arange(128.0) * stride + offset)
    assert by_kind(rows) == {
        ("global", "read"): (4, 128, 4 * sectors),  # four warps
        ("global", "write"): (4, 128, 16),
    }
    assert {row.source for row in rows} == {"to[i] = from[i * stride + offset];"}
    assert {row.kernel for row in rows} == {"copy_kernel"}


def test_sectors_of_vectors(tmp_path: Path) -> None:
    rows = counted(tmp_path / "a", "copy_vectors", ramp(128), empty(128))
    assert by_kind(rows) == {("global", "read"): (1, 32, 16), ("global", "write"): (1, 32, 16)}


@pytest.mark.parametrize(("pitch", "of_a_column"), [(32, 32), (33, 1)])
def test_wavefronts_of_a_transpose(tmp_path: Path, pitch: int, of_a_column: int) -> None:
    values, to = ramp(1024), empty(32, 32)
    rows = counted(tmp_path / "a", "transpose", values, to, pitch)
    assert torch.equal(to, values.view(32, 32).t())
    assert by_kind(rows) == {
        ("global", "read"): (32, 1024, 128),
        ("shared", "write"): (32, 1024, 32),
        ("shared", "read"): (32, 1024, 32 * of_a_column),
        ("global", "write"): (32, 1024, 128),
        ("barrier", "barrier"): (0, 32, 32),
    }


@pytest.mark.parametrize(("words", "turns"), [(32, 1), (8, 4), (1, 32)])
def test_wavefronts_of_vectors_and_of_atomic_operations(
    tmp_path: Path, words: int, turns: int
) -> None:
    values, to = ramp(128), empty(128)
    rows = counted(tmp_path / "a", "through_shared", values, to, words)
    assert torch.equal(to.view(32, 4), values.view(32, 4).flip(0))
    found = {(row.source, row.access): row.units for row in rows if row.memory == "shared"}
    assert found == {
        ("counts[lane] = 0;", "write"): 1,
        ("tile[lane] = from[lane];", "write"): 4,
        ("atomicAdd(counts + lane % words, 1);", "atomic"): turns,
        ("to[lane] = tile[31 - lane];", "read"): 4,
    }


@pytest.mark.parametrize("atomics", [1, 2])
def test_lanes_that_part_and_meet_again(tmp_path: Path, atomics: int) -> None:
    """24, 16 and 8 lanes read, of every sector some; then all of them update one float."""
    rows = counted(tmp_path / "a", "diverging", ramp(128), zeros(1), atomics)
    assert by_kind(rows) == {
        ("global", "read"): (3, 48, 12),
        ("global", "atomic"): (atomics, 32 * atomics, atomics),
    }


def test_launches_add_up_and_nothing_is_counted_outside(tmp_path: Path) -> None:
    file, values, to = tmp_path / "a", ramp(128), empty(128)
    once = counted(file, "copy", values, to, 2, 1, 0)
    run("requests", "copy", values, to, 2, 1, 0)
    assert read_requests(file) == once
    twice = counted(file, "copy", values, to, 2, 1, 0)
    assert [row.units for row in twice] == [2 * row.units for row in once]
