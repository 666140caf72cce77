"""The demo's first steps against those of a step that made every call by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from m3i_fast.benchmarks.core.random_batch import draw_batch
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.engine.train_step import build_train_step
from m3i_fast.recipes import recipes
from tests.shared.engine.real_step import FP32

# Loss and gradient norm on a CPU in fp32, of a step with a convolution over patches, a pass of the
# encoder for each size of view, of the decoder for each question and of the heads for each view,
# torch's F.normalize, and a Newton-Schulz iteration for each shape of matrices.
CURVE = [
    (12.212345, 75.35248),
    (10.440332, 44.21273),
    (10.449286, 52.86071),
    (9.071285, 30.58243),
    (8.189618, 21.08899),
    (7.382232, 12.80596),
    (6.984308, 11.30830),
    (6.671332, 4.35873),
]


def test_the_curve_is_that_of_calls_by_themselves() -> None:
    cfg = recipes()["demo"]()
    cfg = replace(
        cfg, device="cpu", precision="fp32", data=replace(cfg.data, batch_size=8), num_steps=50
    )
    step = build_train_step(cfg, World(torch.device("cpu")), FP32)
    batch = draw_batch(cfg)
    for number, (loss, norm) in enumerate(CURVE):
        metrics = step(batch)
        got = float(metrics["loss/total"]), float(metrics["optim/grad_norm"])
        assert got[0] == pytest.approx(loss, rel=2e-5), number
        assert got[1] == pytest.approx(norm, rel=5e-4), number
