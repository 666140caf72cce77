"""Gram anchoring: its formula, the snapshot that it holds to, and what it costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from m3i_fast.benchmarks.core.random_batch import draw_batch
from m3i_fast.config import TextConfig, TrainConfig
from m3i_fast.config.objective.objective import ObjectiveConfig, Term
from m3i_fast.costs.step_flops import step_flops, without_sampling
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.engine.train_step import build_train_step
from m3i_fast.objectives.methods import METHODS
from m3i_fast.ops import IMAGENET_MEAN, IMAGENET_STD
from m3i_fast.recipes import demo_method, shrink
from tests.shared.engine.real_step import FP32, stepper
from tests.shared.flop_formulas import FORMULAS
from tests.shared.small_objective import (
    build_model,
    draw_small_mix,
    loss_of,
    make_batch,
    make_config,
)

GRAM = Term(
    name="gram",
    target="gram",
    encoder="snapshot",
    predictor="none",
    likelihood="gaussian",
    regulariser="stop_gradient",
)
TEXT = TextConfig(vocab_size=90, context_length=24, dim=32, depth=2, num_heads=2, embed_dim=32)


def with_gram(cfg: ObjectiveConfig, **changes: object) -> ObjectiveConfig:
    return replace(cfg, terms=(*cfg.terms, replace(GRAM, **changes)))  # type: ignore[arg-type]


def mean_square_of_grams(own: Tensor, snapshot: Tensor) -> float:
    """DINOv3's equation 3 in fp64, over the number of pairs; images are added one by one."""
    values = []
    for x, y in zip(own.double().numpy(), snapshot.double().numpy(), strict=True):
        x, y = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, y))
        values.append(np.linalg.norm(x @ x.T - y @ y.T) ** 2 / len(x) ** 2)
    return float(np.mean(values))


@pytest.mark.parametrize("mode", ["own_image", "joint", "none", "masked", "mask_token"])
def test_it_is_the_papers_formula_of_the_cells_that_an_image_shows(mode: str) -> None:
    hidden = "mask_token" if mode == "mask_token" else "dropped"
    cfg = make_config("masked" if hidden == "mask_token" else mode, only="caption")
    average = replace(METHODS["dino"].terms[0], symmetric=False, weight=1e-9)
    mixing = replace(cfg.mixing, hidden=hidden)  # type: ignore[arg-type]
    cfg = with_gram(replace(cfg, terms=(*cfg.terms, average), mixing=mixing))
    model, batch = build_model(cfg), make_batch()
    with torch.no_grad():  # a snapshot that is not the encoder
        for parameter in model.snapshot.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    mix = draw_small_mix(cfg, batch)
    own = model.encode_inputs(batch, mix).views[0]
    images = torch.stack([batch.global_views[0][n] for n in mix.sample.tolist()])
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    seen = model.snapshot((images.float() / 255 - mean) / std)
    shown = seen
    if hidden == "dropped":
        cells = zip(seen, mix.token_index, strict=True)
        shown = torch.stack([view[index] for view, index in cells])
    expected = mean_square_of_grams(own.detach(), shown)
    metrics = loss_of(model, batch, mix)[1]
    assert expected > 1e-4
    assert float(metrics["loss/gram"]) == pytest.approx(expected, rel=1e-5)


def test_the_snapshot_gets_no_gradient_and_the_encoder_does() -> None:
    cfg = with_gram(make_config(only="intra"))
    weighted = (replace(t, weight=1.0 if t.name == "gram" else 1e-9) for t in cfg.terms)
    cfg = replace(cfg, terms=tuple(weighted))
    model, batch = build_model(cfg), make_batch()
    with torch.no_grad():
        for parameter in model.snapshot.parameters():
            parameter.mul_(1.5)
            parameter.add_(0.1 * torch.randn_like(parameter))
    loss_of(model, batch, draw_small_mix(cfg, batch))[0].backward()
    assert all(p.grad is None and not p.requires_grad for p in model.snapshot.parameters())
    assert sum(float(p.grad.abs().sum()) for p in model.encoder.parameters()) > 1e-3


def _run(every: int, num_steps: int = 9) -> TrainConfig:
    cfg = shrink(demo_method("data2vec"), path=Path("nowhere"), num_classes=9, text=TEXT)
    objective = replace(with_gram(cfg.objective), snapshot_every=every)
    return replace(cfg, objective=objective, num_steps=num_steps)


def test_the_snapshot_is_the_average_of_every_so_many_steps() -> None:
    cfg = _run(every=3)
    step, batch = build_train_step(cfg, World(torch.device("cpu")), FP32), draw_batch(cfg)
    average, snapshot = (m.encoder.state_dict() for m in step.objective.average_encoders())
    weight = "norm.weight"
    begun = []
    for number in range(7):
        begun.append(average[weight].clone())
        step(batch)
        assert torch.equal(snapshot[weight], begun[number // 3 * 3])
    assert len({tuple(w.tolist()) for w in begun}) == 7


def test_its_flops_are_in_the_steps() -> None:
    cfg = _run(every=3)
    cfg = replace(cfg, optim=replace(cfg.optim, matrices="adamw"))
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counted:
        stepper(cfg)()
    assert without_sampling(step_flops(cfg)).hardware == counted.get_total_flops()


def test_what_it_is_for() -> None:
    with pytest.raises(ValueError, match=r"term 'gram': view: expected same for target gram"):
        replace(GRAM, view="other")
    with pytest.raises(ValueError, match=r"expected momentum or snapshot or frozen for gram"):
        replace(GRAM, encoder="shared")
    alone = replace(make_config(), terms=(replace(GRAM, encoder="momentum"),))
    with pytest.raises(ValueError, match=r"terms: expected a term with encoder momentum beside"):
        replace(alone, terms=(GRAM,))
