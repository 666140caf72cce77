"""Figures of a live model: shares by hand, and none of features that are not finite."""

from __future__ import annotations

import math

import pytest
import torch

from m3i_fast.evaluation.live_figures import (
    classifier_accuracies,
    knn_accuracies,
    recalls,
    zero_shot_accuracy,
)


def test_embeddings_that_are_not_finite_are_logged_as_such() -> None:
    nan = torch.full((4, 3), math.nan)
    found = recalls(
        {"image": nan, "text": nan, "group": torch.arange(4), "captioned": torch.ones(4).bool()},
        torch.device("cpu"),
    )
    assert len(found) == 4 and all(map(math.isnan, found.values()))


@pytest.mark.parametrize("spoiled", ["bank", "queries"])
def test_knn_of_features_that_are_not_finite_is_no_figure(spoiled: str) -> None:
    label = torch.tensor([0, 1, 2])
    columns = {
        name: {"": torch.eye(3), "_ema": torch.eye(3), "label": label}
        for name in ("bank", "queries")
    }
    columns[spoiled][""] = torch.full((3, 3), math.nan)
    found = knn_accuracies(columns["bank"], columns["queries"], torch.device("cpu"))
    assert math.isnan(found["evaluate/knn_top1"]) and found["evaluate/knn_top1_ema"] >= 0


@pytest.mark.parametrize("spoiled", ["classes", "image"])
def test_classes_by_prompts_that_are_not_finite_are_no_figure(spoiled: str) -> None:
    parts = {"classes": torch.eye(3), "image": torch.eye(3)[[2, 0, 1]]}
    queries = {"label": torch.tensor([2, 1, -1]), "image": parts["image"]}
    assert zero_shot_accuracy(parts["classes"], queries) == {"evaluate/zero_shot_top1": 0.5}
    parts[spoiled][0, 0] = math.nan
    found = zero_shot_accuracy(parts["classes"], queries | {"image": parts["image"].roll(1, 0)})
    assert math.isnan(found["evaluate/zero_shot_top1"])


def test_of_five_classes_the_classifier_has_no_top_5_and_none_of_nan() -> None:
    queries = {
        "label": torch.tensor([2, 1, -1]),
        "ranked": torch.tensor([[2], [0], [0]]),
        "is_finite": torch.tensor([True, True, False]),
    }
    assert classifier_accuracies(queries) == {"evaluate/classifier_top1": 0.5}
    found = classifier_accuracies(queries | {"is_finite": torch.tensor([True, False, True])})
    assert math.isnan(found["evaluate/classifier_top1"])


def test_an_encoder_that_has_collapsed_has_the_recall_of_chance() -> None:
    same = torch.ones(10, 3)
    columns = {"image": same, "text": same, "group": torch.arange(10)}
    found = recalls(columns | {"captioned": torch.ones(10).bool()}, torch.device("cpu"))
    assert found["evaluate/caption_to_image_recall_at_5"] == pytest.approx(0.5)


def test_a_bank_of_few_pictures_asks_all_of_them() -> None:
    bank = {"": torch.eye(3), "label": torch.tensor([0, 1, 2])}
    queries = {"": torch.eye(3)[[2, 0]], "label": torch.tensor([2, 1])}
    found = knn_accuracies(bank, queries, torch.device("cpu"))
    assert found == {"evaluate/knn_top1": 0.5}
