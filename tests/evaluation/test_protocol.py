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

from m3i_fast.evaluation.dense.patch_probe import DenseResult, mean_iou
from m3i_fast.evaluation.features import Features, concatenate
from m3i_fast.evaluation.held_out import HeldOut
from m3i_fast.evaluation.probes.cross_validation import L2_STRENGTHS, Examples
from m3i_fast.evaluation.probes.few_labels import few_label_hits
from m3i_fast.evaluation.protocol import (
    SourceResults,
    evaluate_chance,
    evaluate_pixels,
    evaluate_split,
    measure_all,
    tabulate_figures,
    trained_minus,
)
from m3i_fast.evaluation.retrieval.caption_bound import caption_bound
from m3i_fast.evaluation.statistics import figure_interval, hits_interval, holm, values_interval
from m3i_fast.models.effective_rank import rankme


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
        captioned=torch.arange(900) % 10 != 3,
        label=torch.from_numpy(digits.target[:900]).long(),
        group=torch.arange(900),
        pixels=pixels[..., None].expand(-1, -1, -1, 3).flatten(1),
    )
    return everything.rows(torch.arange(num_train)), everything.rows(torch.arange(num_train, 900))


@cache
def _measured() -> dict[str, SourceResults]:
    encoders = {"trained": _digits(4.0), "untrained": _digits(16.0)}
    return measure_all(encoders, baselines=True)


@cache
def _held_out() -> HeldOut:
    """Pairs of digits are taken for near-duplicates, and odd rows lie farther than even ones."""
    _, heldout = _digits(4.0)
    rows = torch.arange(300)
    return HeldOut(group=heldout.group, cluster=rows // 2 * 2, distance=(rows % 2).double() + 0.1)


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
    figures = tabulate_figures(_measured(), _held_out())
    both = {"trained", "untrained", "chance"}
    for name in ("knn_top1", "few_label_top1", "few_label_knn_top1"):
        assert set(figures[name]) == both | {"pixels"}, name
    assert set(figures["effective_rank"]) == {"trained", "untrained", "pixels"}
    for name in (
        "linear_top1",
        "caption_to_image_recall_at_1",
        "caption_to_image_recall_at_5",
        "image_to_caption_recall_at_5",
        "linear_balanced_accuracy",
        "caption_information_nats",
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
    figures = tabulate_figures({"trained": evaluate_split(train, heldout)}, _held_out())
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
    assert chosen["linear_l2"] > min(L2_STRENGTHS)


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


def test_new_measures_are_those_of_their_functions() -> None:
    train, heldout = _digits(4.0)
    got = _measured()["trained"]
    few = few_label_hits(train.encoder, train.label, train.group, heldout.encoder, heldout.label)
    assert torch.equal(got.hits["few_label_top1"], few["few_label_top1"])
    assert torch.equal(got.hits["few_label_knn_top1"], few["few_label_knn_top1"])
    nats, scale = caption_bound(heldout.image[heldout.captioned], heldout.text[heldout.captioned])
    found = got.nats["caption_information_nats"]
    assert torch.equal(found[heldout.captioned], nats) and nats.shape == (270,)
    assert bool(found[~heldout.captioned].isnan().all())
    assert got.chosen["caption_scale"] == scale
    assert got.figures["effective_rank"] == float(rankme(heldout.encoder))
    pixels = _measured()["pixels"]
    few = few_label_hits(train.pixels, train.label, train.group, heldout.pixels, heldout.label)
    assert torch.equal(pixels.hits["few_label_top1"], few["few_label_top1"])
    assert pixels.figures["effective_rank"] == float(rankme(heldout.pixels))


def _scene_result(seed: int, right: float) -> DenseResult:
    """Ten concepts of two classes."""
    rng = torch.Generator().manual_seed(seed)
    labelled = torch.tensor([[20, 0], [0, 20]]).repeat(5, 1)
    hit = (labelled * right - torch.randint(0, 4, (10, 1), generator=rng) * (labelled > 0)).long()
    predicted = hit + (labelled - hit).flip(1)
    overlap = torch.stack([hit, labelled, predicted], 1)
    group = torch.arange(610, 630, 2)
    return DenseResult(group=group, hits=hit.sum(1).double() / 20, overlap=overlap, l2=0.1)


def test_scenes_stand_beside_the_other_measures() -> None:
    measured = {
        source: replace(
            result, hits=dict(result.hits), overlap=dict(result.overlap), chosen=dict(result.chosen)
        )
        for source, result in _measured().items()
    }
    results = {"trained": _scene_result(0, 0.9), "untrained": _scene_result(1, 0.6)}
    for source, result in results.items():
        measured[source].add_scenes(result, _held_out())
    figures = tabulate_figures(measured, _held_out())
    intervals = trained_minus(measured, _held_out())
    assert "scene_miou_hard" not in figures.keys() | intervals.keys()  # concepts are all even
    for source, result in results.items():
        assert figures["scene_miou"][source] == float(mean_iou(result.overlap.sum(0)))
        assert figures["scene_patch_top1"][source] == pytest.approx(float(result.hits.mean()))
        assert figures["chosen"][source]["scene_l2"] == 0.1
    assert set(intervals["scene_miou"]) == {"untrained"}
    assert intervals["scene_miou"]["untrained"].verdict == "better"
    assert figures["held_out_concepts"] == 300


def test_intervals_are_around_the_differences_of_the_published_figures() -> None:
    figures, intervals = (
        tabulate_figures(_measured(), _held_out()),
        trained_minus(_measured(), _held_out()),
    )
    assert set(intervals["knn_top1"]) == {"untrained", "chance", "pixels"}
    assert set(intervals["caption_information_nats"]) == {"untrained", "chance"}
    assert "effective_rank" not in intervals
    for name, sources in intervals.items():
        for source, interval in sources.items():
            difference = figures[name]["trained"] - figures[name][source]
            assert interval.difference == pytest.approx(difference, abs=1e-12), (name, source)
            assert interval.low < difference < interval.high
    hits = [_measured()[source].hits["knn_top1"] for source in ("trained", "untrained")]
    cluster, odd = torch.arange(300) // 2, torch.arange(300) % 2 == 1
    of_odd = [side[odd] for side in hits]
    for name, alone in (
        ("knn_top1", hits_interval(*hits, cluster)),
        ("knn_top1_hard", hits_interval(*of_odd)),
    ):
        found = intervals[name]["untrained"]
        assert (found.low, found.high) == (alone.low, alone.high)
        assert found.p_value > alone.p_value


def test_p_values_are_corrected_for_the_comparisons_on_the_same_items() -> None:
    rng, groups = np.random.default_rng(0), torch.arange(400)
    hits = {
        who: {f"m{i}": torch.from_numpy(rng.random(400) < p).double() for i in range(5)}
        for who, p in (("trained", 0.6), ("untrained", 0.53), ("pixels", 0.55))
    }
    held_out = HeldOut(group=groups, cluster=groups, distance=torch.arange(400.0))
    got = trained_minus({who: SourceResults(hits=of) for who, of in hits.items()}, held_out)
    for ending in ("", "_hard"):
        family = {
            (name, source): hits_interval(
                *(hits[who][name][held_out.rows(ending)] for who in ("trained", source))
            )
            for source in ("untrained", "pixels")
            for name in hits["trained"]
        }
        for (name, source), expected in holm(family).items():
            assert got[name + ending][source] == expected


def test_the_hard_half_is_measured_beside_the_whole() -> None:
    figures, odd = tabulate_figures(_measured(), _held_out()), torch.arange(300) % 2 == 1
    for source, result in _measured().items():
        for name, values in (result.hits | result.nats).items():
            of_odd = values[odd & ~values.isnan()]
            assert figures[f"{name}_hard"][source] == pytest.approx(float(of_odd.mean())), name
    assert "effective_rank_hard" not in figures and "held_out_concepts_hard" not in figures


def test_without_embeddings_only_captions_are_left_out() -> None:
    train, heldout = (
        replace(part, image=part.image[:, :0], text=part.text[:, :0]) for part in _digits(4.0)
    )
    figures = tabulate_figures(
        measure_all({"trained": (train, heldout)}, baselines=True), _held_out()
    )
    assert {"knn_top1", "linear_top1"} <= set(figures)
    assert not [name for name in figures if "recall" in name or "caption" in name]


@pytest.mark.parametrize(("captioned", "measures"), [(0, set()), (3, {"recall"})])
def test_what_needs_more_captions_than_there_are_is_left_out(
    captioned: int, measures: set[str]
) -> None:
    train, heldout = _digits(4.0)
    few = replace(heldout, captioned=torch.arange(len(heldout.label)) < captioned)
    found = evaluate_split(train, few)
    names = [name for name in (*found.hits, *found.nats) if "recall" in name or "caption" in name]
    assert {"recall" if "recall" in name else name for name in names} == measures


def test_the_same_seed_gives_the_same_result() -> None:
    first, second = _measured()["trained"], evaluate_split(*_digits(4.0))
    assert first.chosen == second.chosen and first.figures == second.figures
    assert all(torch.equal(first.hits[name], second.hits[name]) for name in first.hits)


def test_nats_and_overlaps_have_their_own_intervals() -> None:
    rng, groups = np.random.default_rng(0), torch.arange(600, 900)
    hits = {"knn_top1": torch.zeros(300, dtype=torch.float64)}
    nats = [torch.from_numpy(rng.normal(size=300)) for _ in range(2)]
    overlap = torch.from_numpy(rng.integers(1, 9, (2, 300, 3, 4)))
    overlap[:, :, 1:] += overlap[:, :, :1]
    nats[0][:30] = nats[1][:30] = torch.nan
    overlap[:, 200:] = 0  # in no scene
    measured = {
        who: SourceResults(hits=hits, nats={"nats": nats[i]}, overlap={"miou": overlap[i]})
        for i, who in enumerate(("trained", "untrained"))
    }
    held_out = HeldOut(group=groups, cluster=groups // 3, distance=torch.arange(300.0))
    got = trained_minus(measured, held_out)
    expected = {
        "nats": values_interval(nats[0][30:], nats[1][30:], groups[30:] // 3),
        "miou": figure_interval(*overlap[:, :200], mean_iou, groups[:200] // 3),
        "miou_hard": figure_interval(*overlap[:, 150:200], mean_iou, groups[150:200] // 3),
    }
    for name, alone in expected.items():
        found = got[name]["untrained"]
        assert (found.low, found.high) == (alone.low, alone.high), name
    one = replace(held_out, cluster=torch.zeros(300))
    assert trained_minus(measured, one) == {}  # nothing says how it varies


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


def test_parts_are_joined_row_by_row() -> None:
    train, heldout = _digits(4.0)
    both = concatenate([train, heldout])
    assert torch.equal(both.pixels[600:], heldout.pixels)
    assert torch.equal(both.captioned[:600], train.captioned)
    assert torch.equal(both.group, torch.arange(900))


def test_examples_of_different_lengths_are_refused() -> None:
    rows = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="Examples.fold: expected 4 rows.* got 3"):
        Examples(features=rows[:, None].float(), label=rows, group=rows, fold=rows[:3])
