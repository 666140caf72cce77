"""Several frozen teachers in one run: each term has the targets of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from m3i_fast.config.objective.objective import ObjectiveConfig, Term
from m3i_fast.engine.teacher import Teacher
from m3i_fast.models.transformer.vit import ViT
from m3i_fast.objectives.methods import METHODS
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.objectives.targets import normalise_views
from tests.shared.small_objective import (
    NUM_CLASSES,
    TEXT,
    VISION,
    draw_small_mix,
    loss_of,
    make_batch,
    make_config,
)

CELLS = replace(METHODS["dense_distillation"].terms[0], name="cells")
PICTURE = replace(
    METHODS["global_distillation"].terms[0],
    name="picture",
    likelihood="gaussian",
    regulariser="stop_gradient",
)


def build(cfg: ObjectiveConfig) -> MutualInformation:
    teachers = {}
    for seed, (name, width) in enumerate({"frozen": 32, "frozen:wide": 64}.items()):
        torch.manual_seed(seed)
        if name in cfg.teachers:
            teachers[name] = Teacher(ViT(replace(VISION, dim=width)))
    torch.manual_seed(5)
    return MutualInformation(
        cfg, vision=VISION, text=TEXT, num_classes=NUM_CLASSES, teachers=teachers
    )


@pytest.mark.parametrize("term", [CELLS, PICTURE], ids=lambda term: term.target)
def test_a_run_with_two_is_the_sum_of_runs_with_one_each(term: Term) -> None:
    other = replace(term, name="other", teacher="wide")
    found = {}
    for terms in ((term, other), (term,), (other,)):
        cfg = replace(make_config("none"), terms=terms)
        model, batch = build(cfg), make_batch()
        assert list(model.teachers) == [each.target_encoder for each in terms]
        assert not any("teacher" in name for name in model.state_dict())
        if len(terms) == 2:
            weights = model.state_dict()
        else:
            model.load_state_dict({name: weights[name] for name in model.state_dict()})
        for name, value in loss_of(model, batch, draw_small_mix(cfg, batch))[1].items():
            if name.startswith("loss/") and name != "loss/total":
                found.setdefault(name, []).append(value)
    assert set(found) == {f"loss/{term.name}", "loss/other"}
    assert all(torch.equal(both, alone) for both, alone in found.values())


def test_each_encodes_a_view_once() -> None:
    again = replace(CELLS, name="again", likelihood="cosine_smooth_l1", standardise="running")
    terms = (CELLS, again, replace(CELLS, name="other", teacher="wide"))
    cfg = replace(make_config("none"), terms=terms)
    model, batch = build(cfg), make_batch()
    targets = model.encode_targets(batch, draw_small_mix(cfg, batch))
    widths = {source: tokens.shape[-1] for source, tokens in targets.tokens.items()}
    assert widths == {("frozen", 0): 32, ("frozen:wide", 0): 64}


@pytest.mark.parametrize("asked", ["first", "last", "all"])
def test_tokens_that_a_batch_brings_are_those_of_its_images(
    asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two images an input, in the order of the mix, and of every second input."""
    cells = replace(CELLS, predictor="decoder", asked=asked)  # type: ignore[arg-type]
    cfg = make_config()
    cfg = replace(cfg, terms=(cells,), mixing=replace(cfg.mixing, dense_fraction=0.5))
    model, batch = build(cfg), make_batch()
    mix = draw_small_mix(cfg, batch)
    expected = model.encode_targets(batch, mix)
    every = torch.arange(batch.batch_size)
    pictures = normalise_views(batch.global_views[0], every, torch.float32)
    brought = replace(batch, features={"frozen": model.teachers["frozen"].encode_cells(pictures)})
    monkeypatch.setattr(Teacher, "encode_cells", None)  # which is not called again
    found = model.encode_targets(brought, mix)
    assert found.rows == expected.rows
    tokens = expected.tokens["frozen", 0]
    assert len(tokens) == (4 if asked == "all" else 2)
    torch.testing.assert_close(found.tokens["frozen", 0], tokens, rtol=1e-5, atol=1e-5)


def test_decoders_are_shared_by_terms_of_one_teacher_alone() -> None:
    decoded = replace(CELLS, predictor="decoder")
    terms = (decoded, replace(decoded, name="again"), replace(decoded, name="b", teacher="wide"))
    model = build(replace(make_config(), terms=terms))
    assert set(model.decoders) == {"features_frozen", "features_b"}


def test_a_teacher_is_of_frozen_terms_and_has_to_be_there() -> None:
    with pytest.raises(ValueError, match=r"teacher: expected none with encoder momentum"):
        replace(CELLS, encoder="momentum", teacher="wide")
    cfg = replace(make_config("none"), terms=(replace(CELLS, teacher="narrow"),))
    with pytest.raises(ValueError, match=r"got none for frozen:narrow"):
        build(cfg)
