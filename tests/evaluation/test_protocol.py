from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip_train.train import get_clip_metrics
from skimage import transform
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from m3i_fast.evaluation import protocol
from m3i_fast.evaluation.protocol import (
    Features,
    Measured,
    compare,
    evaluate_chance,
    evaluate_pixels,
    evaluate_split,
    measure_all,
    paired_hits,
)


def _digits(noise: float, num_train: int = 600) -> tuple[Features, Features]:
    """Real pictures of digits. Two noisy looks at one digit are an image and its caption."""
    digits = load_digits()
    rng = torch.Generator().manual_seed(0)
    rows = torch.from_numpy(digits.data[:900]).float()
    looks = [rows + noise * torch.randn(rows.shape, generator=rng) for _ in range(2)]
    pixels = torch.from_numpy(transform.resize(digits.images[:900] / 16, (900, 12, 12))).float()
    everything = Features(
        encoder=looks[0],
        image=looks[0],
        text=looks[1],
        label=torch.from_numpy(digits.target[:900]).long(),
        group=torch.arange(900),
        pixels=pixels[..., None].expand(-1, -1, -1, 3).flatten(1),
    )
    return everything.rows(torch.arange(num_train)), everything.rows(torch.arange(num_train, 900))


@cache
def _measured() -> dict[str, Measured]:
    return measure_all(_digits(4.0), _digits(16.0))


def _sklearn_hits(train: Features, heldout: Features, field: str, *, k: int) -> Tensor:  # [M]
    oracle = KNeighborsClassifier(
        n_neighbors=k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / 0.07),
    ).fit(getattr(train, field).double().numpy(), train.label.numpy())
    predicted = oracle.predict(getattr(heldout, field).double().numpy())
    return torch.from_numpy(predicted == heldout.label.numpy()).double()


def test_figures_have_the_names_and_sources_that_are_published() -> None:
    figures = compare(_measured())
    both = {"trained", "untrained", "chance"}
    assert set(figures["knn_top1"]) == both | {"pixels"}
    for name in (
        "linear_top1",
        "caption_to_image_recall_at_1",
        "caption_to_image_recall_at_5",
        "image_to_caption_recall_at_5",
        "linear_balanced_accuracy",
    ):
        assert set(figures[name]) == both, name
        assert figures[name]["chance"] < figures[name]["untrained"] < figures[name]["trained"], name
    _, heldout = _digits(4.0)
    assert figures["held_out_concepts"] == 300
    assert figures["caption_to_image_recall_at_5"]["chance"] == pytest.approx(5 / 300)
    share = heldout.label.bincount().max().item() / 300
    assert figures["knn_top1"]["chance"] == figures["linear_top1"]["chance"] == pytest.approx(share)
    assert figures["knn_balanced_accuracy"]["chance"] == pytest.approx(0.1)


def test_hits_are_those_of_sklearn_with_the_chosen_k() -> None:
    train, heldout = _digits(8.0)
    got = evaluate_split(train, heldout)
    oracle = _sklearn_hits(train, heldout, "encoder", k=int(got.chosen["knn_k"]))
    assert torch.equal(got.hits["knn_top1"], oracle)


def test_recalls_are_open_clips_each_way() -> None:
    train, heldout = _digits(16.0)
    image, text = (F.normalize(part, dim=-1) for part in (heldout.image, heldout.text))
    oracle = get_clip_metrics(image, text, torch.tensor(1.0))
    figures = compare({"trained": evaluate_split(train, heldout)})
    for ours, theirs in (
        ("caption_to_image_recall_at_1", "text_to_image_R@1"),
        ("caption_to_image_recall_at_5", "text_to_image_R@5"),
        ("image_to_caption_recall_at_5", "image_to_text_R@5"),
    ):
        assert figures[ours]["trained"] == pytest.approx(oracle[theirs]), ours
    assert oracle["text_to_image_R@5"] != oracle["image_to_text_R@5"]  # a swap would be seen


def test_settings_do_not_depend_on_the_held_out_items() -> None:
    train, heldout = _digits(16.0)
    chosen = evaluate_split(train, heldout).chosen
    shuffled = heldout.rows(torch.arange(299, -1, -1))
    wrong = replace(heldout, label=shuffled.label, encoder=-heldout.encoder)
    assert evaluate_split(train, wrong).chosen == chosen
    assert chosen["knn_k"] > 1  # one neighbour is a poor choice for features this noisy
    assert chosen["linear_l2"] > min(protocol.L2_STRENGTHS)


def test_settings_are_chosen_across_concepts_not_within() -> None:
    """Twins of a concept in another fold would make one neighbour look perfect."""
    train, heldout = _digits(16.0, num_train=300)
    twice = train.rows(torch.arange(300).repeat(4))
    assert evaluate_split(twice, heldout).chosen["knn_k"] > 1
    leaking = replace(twice, group=torch.arange(1200) + 10_000)
    assert evaluate_split(leaking, heldout).chosen["knn_k"] == 1


def test_unlabelled_training_items_are_left_out() -> None:
    train, heldout = _digits(8.0)
    hidden = torch.arange(600) % 3 == 0
    masked = replace(train, label=train.label.masked_fill(hidden, -1))
    got, expected = evaluate_split(masked, heldout), evaluate_split(train.rows(~hidden), heldout)
    assert torch.equal(got.hits["linear_top1"], expected.hits["linear_top1"])
    assert torch.equal(got.hits["knn_top1"], expected.hits["knn_top1"])


def test_pixels_and_chance_are_measured_item_by_item() -> None:
    train, heldout = _digits(4.0)
    pixels, chance = evaluate_pixels(train, heldout), evaluate_chance(heldout)
    oracle = _sklearn_hits(train, heldout, "pixels", k=int(pixels.chosen["knn_k"]))
    assert torch.equal(pixels.hits["knn_top1"], oracle)
    assert float(oracle.mean()) > 0.9
    assert chance.hits["knn_top1"].unique().tolist() == [0, 1]
    assert chance.hits["caption_to_image_recall_at_1"].unique().tolist() == [1 / 300]


def test_paired_hits_average_to_the_published_figures() -> None:
    figures, pairs = compare(_measured()), paired_hits(_measured())
    assert set(pairs["knn_top1"]) == {"trained", "untrained", "chance", "pixels"}
    for name, sources in pairs.items():
        for source, hits in sources.items():
            assert hits.shape == (300,)
            assert float(hits.mean()) == figures[name][source]


def test_without_embeddings_only_retrieval_is_left_out() -> None:
    train, heldout = (
        replace(part, image=part.image[:, :0], text=part.text[:, :0]) for part in _digits(4.0)
    )
    figures = compare(measure_all((train, heldout), (train, heldout)))
    assert {"knn_top1", "linear_top1"} <= set(figures)
    assert not [name for name in figures if "recall" in name]


def test_the_same_seed_gives_the_same_result() -> None:
    first, second = _measured()["trained"], evaluate_split(*_digits(4.0))
    assert first.chosen == second.chosen and first.balanced == second.balanced
    assert all(torch.equal(first.hits[name], second.hits[name]) for name in first.hits)


Sets = tuple[Features, Features]


def _duplicate_concept(train: Features, heldout: Features) -> Sets:
    return train, replace(heldout, group=heldout.group.clamp_max(898))


def _leaked_concept(train: Features, heldout: Features) -> Sets:
    return train, replace(heldout, group=heldout.group - 1)


def _unlabelled(train: Features, heldout: Features) -> Sets:
    return train, replace(heldout, label=heldout.label.masked_fill(heldout.label == 3, -1))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (_duplicate_concept, "heldout.group: expected one picture a concept, got 300 .* 299"),
        (_leaked_concept, "heldout.group: expected concepts that training never saw, got 1 .* 599"),
        (_unlabelled, "heldout.label: expected a label on every item"),
    ],
)
def test_sets_that_would_flatter_are_refused(broken: Callable[..., Sets], message: str) -> None:
    for measure in (evaluate_split, evaluate_pixels):
        with pytest.raises(ValueError, match=message):
            measure(*broken(*_digits(4.0)))


@pytest.mark.parametrize("field", ["encoder", "group", "pixels"])
def test_fields_of_different_lengths_are_refused(field: str) -> None:
    train, _ = _digits(4.0)
    with pytest.raises(ValueError, match=rf"Features.{field}: expected 600 rows.* got 599"):
        replace(train, **{field: getattr(train, field)[1:]})


def test_features_that_are_not_finite_are_refused() -> None:
    train, _ = _digits(4.0)
    broken: Tensor = train.text.clone()
    broken[5, 3] = torch.nan
    with pytest.raises(ValueError, match="Features.text: expected finite values"):
        replace(train, text=broken)
