"""FLOPs of a whole training step in closed form, against torch's counter around the real step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from m3i_fast.config import TrainConfig
from m3i_fast.engine.flops import step_flops, without_sampling
from m3i_fast.models.flops import vit
from m3i_fast.models.recompute import Recompute
from m3i_fast.models.text import TextConfig
from m3i_fast.models.vit import ViTConfig
from m3i_fast.objectives.flops import DECODER, ENCODER, LIKELIHOODS, TARGET, decoder
from m3i_fast.objectives.predictors import DecoderConfig, DenseDecoder
from m3i_fast.pipelines.config import ViewConfig
from m3i_fast.recipes import recipes, shrink
from tests.engine.real_step import stepper
from tests.flop_formulas import FORMULAS

TEXT = TextConfig(vocab_size=90, context_length=24, dim=32, depth=2, num_heads=2, embed_dim=32)
FAMILIES = ["m3i_vit_b", "m3i_vit_h", "m3i_internimage_t", "m3i_internimage_h", "m3i_internimage_g"]
METHODS = [
    name
    for name, make in recipes().items()
    if name.startswith("demo") and not make().objective.uses(encoder="frozen")
]


def small(name: str, batch_size: int = 8) -> TrainConfig:
    cfg = shrink(recipes()[name](), path=Path("nowhere"), num_classes=9, text=TEXT)
    return replace(
        cfg,
        data=replace(cfg.data, batch_size=batch_size),
        optim=replace(cfg.optim, matrices="adamw"),  # Muon's products are the optimiser's
    )


def expect_counted(cfg: TrainConfig) -> None:
    step = stepper(cfg)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        step()
    found = without_sampling(step_flops(cfg))  # which the counter does not see
    assert found.hardware == pytest.approx(counter.get_total_flops(), rel=0.001)


@pytest.mark.parametrize("name", [*FAMILIES, *METHODS])
def test_a_recipe_step(name: str) -> None:
    expect_counted(small(name))


@pytest.mark.parametrize("name", ["m3i_vit_s", "m3i_internimage_l"])
def test_a_step_with_local_views(name: str) -> None:
    cfg = small(name)
    local = ViewConfig(count=3, size=32)
    expect_counted(replace(cfg, data=replace(cfg.data, local_views=local)))


def test_a_step_that_asks_a_part_of_the_cells_of_a_part_of_the_inputs() -> None:
    cfg = small("m3i_vit_b", batch_size=24)
    mixing = replace(cfg.objective.mixing, num_images=3, num_queries=2, dense_fraction=0.25)
    objective = replace(
        cfg.objective, mixing=mixing, decoder=DecoderConfig(dim=32, depth=3, num_heads=2)
    )
    expect_counted(replace(cfg, objective=objective))


@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize("scale", [None, 1e-5])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_a_step_that_computes_blocks_again(
    rate: float, scale: float | None, recompute: Recompute
) -> None:
    cfg = small("m3i_vit_b")
    assert isinstance(cfg.vision, ViTConfig)
    vision = replace(
        cfg.vision,
        activation_checkpointing=recompute,
        layer_scale_init=scale,
        drop_path_rate=rate,
        drop_path_mode="subset" if scale else "mask",
        class_token=True,
    )
    text = replace(cfg.text, activation_checkpointing=recompute)
    expect_counted(replace(cfg, vision=vision, text=text))


def test_the_decoder_forward() -> None:
    cfg = DecoderConfig()
    with torch.device("meta"):
        module = DenseDecoder(cfg, input_dim=768, output_dim=588, input_grid=14)
        tokens, index = torch.empty(3, 98, 768), torch.empty(3, 98, dtype=torch.int64)
        position = torch.empty(3, 40, 4)
    with FlopCounterMode(display=False) as counter:
        module(tokens, index, position)
    found = decoder(cfg, num_images=3, num_own=98, num_asked=40, dims=(768, 588))
    assert found.forward == counter.get_total_flops()


def test_parts_of_a_production_step() -> None:
    """What M3I asks of ViT-B, by hand: one pass of mixed inputs, two target views of half of it."""
    cfg = recipes()["m3i_vit_b"]()
    parts, inputs = step_flops(cfg), cfg.data.batch_size // 2
    assert isinstance(cfg.vision, ViTConfig)
    # Both halves of an input together have its tokens, and attention over half is a quarter.
    whole = vit(cfg.vision, inputs).forward
    attended = 4 * inputs * cfg.vision.depth * 196**2 * cfg.vision.dim
    assert parts[ENCODER].forward == whole - attended // 2
    assert parts[TARGET].forward == 2 * whole
    assert parts[TARGET].backward == parts[TARGET].recompute == 0
    assert parts[DECODER].model > 0


def test_candidates_of_all_ranks_cost_each_rank() -> None:
    cfg = recipes()["m3i_vit_b"]()
    one, many = (step_flops(cfg, num_ranks=ranks) for ranks in (1, 64))
    rows = cfg.data.batch_size
    more = 2 * rows * 63 * rows * cfg.text.embed_dim
    assert many[LIKELIHOODS].forward - one[LIKELIHOODS].forward == more
    assert {k: v for k, v in one.items() if k != LIKELIHOODS} == {
        k: v for k, v in many.items() if k != LIKELIHOODS
    }


def test_a_frozen_teacher_is_refused() -> None:
    cfg = recipes()["demo_milan"]()
    with pytest.raises(ValueError, match=r"objective\.terms: .*frozen"):
        step_flops(cfg)
