"""M3I in FP8 learns as in bf16: its curves lie among those of other seeds; a wrong scale's do not.

`--fp8-seeds 3` trains three seeds in FP8 instead of one; with `--log-cli-level INFO` each says
how far its curves are from the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torchao.float8 import float8_linear
from torchao.float8.float8_training_tensor import GemmInputRole

from m3i_fast.config import Precision
from m3i_fast.engine.trainer import Trainer
from m3i_fast.models.float8 import PRODUCTS
from m3i_fast.observe.metrics import read_jsonl
from tests.engine.fp8_runs import tiny

logger = logging.getLogger(__name__)
pytestmark = pytest.mark.slow

BF16_SEEDS = range(4)
WARMUP = 2  # rows of the metrics that are the start's
MOST = 3.0  # standard deviations of the bf16 seeds

# Gradients' norms too: optimisers divide by the size of a gradient, which hides it from the loss.
Curves = NDArray[Any]  # [2, T]: loss, log of the gradient's norm


@pytest.fixture(scope="module")
def train(
    dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Precision, int], Curves]:
    """Curves of 200 steps, by precision and seed."""

    def run(precision: Precision, seed: int) -> Curves:
        out = tmp_path_factory.mktemp("runs") / "run"
        Trainer(tiny(dataset, precision=precision, seed=seed), out).train()
        rows = read_jsonl(out / "metrics.jsonl")
        loss = [row["loss/total"] for row in rows]
        norm = [np.log(row["optim/grad_norm"]) for row in rows]
        return np.array([loss, norm])[:, WARMUP:]

    return run


@pytest.fixture(scope="module")
def bf16(train: Callable[[Precision, int], Curves]) -> Curves:  # [seeds, 2, T]
    return np.stack([train("bf16", seed) for seed in BF16_SEEDS])


def distance(curves: Curves, among: Curves) -> float:
    """From the mean of `among` [S, 2, T], where it is largest, in their standard deviations.

    One deviation a curve: that of single rows is of four numbers each.
    """
    deviation = np.sqrt(among.var(0, ddof=1).mean(-1, keepdims=True))
    return float(np.abs((curves - among.mean(0)) / deviation).max())


def test_fp8_learns_as_bf16(
    train: Callable[[Precision, int], Curves],
    bf16: Curves,
    pytestconfig: pytest.Config,
) -> None:
    for seed in range(pytestconfig.getoption("--fp8-seeds")):
        before = PRODUCTS.backward
        found = distance(train("fp8_current", seed), bf16)
        assert PRODUCTS.backward > before
        logger.info("seed %d: %.2f standard deviations, %g allowed", seed, found, MOST)
        assert found < MOST


@pytest.mark.parametrize("role", ["INPUT", "WEIGHT", "GRAD_OUTPUT"])
def test_a_scale_wrong_by_a_factor_of_two_is_found(
    role: str,
    train: Callable[[Precision, int], Curves],
    bf16: Curves,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one operand: its values are read as half of what they are."""
    cast = float8_linear.hp_tensor_to_float8_dynamic

    def wrong(*arguments: Any, **options: Any) -> Any:
        tensor = cast(*arguments, **options)
        if options["gemm_input_role"] is GemmInputRole[role]:
            tensor._scale = 2 * tensor._scale
        return tensor

    monkeypatch.setattr(float8_linear, "hp_tensor_to_float8_dynamic", wrong)
    found = distance(train("fp8_current", 0), bf16)
    logger.info("%s: %.2f standard deviations, %g allowed", role, found, MOST)
    assert found > MOST
