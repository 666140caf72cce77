"""A real training step on the CPU, of any config, on noise: what predictions are held against."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import patch

import torch

from m3i_fast.benchmarks.core.random_batch import draw_any_batch
from m3i_fast.config import TrainConfig
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.engine.precision.arithmetic import Arithmetic
from m3i_fast.engine.train_step import build_train_step

FP32 = Arithmetic(recipe="fp32", backend="torch", compute_dtype=torch.float32)
BF16 = Arithmetic(recipe="bf16", backend="torch", compute_dtype=torch.bfloat16)


def stepper(cfg: TrainConfig, *, arithmetic: Arithmetic = FP32) -> Callable[[], None]:
    """Return a function that takes a whole step of the run, without a loader.

    Attention is fused as on a GPU, also where a CPU would be faster with its scores in memory.
    """
    cfg = replace(cfg, compile=False, cuda_graphs="none")
    train_step = build_train_step(cfg, World(torch.device("cpu")), arithmetic)
    batch = draw_any_batch(cfg)

    def step() -> None:
        with patch("m3i_fast.engine.train_step.fast_cpu_products", lambda *_: nullcontext()):
            train_step(batch)

    return step
