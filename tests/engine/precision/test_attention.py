"""The kernel of attention that a step runs, chosen by vision.attention."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from m3i_fast.benchmarks.core.random_batch import draw_batch
from m3i_fast.config import TrainConfig
from m3i_fast.config.models.vit import AttentionKernel
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.engine.precision.attention import choose_attention
from m3i_fast.engine.train_step import build_train_step
from m3i_fast.engine.trainer import Trainer
from m3i_fast.recipes import demo, recipes
from tests.shared.engine.real_step import BF16, FP32
from tests.shared.engine.small_run import small_run

CPU = torch.device("cpu")


class Attentions(TorchDispatchMode):
    """Count torch's attention operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().partition("::")[2]
        if "attention" in name:
            self.found[name] = self.found.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def with_attention(cfg: TrainConfig, attention: AttentionKernel) -> TrainConfig:
    return replace(cfg, vision=replace(cfg.vision, attention=attention))


def step_of(attention: AttentionKernel) -> tuple[str, dict[str, int], dict[str, float]]:
    """Take a step of the demo; return its kernel, its attention operators and its metrics."""
    cfg = with_attention(demo(), attention)
    cfg = replace(cfg, data=replace(cfg.data, batch_size=4))
    step = build_train_step(cfg, World(CPU), FP32)
    with Attentions() as seen:
        metrics = step(draw_batch(cfg))
    return step.attention.kernel, seen.found, {name: float(v) for name, v in metrics.items()}


def test_a_step_runs_the_kernel_that_was_asked_for() -> None:
    fused, plain = step_of("flash"), step_of("math")
    assert fused[0] == "flash" and plain[0] == "math"
    assert fused[1]["_scaled_dot_product_flash_attention_for_cpu"] > 0
    assert not any("flash" in name for name in plain[1])
    assert fused[2].keys() == plain[2].keys()
    losses = {name: value for name, value in fused[2].items() if name.startswith("loss/")}
    assert losses == pytest.approx({name: plain[2][name] for name in losses}, rel=1e-4)


def test_a_run_records_its_kernel(dataset: Path, tmp_path: Path) -> None:
    cfg = with_attention(small_run(dataset, num_steps=1), "math")
    Trainer(cfg, tmp_path / "run").train()
    assert json.loads((tmp_path / "run" / "env.json").read_text())["attention"] == "math"


@pytest.mark.parametrize("attention", ["cudnn", "fa3", "fa4"])
def test_a_kernel_that_cannot_run_here_is_refused(attention: AttentionKernel) -> None:
    with pytest.raises(
        ValueError, match=rf"^vision\.attention: .*{attention}.*--vision\.attention"
    ):
        choose_attention(with_attention(demo(), attention), BF16, CPU)


def test_transformer_engine_chooses_its_own() -> None:
    of_te = replace(BF16, backend="te")
    assert choose_attention(demo(), of_te, CPU).kernel == "te"
    with pytest.raises(ValueError, match=r"^vision\.attention: expected auto"):
        choose_attention(with_attention(demo(), "flash"), of_te, CPU)


def test_cudnn_is_refused_for_views_of_any_size() -> None:
    cfg = recipes()["any_shape_m3i_vit_b"]()
    with pytest.raises(ValueError, match=r"vision\.attention: .*plan for each new shape"):
        with_attention(cfg, "cudnn")
