"""The cost model: its columns against sums by hand, its overlap rule, and its constants."""

from __future__ import annotations

from dataclasses import replace

import pytest

from m3i_fast.costs.kernels.constants import CONSTANTS, NAMES, Rates, rates_of
from m3i_fast.costs.kernels.model import (
    COLUMNS,
    Phase,
    gemm,
    predict,
    predict_phase,
    request_wavefronts,
)

# A card on which every unit of work takes a whole second.
ONES = Rates(
    card="ones",
    multiprocessors=4,
    clock_hz=1,
    memory_byte_s=1,
    l2_byte_s=32,
    atomic_sector_s=1,
    wavefront_s=1,
    issue_s=1,
    exponential_s=1,
    tensor_flop_s=1,
    l1_bytes=1,
    launch_s=0,
)

BY_COLUMN = {
    "bytes": {"memory_bytes": 7},
    "sectors": {"read_sectors": 2, "write_sectors": 2, "atomic_sectors": 3},
    "wavefronts": {"wavefronts": 7},
    "issue": {"instructions": 7},
    "tensor": {"tensor_flop": 7},
    "exponentials": {"exponentials": 7},
}


@pytest.mark.parametrize("column", COLUMNS)
def test_each_column_counts_its_own_and_the_slowest_binds(column: str) -> None:
    quick = {name: 1 for each in BY_COLUMN.values() for name in each if name != "read_sectors"}
    made = predict_phase(Phase(name="x", **{**quick, **BY_COLUMN[column]}), ONES)  # type: ignore[arg-type]
    assert made.columns[column] == pytest.approx(7000)
    assert made.binds == column and made.ms == pytest.approx(7000)
    assert all(made.columns[other] < 3000 for other in COLUMNS if other != column)


def test_phases_follow_each_other_and_each_launch_adds_its_start() -> None:
    slow = replace(ONES, launch_s=10)
    phases = (
        Phase(name="a", memory_bytes=3, times=2),
        Phase(name="b", instructions=20, starts=False),
    )
    made = predict(phases, slow)
    assert made.ms == pytest.approx(1e3 * (2 * (3 + 10) + 20))
    assert [phase.binds for phase in made.phases] == ["launch", "issue"]
    assert made.longest.name == "a" and made.binds == "launch"
    assert made.columns["bytes"] == pytest.approx(6000)
    with pytest.raises(ValueError, match="phases: expected one or more"):
        predict((), slow)


def test_multiprocessors_wait_for_the_last_round_and_memory_does_not() -> None:
    """Five blocks on four multiprocessors take two rounds, of two at once one."""
    phase = Phase(name="x", memory_bytes=5, instructions=5, blocks=5)
    columns = predict_phase(phase, ONES).columns
    assert columns["issue"] == pytest.approx(8000) and columns["bytes"] == pytest.approx(5000)
    columns = predict_phase(replace(phase, at_once=2), ONES).columns
    assert columns["issue"] == pytest.approx(8000)
    assert predict_phase(replace(phase, blocks=8), ONES).columns["issue"] == pytest.approx(5000)


def test_a_library_product_has_tiles_of_128_by_256() -> None:
    made = gemm("x", 4096, 768, 65536, bytes_moved=1)
    assert made.blocks == 32 * 3 and made.tensor_flop == 2 * 4096 * 768 * 65536


@pytest.mark.parametrize(
    ("lines", "clocks"), [(32, 9.2), (16, 5.1), (8, 3.1), (4, 2.1), (2, 1.3), (1, 1.0)]
)
def test_requests_of_many_lines_take_what_was_measured(lines: int, clocks: float) -> None:
    """On an A100, by the microbenchmark that the constant comes from."""
    assert request_wavefronts(lines, 128) == pytest.approx(clocks, abs=0.35)


def test_requests_of_many_bytes_take_a_wavefront_for_each_128() -> None:
    assert request_wavefronts(4, 512) == 4 and request_wavefronts(16, 512) > 4


def test_every_constant_names_its_source_and_has_every_card() -> None:
    for name, constant in CONSTANTS.items():
        assert constant.values.keys() == set(NAMES), name
        assert all(value > 0 for value in constant.values.values()), name
        assert len(constant.source) > 20, name
        for values in constant.alternatives:
            assert values.keys() <= set(NAMES) and constant.others, name


def test_rates_are_the_constants_in_seconds() -> None:
    a100 = rates_of("a100")
    assert a100.issue_s == pytest.approx(0.7 * 4 * 108 * 1.41e9)
    assert a100.atomic_sector_s == pytest.approx(80 * 1.41e9)
    assert rates_of("a100", sustained=1).issue_s == pytest.approx(4 * 108 * 1.41e9)
    with pytest.raises(ValueError, match="card: expected one of a100, h100, h200, gh200, got 'x'"):
        rates_of("x")
