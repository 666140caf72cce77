"""The model against times that others published: within 30 %, and what constants do to that."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3i_fast.benchmarks.roofline.published import (
    WITHIN,
    Published,
    all_published,
    sensitivity,
    siglip_kernel,
)

REQUIRED = [case for case in all_published() if case.is_required]


def test_three_times_are_required() -> None:
    assert {(case.name.partition(",")[0], case.card, case.ms) for case in REQUIRED} == {
        ("siglip-kernel", "gh200", 46.9),
        ("DCNv4 forward", "a100", 0.404),
        ("DCNv3 forward", "a100", 1.52),
    }


@pytest.mark.parametrize("case", REQUIRED, ids=lambda case: case.name)
def test_what_is_required_is_within_30_percent(case: Published) -> None:
    assert abs(case.ratio - 1) <= WITHIN, f"{case.predicted().ms:.3g} ms for {case.ms}"


def test_the_worst_prediction_comes_first() -> None:
    off = [max(case.ratio, 1 / case.ratio) for case in all_published()]
    assert off == sorted(off, reverse=True)


def test_three_products_and_a_pass_are_the_published_operations() -> None:
    """6 N^2 D in bf16, and two bytes read and two written of each logit."""
    phases = siglip_kernel(65536, 768)
    assert sum(phase.tensor_flop * phase.times for phase in phases) == 6 * 65536**2 * 768
    (loss,) = (phase for phase in phases if phase.name == "loss")
    assert loss.memory_bytes * loss.times == 4 * 65536**2


@pytest.mark.parametrize("case", REQUIRED, ids=lambda case: case.name)
def test_the_other_published_constants_stay_within_a_factor_of_one_and_a_half(
    case: Published,
) -> None:
    ratios = sensitivity(case)
    assert ratios and all(1 / 1.5 <= ratio <= 1.5 for ratio in ratios.values()), ratios


def test_the_page_has_what_the_command_prints() -> None:
    """Of each published time its ratio, in docs/measure/roofline.md."""
    root = Path(__file__).resolve().parents[3]
    lines = (root / "docs" / "measure" / "roofline.md").read_text().splitlines()
    for case in all_published():
        (line,) = [line for line in lines if case.name in line]
        assert f" {case.ratio:.2f} " in line, "m3i-fast bench roofline --show published"
