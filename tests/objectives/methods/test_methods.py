"""Every method equals its paper, in others' code; `docs/measure/methods.md` says how closely."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from m3i_fast.objectives.methods import METHODS
from tests.objectives.methods.oracles import MOST, ORACLES, Errors, measure, page, read_errors
from tests.objectives.methods.steps import runs_in_fp64

DOCUMENT = Path(__file__).parents[3] / "docs" / "measure" / "methods.md"
FP64 = [name for name in METHODS if runs_in_fp64(name)]
OF_FP64 = 1e-7  # lightly holds DINO's temperature in fp32

measured = cache(measure)


def test_every_method_has_an_oracle() -> None:
    assert list(ORACLES) == list(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_seen_and_minimised_is_the_papers(name: str) -> None:
    """Tokens of views and targets, the value of each term and of the sum, and the gradients."""
    assert max(_all(measured(name))) < MOST


@pytest.mark.parametrize("name", FP64)
def test_in_fp64_no_difference_is_left(name: str) -> None:
    assert max(_all(measure(name, torch.float64))) < OF_FP64


def _all(errors: Errors) -> tuple[float, float, float]:
    return errors.tokens, errors.value, errors.gradient


def test_the_document_is_what_is_measured() -> None:
    document = DOCUMENT.read_text()
    bounds = read_errors(document)
    command = "python -m tests.objectives.methods.oracles > docs/measure/methods.md"
    assert page(bounds) == document, command
    for name, (value, gradient) in bounds.items():
        errors = measured(name)
        assert errors.value <= float(value) <= MOST, name
        assert errors.gradient <= float(gradient) <= MOST, name
