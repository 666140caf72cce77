"""What an objective's config refuses, each with the field's name."""

from dataclasses import replace

import pytest

from m3i_fast.config.objective.mixing import MixingConfig
from m3i_fast.config.objective.objective import ObjectiveConfig, m3i
from m3i_fast.objectives.methods import METHODS
from m3i_fast.objectives.objective import MutualInformation
from tests.shared.small_objective import NUM_CLASSES, TEXT, VISION, make_config


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: ObjectiveConfig(terms=(*m3i(), m3i()[0])), "distinct"),
        (lambda: ObjectiveConfig(terms=tuple(replace(t, weight=0.0) for t in m3i())), "weight"),
        (lambda: ObjectiveConfig(temperature=0.001), "temperature"),
        (
            lambda: replace(m3i()[3], likelihood="gaussian", regulariser="stop_gradient"),
            "of target caption expected",
        ),
        (lambda: replace(m3i()[3], predictor="decoder"), "predictor: expected one of"),
        (
            lambda: replace(m3i()[0], encoder="none"),
            "encoder: expected momentum or frozen for features, got none",
        ),
        (
            lambda: replace(m3i()[0], encoder="shared"),
            "encoder: expected momentum or frozen for features, got shared",
        ),
        (
            lambda: replace(METHODS["simclr"].terms[0], view="same"),
            "encoder: expected .*, or shared with .*, got shared with embedding of the same view",
        ),
        (lambda: replace(m3i()[0], target="colours"), r"target: expected one of \['caption', "),
        (lambda: replace(m3i()[0], symmetric=True), "symmetric: expected"),
        (
            lambda: replace(METHODS["densecl"].terms[0], symmetric=True),
            "symmetric: expected False with a queue",
        ),
        (lambda: replace(m3i()[0], temperature=0.0), "temperature: expected > 0"),
        (
            lambda: replace(m3i()[0], target_temperature=0.07),
            r"target_temperature: expected none, or > 0 with a regulariser among \('centring', ",
        ),
        (
            lambda: replace(METHODS["dino"].terms[0], target_warmup_steps=5),
            "target_warmup_steps: expected 0 without target_temperature, got 5",
        ),
        (lambda: ObjectiveConfig(terms=(replace(m3i()[0], name="a b"),)), "letters"),
        (lambda: ObjectiveConfig(queue_length=0), "queue_length"),
        (
            lambda: ObjectiveConfig(mixing=MixingConfig(mode="blend")),
            "expected blend.* with terms of annotations",
        ),
        (
            lambda: ObjectiveConfig(terms=(replace(m3i()[0], predictor="linear"),)),
            "mixing.mode none",
        ),
        (
            lambda: MutualInformation(
                replace(make_config(), terms=(replace(m3i()[0], encoder="frozen"),)),
                vision=VISION,
                text=TEXT,
                num_classes=NUM_CLASSES,
            ),
            "objective.teacher",
        ),
        (
            lambda: MutualInformation(
                make_config(only="category"), vision=VISION, text=TEXT, num_classes=0
            ),
            "classes",
        ),
    ],
)
def test_wrong_objectives_are_named(make, word: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=word):
        make()
