"""FLOPs of a whole training step in closed form, against torch's counter around the real step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from m3i_fast.config import TrainConfig
from m3i_fast.config.data import ViewConfig
from m3i_fast.config.fields import Recompute
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vision import VisionConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.config.objective.heads import DecoderConfig
from m3i_fast.costs.encoder_flops import vit
from m3i_fast.costs.objective_flops import (
    DECODER,
    ENCODER,
    HEADS,
    LIKELIHOODS,
    SAMPLING,
    TARGET,
    decoder,
)
from m3i_fast.costs.step_flops import step_flops, without_sampling
from m3i_fast.engine.teacher import Teacher
from m3i_fast.models.image_encoder import build_encoder
from m3i_fast.objectives.heads import DenseDecoder
from m3i_fast.objectives.methods import cell_prototypes
from m3i_fast.recipes import recipes, shrink
from tests.shared import annotated
from tests.shared.engine.real_step import stepper
from tests.shared.flop_formulas import FORMULAS
from tests.shared.groups import at_gate

TEXT = TextConfig(vocab_size=90, context_length=24, dim=32, depth=2, num_heads=2, embed_dim=32)
# At their full size, in which the closed form is used, test_step_flops_full.py has them.
FAMILIES = ["m3i_vit_b", "m3i_vit_h", "m3i_internimage_t", "m3i_internimage_h", "m3i_internimage_g"]
FAMILIES += ["dinov2_s", "dinov3_s"]
GATE = ("m3i_vit_b", "m3i_internimage_t", "demo", "demo_dino", "demo_coca", "demo_mae")
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


def frozen(cfg: TrainConfig) -> TrainConfig:
    optim = replace(cfg.optim, freeze_encoder=True)
    return replace(cfg, optim=optim, vision=replace(cfg.vision, drop_path_rate=0.0))


def counted(cfg: TrainConfig) -> int:
    step = stepper(cfg)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        step()
    return counter.get_total_flops()


def expect_counted(cfg: TrainConfig, rel: float = 0.001) -> None:
    found = without_sampling(step_flops(cfg))  # which the counter does not see
    assert found.hardware == pytest.approx(counted(cfg), rel=rel)


@pytest.mark.parametrize("name", at_gate(GATE, [*FAMILIES, *METHODS]))
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


@pytest.mark.parametrize(
    ("view", "regulariser"),
    [("same", "centring"), ("other", "sinkhorn"), ("other", "mean_entropy")],
)
def test_a_step_with_prototypes_of_cells_by_the_decoder(view: str, regulariser: str) -> None:
    cfg = small("demo")
    cells = cell_prototypes(
        name="cells", predictor="decoder", asked="last", view=view, regulariser=regulariser
    )
    terms = (*cfg.objective.terms, cells)
    expect_counted(replace(cfg, objective=replace(cfg.objective, terms=terms)))


@pytest.mark.parametrize("chunk", [0, 100])
def test_a_step_with_a_projector_before_the_decoder(chunk: int) -> None:
    cfg = small("m3i_vit_s")
    decoder = DecoderConfig(dim=64, depth=1, num_heads=2, projector="mlp")
    local = ViewConfig(count=2, size=32)
    expect_counted(
        replace(
            cfg,
            data=replace(cfg.data, local_views=local),
            objective=replace(cfg.objective, decoder=decoder),
            parallel=replace(cfg.parallel, chunk=chunk),
        )
    )


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_step_with_swiglu(recompute: Recompute) -> None:
    cfg = small("dinov3_s")
    assert isinstance(cfg.vision, ViTConfig)
    vision = replace(cfg.vision, mlp="swiglu", mlp_ratio=2.5, activation_checkpointing=recompute)
    expect_counted(replace(cfg, vision=vision))


def test_a_step_with_linear_heads_and_causal_captions() -> None:
    cfg = small("m3i_vit_b")
    objective = replace(cfg.objective, head_hidden_dim=0)
    expect_counted(replace(cfg, objective=objective, text=replace(cfg.text, attention="causal")))


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


@pytest.mark.parametrize(
    "name", at_gate(GATE, ["m3i_vit_b", "m3i_vit_h", "m3i_internimage_t", "demo"])
)
@pytest.mark.parametrize("chunk", [3, 4, 100])
def test_a_step_by_chunks(name: str, chunk: int) -> None:
    """A second pass ends before its last product, whose result nobody saved: less than 1 %."""
    cfg = small(name)
    expect_counted(replace(cfg, parallel=replace(cfg.parallel, chunk=chunk)), rel=0.01)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_step_with_columns_and_captions_that_are_written(recompute: Recompute) -> None:
    cfg = small("m3i_vit_s")
    objective = replace(annotated.objective(mode="own_image", parallel=0.5), head_hidden_dim=16)
    captioner = replace(objective.captioner, activation_checkpointing=recompute)
    cfg = replace(
        cfg,
        columns=tuple(
            replace(c, size=TEXT.context_length) if c.kind == "text" else c
            for c in annotated.COLUMNS
        ),
        objective=replace(objective, captioner=captioner),
        data=replace(cfg.data, local_views=ViewConfig(count=2, size=32)),
    )
    expect_counted(cfg)
    expect_saved(cfg)
    chunked = replace(cfg, parallel=replace(cfg.parallel, chunk=3))
    expect_counted(chunked, rel=0.01)


def expect_saved(cfg: TrainConfig) -> None:
    """Hold exactly: what the closed forms leave out for a frozen encoder, torch leaves out, too."""
    cfg = replace(cfg, vision=replace(cfg.vision, drop_path_rate=0.0))
    still = frozen(cfg)
    found, expected = (without_sampling(step_flops(c)).hardware for c in (cfg, still))
    assert found - expected == counted(cfg) - counted(still) > 0
    before, parts = step_flops(cfg), step_flops(still)
    for part in {ENCODER, SAMPLING} & parts.keys():
        assert parts[part].hardware == parts[part].forward == before[part].forward


@pytest.mark.parametrize("name", at_gate(GATE, ["m3i_vit_h", "m3i_internimage_h", *METHODS]))
def test_a_step_with_a_frozen_encoder(name: str) -> None:
    cfg = small(name)
    expect_counted(frozen(cfg))
    expect_saved(cfg)


@pytest.mark.parametrize("projector", ["none", "mlp"])
def test_a_step_with_local_views_of_a_frozen_encoder(projector: Literal["none", "mlp"]) -> None:
    cfg = small("m3i_vit_s")
    decoder = DecoderConfig(dim=64, depth=1, num_heads=2, projector=projector)
    expect_saved(
        replace(
            cfg,
            data=replace(cfg.data, local_views=ViewConfig(count=2, size=32)),
            objective=replace(cfg.objective, decoder=decoder, head_hidden_dim=0),
        )
    )


@pytest.mark.parametrize("name", at_gate(GATE, ["m3i_vit_h", "m3i_internimage_t", "demo"]))
def test_a_step_by_chunks_with_a_frozen_encoder(name: str) -> None:
    cfg = frozen(small(name))
    expect_counted(replace(cfg, parallel=replace(cfg.parallel, chunk=3)), rel=0.01)


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
    whole = vit(cfg.vision, inputs).forward
    attended = 4 * inputs * cfg.vision.depth * 196**2 * cfg.vision.dim
    assert parts[ENCODER].forward == whole
    # Each alone, both halves of an input have its tokens, and attention over half is a quarter.
    mixing = replace(cfg.objective.mixing, mode="own_image")
    alone = replace(cfg, objective=replace(cfg.objective, mixing=mixing))
    assert step_flops(alone)[ENCODER].forward == whole - attended // 2
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


@pytest.mark.parametrize("teacher", [None, "timm:deit_tiny_patch16_224"])
def test_a_frozen_teacher_of_unknown_size_is_refused(teacher: str | None) -> None:
    cfg = recipes()["demo_milan"]()
    cfg = replace(cfg, objective=replace(cfg.objective, teacher=teacher))
    with pytest.raises(ValueError, match=r"objective\.terms: .*frozen"):
        step_flops(cfg)


FROZEN = [n for n, make in recipes().items() if make().objective.uses(encoder="frozen")]


def taught(name: str, make: Callable[[str], TrainConfig], run: Path) -> TrainConfig:
    """With a teacher of another width, whose run has a config and no weights."""
    cfg, teacher = make(name), make("demo_supervised")
    vision = replace(teacher.vision, dim=2 * teacher.vision.dim, num_heads=2)  # type: ignore
    replace(teacher, vision=vision).save(run / "config.json")
    return replace(cfg, objective=replace(cfg.objective, teacher=str(run)))


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder of a run as it is at its start."""

    def load(spec: str, vision: VisionConfig) -> Teacher:
        return Teacher(build_encoder(TrainConfig.load(Path(spec) / "config.json").vision))

    monkeypatch.setattr("m3i_fast.engine.build.load_teacher", load)


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("name", FROZEN)
def test_a_recipe_with_a_frozen_teacher(name: str, tmp_path: Path) -> None:
    cfg = taught(name, small, tmp_path)
    expect_counted(cfg)
    assert step_flops(cfg)[TARGET].backward == 0


@pytest.mark.usefixtures("untrained")
def test_phi_s_costs_less_once_it_has_its_statistics(tmp_path: Path) -> None:
    cfg = taught("demo_radio", small, tmp_path)
    begun, later = step_flops(cfg)[HEADS], step_flops(cfg, progress=1.0)[HEADS]
    cells = cfg.data.batch_size * cfg.vision.grid**2
    width = TrainConfig.load(tmp_path / "config.json").vision.dim
    assert cfg.num_steps < cfg.objective.phi_s_steps and begun == later  # so short a run takes all
    cfg = replace(cfg, objective=replace(cfg.objective, phi_s_steps=cfg.num_steps // 2))
    later = step_flops(cfg, progress=1.0)[HEADS]
    assert begun.forward - later.forward == 2 * cells * width**2


@pytest.mark.usefixtures("untrained")
def test_several_frozen_teachers(tmp_path: Path) -> None:
    for name in ("wide", "own"):
        (tmp_path / name).mkdir()
    cfg = taught("demo_milan", small, tmp_path / "wide")
    small("demo_supervised").save(tmp_path / "own" / "config.json")
    (term,) = cfg.objective.terms
    second = replace(term, name="second", teacher=str(tmp_path / "own"))
    both = replace(cfg, objective=replace(cfg.objective, terms=(term, second)))
    expect_counted(both)
    one = step_flops(cfg)[TARGET].forward
    assert one < step_flops(both)[TARGET].forward < 2 * one


def test_a_frozen_internimage_pools_its_tokens(untrained: None, tmp_path: Path) -> None:
    cfg, teacher = small("demo_global_distillation"), small("demo_internimage")
    teacher.save(tmp_path / "config.json")
    size = teacher.vision.image_size
    assert isinstance(cfg.vision, ViTConfig)
    cfg = replace(
        cfg,
        vision=replace(cfg.vision, image_size=size, patch_size=16),
        data=replace(cfg.data, global_views=replace(cfg.data.global_views, size=size)),
    )
    expect_counted(replace(cfg, objective=replace(cfg.objective, teacher=str(tmp_path))))
