"""What a budget of tokens is predicted to take, against real steps on drawn views of any shape."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

from m3i_fast.benchmarks.core.random_batch import draw_any_batch
from m3i_fast.cli import main
from m3i_fast.config import TrainConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.costs.packed_pictures import PackedPictures, expected_pictures, most_samples
from m3i_fast.costs.step_flops import step_flops, without_sampling
from m3i_fast.pipelines.any_shape.batch import PackedBatch
from m3i_fast.pipelines.sample_order.token_budget import TokenBudget, ViewSides
from m3i_fast.planning.step_memory import HELD, trace
from m3i_fast.recipes import recipes
from tests.shared.allocated import most_allocated
from tests.shared.engine.packed_run import PATCH, packed_run
from tests.shared.engine.real_step import stepper
from tests.shared.flop_formulas import FORMULAS
from tests.shared.groups import at_gate

NOWHERE = Path("nowhere")


def of(batch: PackedBatch) -> PackedPictures:
    lengths = tuple(Counter(batch.lengths(view)) for view in range(len(batch.patches)))
    return PackedPictures(num_steps=1, num_samples=batch.batch_size, lengths=lengths)


@pytest.mark.parametrize("name", at_gate(("clip",), ["clip", "dino", "moco_v3", "supervised"]))
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_operations_are_those_of_the_batchs_own_patches(name: str, recompute: str) -> None:
    cfg = packed_run(NOWHERE, name)
    cfg = replace(cfg, vision=replace(cfg.vision, activation_checkpointing=recompute))
    batch = draw_any_batch(cfg)
    assert isinstance(batch, PackedBatch) and len(set(batch.lengths(0))) > 2
    found = without_sampling(step_flops(cfg, pictures=of(batch)))
    step = stepper(cfg)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        step()
    assert found.hardware == pytest.approx(counter.get_total_flops(), rel=0.001)


# Masked cells of the own view are counted as they are; other views, and the parts of an input, as
# if all views of a sample had as many cells; the rows that Gram anchoring pads are not counted.
CELLS = [("mae", 1e-3), ("data2vec", 1e-3), ("ibot", 1e-3), ("autoencoder", 1e-3)]
ALIKE = [("siameseim", 0.03), ("m3i", 0.04), ("mixmim", 0.03), ("dinov3", 0.03)]


@pytest.mark.parametrize("name, within", at_gate(CELLS[:1], [*CELLS, *ALIKE]))
def test_operations_of_cells_are_those_of_the_batchs_own(name: str, within: float) -> None:
    cfg = packed_run(NOWHERE, name)
    batch = draw_any_batch(cfg)
    assert isinstance(batch, PackedBatch)
    found = without_sampling(step_flops(cfg, pictures=of(batch)))
    step = stepper(cfg)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        step()
    assert found.hardware == pytest.approx(counter.get_total_flops(), rel=within)


def test_expected_batches_are_those_that_are_drawn() -> None:
    cfg = packed_run(NOWHERE, "dino")
    assert cfg.data.local_views is not None
    sides = [(2, 6)] * cfg.data.global_views.count + [(1, 3)] * cfg.data.local_views.count
    budget = TokenBudget(
        tokens=cfg.data.max_tokens_per_batch,
        views=tuple(ViewSides(*pair) for pair in sides),
        seed=0,
        num_ranks=500,
    )
    ends = budget.ends(0)
    expected = expected_pictures(cfg.data, PATCH)
    assert expected.tokens_a_step == cfg.data.max_tokens_per_batch
    mean = float(np.diff(ends).mean())
    tokens = float(budget.most_tokens(np.arange(ends[-1])).sum()) / 500
    # A batch leaves room that the next sample does not fit into: half of one on average.
    room = 1 - tokens / cfg.data.max_tokens_per_batch
    assert room < 0.1
    assert mean == pytest.approx(expected.samples_a_step * (1 - room), rel=0.02)
    assert np.diff(ends).max() <= most_samples(cfg.data, PATCH) == budget.most_samples


def largest(name: str) -> TrainConfig:
    """A run in which every batch is of the smallest views alone, on a model that is no toy."""
    cfg = packed_run(NOWHERE, name)
    assert isinstance(cfg.vision, ViTConfig)
    side = 4 * PATCH
    shown = replace(cfg.data.global_views, size=side, size_range=(side, side), ratio=(1.0, 1.0))
    local = cfg.data.local_views
    if local is not None:
        local = replace(local, size_range=(16, 16), ratio=(1.0, 1.0))
    data = replace(cfg.data, global_views=shown, local_views=local, max_tokens_per_batch=2400)
    return replace(cfg, data=data, vision=replace(cfg.vision, dim=192, depth=4, num_heads=3))


@pytest.mark.parametrize("name", at_gate(("m3i",), ["clip", "dino", "ibot", "m3i"]))
def test_the_largest_batch_has_the_peak_that_is_told(name: str) -> None:
    """But for what kernels allocate for themselves, and the order of packed tokens."""
    cfg = largest(name)
    footprint = trace(cfg, bf16=False, cuda=False)
    step = stepper(cfg)
    step()
    beside = sum(footprint.held.values())
    measured = most_allocated(step) + beside
    assert sum(footprint.peak.values()) == pytest.approx(measured, rel=0.1)
    smaller = replace(cfg.data, max_tokens_per_batch=1200)
    half = trace(replace(cfg, data=smaller), bf16=False, cuda=False)
    own, of_half = (sum(of.activations.values()) for of in (footprint, half))
    assert own == pytest.approx(2 * of_half, rel=0.05)
    assert set(footprint.held) == set(HELD)


def test_the_plan_of_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    name = "any_shape_vit_b"
    size = ["--data.max-tokens-per-batch", "8192"]
    assert main(["plan", name, "--gpus", "2", "--card", "h100", "--json", *size]) == 0
    found = json.loads(capsys.readouterr().out)
    cfg = recipes()[name]()
    # 8 to 16 patches a side, two views of each picture
    mean = 2 * sum(side**2 for side in range(8, 17)) / 9
    assert found["batch_size"] == round(8192 / mean) and found["max_tokens"] == 8192
    assert found["most_samples"] == 8192 // (2 * 64)
    assert found["tokens"]["encoder"] == 8192 and found["tokens"]["target encoder"] == 8192
    assert found["legal"] == [] and cfg.data.any_shape
    assert any("largest batch" in sentence for sentence in found["assumptions"])
    assert main(["plan", name, "--card", "cpu", *size]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "8,192 tokens a rank: 27 images on average" in shown and "at most 64" in shown
    assert main(["plan", name, "--global-batch", "8"]) == 2
    assert "--global-batch: expected none" in capsys.readouterr().err
