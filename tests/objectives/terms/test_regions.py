"""LocCa's terms beside torch's decoder and cross entropy in fp64, a region at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou as torchvision_iou

from m3i_fast.config.any_shape import objective_conflicts
from m3i_fast.config.columns import REGION_UNIT, REGION_WIDTH
from m3i_fast.config.objective.heads import CaptionerConfig
from m3i_fast.config.objective.objective import Term
from m3i_fast.objectives.mixing import Mix
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.objectives.terms import RegionTokens
from m3i_fast.objectives.terms.regions import box_iou
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.dataset.annotations.regions import RegionViews, region_rows
from tests.shared.annotated import (
    MOST_REGIONS,
    NO_TARGETS,
    TERMS,
    annotated_batch,
    build,
    encode,
    objective,
)
from tests.shared.small_objective import TEXT, draw_small_mix
from tests.shared.torch_decoder import hidden_of

BINS, WORDS = 20, TEXT.vocab_size
NAMES = ["boxes", "places"]


def spelled(row: list[int], name: str) -> list[int]:
    """The tokens of a region by its integers: box, then text, or the other way."""
    box = [WORDS + min(BINS - 1, math.floor(Fraction(x, REGION_UNIT) * BINS)) for x in row[:4]]
    ids = [i for i in row[4:] if i >= 0]
    return [ids[0], *box, *ids[1:]] if name == "boxes" else [*ids, *box]


def one_by_one(
    model: MutualInformation, cells: Tensor, batch: Batch, mix: Mix, name: str
) -> tuple[Tensor, Tensor, list[tuple[int, Tensor, list[int]]]]:
    """The logits and targets of all regions' tokens, and (image, box logits, row) of each."""
    term, logits, targets, boxes = model.terms[name], [], [], []
    for image, sample in enumerate(mix.sample.tolist()):
        for row in batch.columns["objects"][sample, 0].tolist():
            if row[4] < 0:
                continue
            ids = spelled(row, name)
            hidden = hidden_of(term.decoder, cells[image, None], torch.tensor([ids]))[0]
            found = hidden @ term.vocabulary.T
            logits.append(found)
            targets += ids[1:]
            first = 0 if name == "boxes" else len(ids) - 5
            boxes.append((image, found[first : first + 4, WORDS:], row))
    return torch.cat(logits), torch.tensor(targets), boxes


@pytest.mark.parametrize("mode", ["none", "own_image", "joint", "masked"])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_regions_are_torchs_cross_entropy(mode: str, name: str) -> None:
    """Value and gradients; pictures without regions, and padding, count in no mean over members."""
    batch = annotated_batch()
    for mean in ("members", "batch"):
        cfg = objective(name, mode=mode, mean=mean)
        model, mix = build(cfg).double(), draw_small_mix(cfg, batch)
        encoded = encode(model, mix)
        total, metrics = model(encoded, NO_TARGETS, batch, mix)
        logits, targets, _ = one_by_one(model, encoded.views[0], batch, mix, name)
        members = (batch.columns["objects"][:, 0, :, 4] >= 0).any(1).sum()
        share = members / batch.batch_size if mean == "batch" else 1.0
        expected = F.cross_entropy(logits, targets) * share
        torch.testing.assert_close(total, expected, rtol=1e-10, atol=0)
        assert metrics[f"members/{name}"] == members == 5
        learnt = [*encoded.views, *model.terms.parameters()]
        pairs = (
            torch.autograd.grad(x, learnt, allow_unused=True, materialize_grads=True)
            for x in (total, expected)
        )
        for a, b in zip(*pairs, strict=True):
            assert (a - b).norm() <= 1e-10 * max(float(b.norm()), 1.0)


def test_blended_pictures_have_each_their_regions_by_their_share() -> None:
    batch, cfg = annotated_batch(), objective("boxes", mode="blend", mean="members")
    model, mix = build(cfg).double(), draw_small_mix(cfg, batch)
    encoded = encode(model, mix)
    total, _ = model(encoded, NO_TARGETS, batch, mix)
    share, expected = mix.share[0].double(), 0.0
    for rows, weight in ((slice(4), share), (slice(4, 8), 1 - share)):
        half: Any = replace(mix, sample=mix.sample[rows])
        logits, targets, _ = one_by_one(model, encoded.views[0][rows], batch, half, "boxes")
        expected = expected + weight * F.cross_entropy(logits, targets)
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_room_for_more_regions_changes_nothing(name: str) -> None:
    batch, cfg = annotated_batch(), objective(name)
    more = torch.full((8, 2, 7, REGION_WIDTH), -1, dtype=torch.int32)
    more[:, :, :MOST_REGIONS] = batch.columns["objects"]
    wide = replace(batch, columns={**batch.columns, "objects": more})
    model, mix = build(cfg).double(), draw_small_mix(cfg, batch)
    encoded = encode(model, mix)
    (one, a), (two, b) = (model(encoded, NO_TARGETS, x, mix, monitor=True) for x in (batch, wide))
    torch.testing.assert_close(one, two, rtol=1e-12, atol=0)
    for key in (f"monitor/{name}_iou", f"monitor/{name}_accuracy", f"members/{name}"):
        torch.testing.assert_close(a[key], b[key], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_without_regions_gives_no_gradient(name: str) -> None:
    batch, cfg = annotated_batch(), objective(name)
    model, mix = build(cfg).double(), draw_small_mix(cfg, batch)
    encoded = encode(model, mix)
    total, _ = model(encoded, NO_TARGETS, batch, mix)
    (grad,) = torch.autograd.grad(total, encoded.views[0])
    known = (batch.columns["objects"][mix.sample, 0, :, 4] >= 0).any(1)
    assert 0 < known.sum() < len(known)
    assert ((grad.abs().sum((1, 2)) > 0) == known).all()
    unknown = torch.where(batch.columns["objects"] < 0, -1, batch.columns["objects"])
    unknown[~known] = -1
    same = replace(batch, columns={**batch.columns, "objects": unknown})
    assert torch.equal(model(encoded, NO_TARGETS, same, mix)[0], total)


@pytest.mark.parametrize("name", NAMES)
def test_monitors_are_torchvisions_iou_and_the_share_of_tokens(name: str) -> None:
    batch, cfg = annotated_batch(), objective(name)
    model, mix = build(cfg).double(), draw_small_mix(cfg, batch)
    encoded = encode(model, mix)
    optimizer = torch.optim.Adam(model.terms.parameters(), 0.02)
    for _ in range(25):  # so that boxes are no accident
        optimizer.zero_grad()
        model(encoded, NO_TARGETS, batch, mix)[0].backward()
        optimizer.step()
    _, metrics = model(encoded, NO_TARGETS, batch, mix, monitor=True)
    logits, targets, boxes = one_by_one(model, encoded.views[0], batch, mix, name)
    right = (logits.argmax(1) == targets).double().mean()
    assert float(metrics[f"monitor/{name}_accuracy"]) == pytest.approx(float(right))
    found = torch.stack([of.argmax(1) for _, of, _ in boxes]).double().add(0.5) / BINS
    true = torch.tensor([row[:4] for *_, row in boxes]).double() / REGION_UNIT
    valid = (found[:, :2] < found[:, 2:]).all(1)
    iou = torchvision_iou(found[valid][:, [1, 0, 3, 2]], true[valid][:, [1, 0, 3, 2]]).diagonal()
    assert 0.1 < iou.mean() < 0.9
    assert float(metrics[f"monitor/{name}_iou"]) == pytest.approx(float(iou.sum() / len(boxes)))


def test_iou_is_torchvisions() -> None:
    rng = torch.Generator().manual_seed(0)
    corner = torch.rand(2, 50, 2, generator=rng, dtype=torch.float64) * 0.6
    side = torch.rand(2, 50, 2, generator=rng, dtype=torch.float64) * 0.4
    first, second = torch.cat([corner, corner + side], -1)
    ours = box_iou(first, second)
    theirs = torchvision_iou(first[:, [1, 0, 3, 2]], second[:, [1, 0, 3, 2]]).diagonal()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert (ours > 0).any() and (ours == 0).any()


def test_a_box_learnt_is_found() -> None:
    """The IoU of the true coordinates is that of their bins; a quarter of a bin off at most."""
    batch, cfg = annotated_batch(), objective("places")
    (term,) = build(cfg).double().terms_of(RegionTokens)
    regions = batch.columns["objects"][:, 0]
    tokens, _, start = term.sequences(regions)
    with torch.no_grad():  # a token's own row says it
        term.vocabulary.zero_()
        hidden = F.one_hot(tokens[..., 1:], len(term.vocabulary)).double()
        term.vocabulary = torch.nn.Parameter(torch.eye(len(term.vocabulary)).double())
    found = float(term.mean_iou(hidden, regions, start))
    there = regions[..., 4] >= 0
    true = regions[there][:, :4].double() / REGION_UNIT
    centre = ((true * BINS).floor() + 0.5) / BINS
    expected = torchvision_iou(true[:, [1, 0, 3, 2]], centre[:, [1, 0, 3, 2]]).diagonal().mean()
    assert found == pytest.approx(float(expected)) and found > 0.6


def test_pixels_become_the_tokens_of_exact_arithmetic() -> None:
    """From a box in pixels of a picture, by a view, to tokens: fractions all the way."""
    cfg = objective("boxes")
    (term,) = build(cfg).terms_of(RegionTokens)
    rng = np.random.default_rng(0)
    compared = 0
    for _ in range(200):
        height, width = rng.integers(20, 900, 2).tolist()
        top, bottom = sorted(rng.choice(height * 2 + 1, 2, replace=False).tolist())  # half pixels
        left, right = sorted(rng.choice(width * 2 + 1, 2, replace=False).tolist())
        y, x = rng.integers(0, height // 2), rng.integers(0, width // 2)
        rows, columns = rng.integers(5, height - y + 1), rng.integers(5, width - x + 1)
        flip = int(rng.integers(2))
        box = top / 2 / height, left / 2 / width, bottom / 2 / height, right / 2 / width
        values = region_rows([(box, [1, 2])], 1)[None]
        params = np.array([[[y, x, rows, columns, flip]]], np.float32)
        shown = RegionViews(most=1, least_share=1e-6, seed=0).of(
            values, params, np.array([[height, width]]), np.array([0])
        )
        if shown[0, 0, 0, 4] < 0:
            continue
        ends = [
            [min(max((Fraction(e, 2) - int(at)) / int(size), Fraction(0)), Fraction(1)) for e in of]
            for of, at, size in (((top, bottom), y, rows), ((left, right), x, columns))
        ]
        if flip:
            ends[1] = [1 - e for e in reversed(ends[1])]
        exact = [ends[0][0], ends[1][0], ends[0][1], ends[1][1]]
        tokens, *_ = term.sequences(torch.from_numpy(shown[:, 0]))
        for token, share in zip(tokens[0, 0, 1:5].tolist(), exact, strict=True):
            scaled = share * BINS
            away = abs(scaled - round(scaled))
            if 0 < away < Fraction(1, 10**6):
                continue  # nearer to the next bin than a unit of the box
            allowed = {min(BINS - 1, math.floor(scaled))}
            # on the border of two bins, of which a unit decides
            allowed |= {max(math.floor(scaled) - 1, 0)} if away == 0 else set()
            assert token - WORDS in allowed
            compared += 1
    assert compared > 300


@pytest.mark.parametrize("name", NAMES)
def test_views_of_any_shape_refuse_the_terms_by_name(name: str) -> None:
    told = dict(objective_conflicts(objective(name)))
    assert told.keys() == {"terms"} and repr(name) in told["terms"]


def test_a_run_without_such_regions_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a column of regions .* got 'tags'"):
        build(objective("boxes", column="tags"))
    with pytest.raises(ValueError, match="column: expected the name of a column of regions"):
        objective("places", column="")
    with pytest.raises(ValueError, match="reversal: expected >= 0, and 0 for referring_box"):
        replace(TERMS["places"], reversal=1.0)
    with pytest.raises(ValueError, match="coordinate_bins"):
        CaptionerConfig(coordinate_bins=0)
    assert isinstance(TERMS["boxes"], Term)
